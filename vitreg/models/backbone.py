"""A Backbone: a model that vitreg can read, with its preprocessing and its anatomy."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitreg.errors import (
    ModelWarning,
    UnsupportedModelError,
)
from vitreg.models.anatomy import Anatomy, find_anatomy, row_of_each_pass
from vitreg.models.headless import run_without_head
from vitreg.models.layout import TokenLayout
from vitreg.models.own_forward import ModelForward, OfModel, own_forward
from vitreg.models.packed import read_rows
from vitreg.models.pairs import make_blocks
from vitreg.models.patch_input import forward_of
from vitreg.models.placement import device_of, dtype_of
from vitreg.models.preprocessing import timm_preprocess
from vitreg.models.probe import Forward
from vitreg.models.sizes import (
    FALLBACK,
    Pair,
    Preprocess,
    Size,
    native_size,
    pair,
    size_of_photos,
    written,
)
from vitreg.printing import PHANTOM

PLANTED = "_vitreg_planted"  # an attribute of a module, and its copies, whose artifacts were planted


@dataclass(frozen=True, repr=False)
class Backbone:
    """A Vision Transformer that vitreg can read. Call it on (b, 3, h, w) images as one would the model.

    `model` is the module as its library made it, unchanged but for lists that are pairs of an attention and
    an MLP: they get a subclass of their own class (pairs.py), which changes no answer. `image_size` (height,
    width) in pixels is what its preprocess gives of a photo; images of other sizes may come, and `layout_for`
    knows their tokens. `planted` says that its artifacts were (vitreg.plant): it is called a phantom wherever
    it is shown.
    """

    model: nn.Module
    name: str
    anatomy: Anatomy
    image_size: tuple[int, int]
    preprocess: Preprocess | None = None
    forward: Forward | None = None
    planted: bool = False

    def __call__(self, images: Float[Tensor, "b 3 h w"]) -> Any:
        """The model's own output. Images are moved to the model's device and dtype.

        None for a model whose head wants more than images: the pass ends where it raises.
        """
        images, forward = images.to(self.device, self.dtype), self.forward or self.model
        if self.anatomy.head_error:
            return run_without_head(self.anatomy.block_modules(self.model)[-1], forward, images)
        return forward(images)

    def __repr__(self) -> str:
        anatomy, planted = self.anatomy, f", {PHANTOM}" if self.planted else ""
        return (
            f"<Backbone: {self.name}{planted}: {anatomy.depth} blocks, width {anatomy.width},"
            f" {anatomy.heads} heads, images of {written(self.image_size)} pixels>"
        )

    @property
    def device(self) -> torch.device:
        return device_of(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """Of the floating-point parameters (quantised weights have another)."""
        return dtype_of(self.model)

    @property
    def layout(self) -> TokenLayout:
        """The token layout at `image_size`."""
        return self.anatomy.layout(self.image_size)

    def layout_for(self, images: Float[Tensor, "b 3 h w"]) -> TokenLayout:
        """The token layout of a forward pass on these images."""
        return self.anatomy.layout((images.shape[-2], images.shape[-1]))

    def with_model(self, model: nn.Module, name: str) -> "Backbone":
        """The same backbone around another instance of the same model (a copy with other weights)."""
        forward = forward_of(model)
        if isinstance(self.forward, ModelForward):
            forward = self.forward.on(model)
        elif self.forward is not None and forward_of(self.model) is None:
            raise UnsupportedModelError(
                "this backbone was wrapped with a `forward` of its own, which would still run the old model."
                " Let it take the model, too: wrap(model, forward=lambda model, images: ...)."
            )
        make_blocks(model)  # of pairs, as in the model that was wrapped
        if self.anatomy.stream.row_axes:
            read_rows(model, row_of_each_pass(model, forward or model, self.anatomy))
        # Not replace(): what a subclass holds beside the model (a text tower) would still be the old one's.
        return Backbone(
            model, name, self.anatomy, self.image_size, self.preprocess, forward, planted=self.planted
        )


def wrap(
    module: nn.Module,
    preprocess: Preprocess | None = None,
    *,
    image_size: Size | None = None,
    forward: Forward | OfModel | None = None,
    anatomy: Anatomy | None = None,
    name: str | None = None,
) -> Backbone:
    """A Backbone around a model that the caller holds, which may be an encoder inside a larger model.

    `forward` runs `module` on (b, 3, h, w) images where `module(images)` does not: a method of the module, or
    a function (module, images); one of images alone cannot run copies of the model. `image_size` is
    (height, width) or one side in pixels; without it, what the model's own configuration says, or 224. Where
    `preprocess` gives photos another size, that is used, and a ModelWarning says so. `anatomy` overrides what
    would be found. Raises UnsupportedModelError with the reason for a model that is not a plain Vision
    Transformer.
    """
    size = _agreed(name or type(module).__name__, module, preprocess, image_size)
    forward = own_forward(module, forward) or forward_of(module)
    found = find_anatomy(module, forward or module, size, anatomy)
    preprocess = preprocess or timm_preprocess(module, size)
    named, planted = name or type(module).__name__, getattr(module, PLANTED, False)
    return Backbone(module, named, found, size, preprocess, forward, planted=planted)


def _agreed(name: str, module: nn.Module, preprocess: Preprocess | None, asked: Size | None) -> Pair:
    """The size at which photos arrive, else what was asked for or configured; a warning if they disagree."""
    arriving, configured = size_of_photos(preprocess), native_size(module)
    said, source = (configured, "its configuration says") if asked is None else (pair(asked), "asked for is")
    if arriving and said and arriving != said:
        gives = f"its preprocessing gives {written(arriving)}, which is used"
        warn_about(name, f"{source} {written(said)} pixels, and {gives}.")
    return arriving or said or FALLBACK


def warn_about(name: str, what: str) -> None:
    """A ModelWarning that names the model."""
    warnings.warn(f"{name}: {what}", ModelWarning, stacklevel=4)
