"""A model that was built for one image size, run on images of any whole number of patches.

anywhere = at_any_size(vit)
anywhere(torch.zeros(1, 3, 480, 336))

Positions are interpolated as the model's library does it (timm's switch, transformers' argument), or
bicubically where the model has learned ones and no such code (open_clip). The model changes only while it is
called, and not at all at its own size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitreg.errors import UnsupportedModelError
from vitreg.models.backbone import Backbone
from vitreg.models.positions import PositionTable, position_table
from vitreg.models.probe import evaluating
from vitreg.tracing.streams import watch

AttributeChange = tuple[nn.Module, str, Any]  # an attribute of a module, and what it is to be
Plan = Callable[[Tensor], Sequence[AttributeChange]]  # what to change for a batch of images


def at_any_size(vit: Backbone) -> Backbone:
    """The same backbone, taking (b, 3, h, w) images of any whole number of patches; not thread-safe.

    Checked by one forward pass on a larger, oblong image. At the model's own size the output is bit-identical
    to the plain model's. Raises UnsupportedModelError for a model that has no way to other sizes.
    """
    ways = [vit]
    for plan in (_switches(vit), _resampled_positions(vit)):
        if plan is not None:
            ways.append(replace(vit, forward=_Resized(vit, plan)))
    problems = []
    for way in ways:
        try:
            _try(way)
            return way
        except Exception as error:  # whatever a library raises for a size that it does not take
            problems.append(" ".join(str(error).split())[:200])
    raise UnsupportedModelError(
        f"{vit.name} takes images of {vit.image_size[0]}x{vit.image_size[1]} pixels only"
        f" ({'; '.join(dict.fromkeys(problems))})."
        " Squeeze photos to that size: --set resolution=model."
    )


def _try(vit: Backbone) -> None:
    (height, width), (rows, columns) = vit.image_size, vit.anatomy.patch_size
    images = torch.zeros(1, 3, height + rows, width + 3 * columns)
    with evaluating(vit.model), torch.no_grad(), watch(vit) as seen:
        vit(images)
    if seen.layout != vit.layout_for(images):
        raise UnsupportedModelError(f"found {seen.layout}, expected {vit.layout_for(images)}")


@dataclass(frozen=True)
class _Resized:
    """Runs a backbone with some of its attributes changed, where the image is not of its own size."""

    vit: Backbone
    plan: Plan

    def __call__(self, images: Float[Tensor, "b 3 h w"]) -> Any:
        own = tuple(images.shape[-2:]) == self.vit.image_size
        with _changed([] if own else self.plan(images)):
            return self.vit(images)


@contextmanager
def _changed(changes: Sequence[AttributeChange]) -> Iterator[None]:
    before = [(module, name, getattr(module, name)) for module, name, _ in changes]
    try:
        for module, name, value in changes:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def _switches(vit: Backbone) -> Plan | None:
    """timm's models have code for other sizes, switched on when they are built: here, for one call."""
    for module in vit.model.modules():
        embed = getattr(module, "patch_embed", None)
        if hasattr(module, "dynamic_img_size") and isinstance(embed, nn.Module):
            # They then expect the patches as a map (b, gh, gw, d).
            wanted: dict[str, Any] = {"strict_img_size": False, "flatten": False}
            if hasattr(embed, "output_fmt"):
                wanted["output_fmt"] = type(embed.output_fmt)("NHWC")
            changes = [(embed, name, value) for name, value in wanted.items() if hasattr(embed, name)]
            changes.append((module, "dynamic_img_size", True))
            return lambda images: changes
    return None


def _resampled_positions(vit: Backbone) -> Plan | None:
    table = position_table(vit)
    if table is None or isinstance(table.owner, nn.Embedding):  # its rows are asked for by fixed numbers
        return None
    return partial(_resample, vit, table)


def _resample(vit: Backbone, table: PositionTable, images: Tensor) -> list[AttributeChange]:
    positions = table.weight.detach()
    before, patches = positions[..., : table.others, :], positions[..., table.others :, :]
    planes = patches.reshape(1, *vit.layout.grid, -1).permute(0, 3, 1, 2).float()
    planes = F.interpolate(planes, vit.layout_for(images).grid, mode="bicubic", antialias=True)
    cells = planes.flatten(2).mT.reshape(*positions.shape[:-2], -1, positions.shape[-1])
    whole = torch.cat([before, cells.to(positions.dtype)], -2)
    return [(table.owner, table.name, nn.Parameter(whole, requires_grad=False))]
