"""Shift average: patch features combined over shifted and flipped views. No neurons, no training.

    with ShiftAverage().applied_to(vit):
        features = vit.model.forward_features(batch)     # however dense features are read

An artifact sits on other content in each view, so the median over views is free of it. This is the
model-agnostic reference that other fixes are compared with: it costs a forward pass per view. Only the
patches after the last block are combined; CLS and registers are those of the image itself.
"""

import copy
import threading
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitreg.errors import UnsupportedModelError
from vitreg.fixes.base import Applied, Fix, first_patch
from vitreg.fixes.neurons import RegisterNeurons
from vitreg.hooks.block_edit import BlockEdit, Inner, install
from vitreg.hooks.carry import CarriedTokens
from vitreg.hooks.hooked import hooked
from vitreg.hooks.torch_internals import forget_output_hooks, is_replica
from vitreg.models.backbone import Backbone
from vitreg.models.probe import evaluating, first_tensor

Shift = tuple[int, int, bool]  # rows, columns, and whether the shifted image is flipped


@dataclass(frozen=True)
class ShiftAverage(Fix):
    """The patches of the last block, combined over views of the image.

    views     how many shifted copies are run beside the image itself
    reach     the largest shift, in patches, each way
    reduce    "median" over views, per channel: an artifact is in the minority and leaves no trace;
              "mean": each view's artifacts are spread over more places
    flip      whether every other view is also mirrored, left to right
    seed      of the order in which shifts are drawn

    What is shifted out on one side comes in on the other and counts like the rest: left out, patches at the
    border would have too few views to outvote an artifact.
    """

    type: ClassVar[str] = "shift-average"
    does_not_cure: ClassVar[str] = (
        "anything before the end of the last block: attention, CLS and the outliers themselves stay; and what"
        " sits at the same place in every view is in their median."
    )
    neurons: RegisterNeurons = field(default_factory=lambda: RegisterNeurons.of({}), repr=False)
    views: int = 8
    reach: int = 2
    reduce: Literal["median", "mean"] = "median"
    flip: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        most = (2 * self.reach + 1) ** 2 - 1
        if not 1 <= self.views <= most:
            raise ValueError(
                f"views={self.views}: expected 1 to {most}, the number of shifts by up to {self.reach}"
                " patches. Raise `reach` for more."
            )

    def shifts(self) -> list[Shift]:
        """The views: shifts in patches (down, right), none twice, and whether flipped."""
        side = range(-self.reach, self.reach + 1)
        every = [(down, right) for down in side for right in side if (down, right) != (0, 0)]
        order = torch.randperm(len(every), generator=torch.Generator().manual_seed(self.seed))
        chosen = [every[i] for i in order[: self.views].tolist()]
        return [(down, right, self.flip and view % 2 == 0) for view, (down, right) in enumerate(chosen)]

    def handle(self, vit: Backbone) -> Applied:
        """Raises UnsupportedModelError for a model that is not given (b, 3, h, w) images, or has no copy."""
        return _AppliedShifts(self, vit)

    def edits(self, vit: Backbone) -> dict[int, BlockEdit]:
        return _AppliedShifts(self, vit).edits


class _AppliedShifts(Applied):
    """An edit where images enter, which runs the views, and one of the last block, which combines them."""

    def __init__(self, fix: ShiftAverage, vit: Backbone) -> None:
        last = vit.anatomy.depth - 1
        # The views' patches (v, b, p, d), from the entrance to the last block.
        carry: CarriedTokens[Tensor] = CarriedTokens(by_stream=False)
        super().__init__(fix, vit, {last: _Combine(carry, last, first_patch(vit, last), fix.reduce)})
        self._edited.append((_entrance(vit), _RunViews(carry, vit, fix.shifts())))


def _entrance(vit: Backbone) -> nn.Module:
    """The innermost module that is handed the images: every way to run the model passes there."""
    generator = torch.Generator().manual_seed(0)  # a fix leaves the program's random numbers alone
    images = torch.rand(1, 3, *vit.image_size, generator=generator).to(vit.device, vit.dtype)
    seen: list[nn.Module] = []

    def enters(module: nn.Module, args: Any, kwargs: Any) -> None:
        given = first_tensor((args, kwargs))
        if given is not None and given.shape == images.shape and torch.equal(given, images):
            seen.append(module)

    inner = [module for module in vit.model.modules() if module is not vit.model]
    hooks = [module.register_forward_pre_hook(enters, with_kwargs=True) for module in inner]
    with hooked(hooks), evaluating(vit.model):
        vit(images)
    if not seen:
        raise UnsupportedModelError(
            f"no part of {type(vit.model).__name__} takes (b, 3, h, w) images: it is given patches, or"
            " changes the images itself. Shifted views of them cannot be made."
        )
    return seen[-1]


class _RunViews(BlockEdit):
    """At the entrance: the views of the images through the whole model, one after the other."""

    def __init__(self, carry: CarriedTokens[Tensor], vit: Backbone, shifts: list[Shift]) -> None:
        self.carry, self.twin, self.shifts = carry, _Twin(vit), shifts
        self.last = vit.anatomy.depth - 1
        self.patch_size, self.padding = vit.anatomy.patch_size, vit.anatomy.padding

    def run(self, block: nn.Module, inner: Inner, x: Tensor, args: Any, kwargs: Any) -> Tensor:
        if is_replica(block):
            raise UnsupportedModelError(
                "nn.DataParallel replicates the model, and the views would run on the original. Apply"
                " ShiftAverage to a model of each process (DistributedDataParallel)."
            )
        # Before the module runs, for all blocks may be in it.
        self.carry.leave(self.last - 1, torch.stack([self._view(x, shift) for shift in self.shifts]))
        return inner(x, args, kwargs)

    def _view(self, images: Float[Tensor, "b 3 h w"], shift: Shift) -> Float[Tensor, "b p d"]:
        """The patches of one view, each back at the place of its content."""
        down, right, flipped = shift
        (height, width), (below, beside) = self.patch_size, self.padding
        grid = ((images.shape[2] + below) // height, (images.shape[3] + beside) // width)  # Anatomy.layout
        covered = (grid[0] * height, grid[1] * width)
        view = _fitted(images, covered)  # what lies beyond the patches must not come in on the other side
        view = view.roll((down * height, right * width), (2, 3))
        view = view.flip(3) if flipped else view
        view = _fitted(view, (max(covered[0], images.shape[2]), max(covered[1], images.shape[3])))
        patches = self.twin.patches(view).unflatten(1, grid)
        patches = patches.flip(2) if flipped else patches
        return patches.roll((-down, -right), (1, 2)).flatten(1, 2)


def _fitted(images: Float[Tensor, "b 3 _ _"], size: tuple[int, int]) -> Float[Tensor, "b 3 h w"]:
    """Cut or padded with zeros, at the right and the bottom, to (height, width)."""
    return F.pad(images, (0, size[1] - images.shape[3], 0, size[0] - images.shape[2]))


class _Combine(BlockEdit):
    """After the last block: its patches and the views', one value per channel."""

    def __init__(self, carry: CarriedTokens[Tensor], last: int, start: int, reduce: str) -> None:
        self.carry, self.last, self.start, self.reduce = carry, last, start, reduce

    def run(self, block: nn.Module, inner: Inner, x: Tensor, args: Any, kwargs: Any) -> Tensor:
        views = self.carry.take(self.last, x)
        y = inner(x, args, kwargs)
        if views is None:
            raise UnsupportedModelError(
                "the last block runs without images having entered the model where they did when ShiftAverage"
                " was applied: the module there was replaced since, or the block is called on its own. Undo"
                " the fix, and apply it again."
            )
        every = torch.cat([y[None, :, self.start :], views])
        patches = every.mean(0) if self.reduce == "mean" else _median(every)
        return torch.cat([y[:, : self.start], patches], 1)


def _median(x: Float[Tensor, "v b p d"]) -> Float[Tensor, "b p d"]:
    """The median, of an even number the mean of the middle two (torch.median takes the lower)."""
    ordered = x.sort(0).values
    return (ordered[(len(x) - 1) // 2] + ordered[len(x) // 2]) / 2


class _Twin:
    """The model as it was when the fix was applied, with the same weights and without anybody's hooks.

    The views run through it, so that those who watch the model see the image alone. What replaces or wraps
    parts of the model later does not reach it, and is refused.
    """

    def __init__(self, vit: Backbone) -> None:
        if any(p.device.type == "meta" for p in vit.model.parameters()):
            raise UnsupportedModelError(
                "weights of the model are offloaded, and ShiftAverage runs the views through a second copy of"
                " it. Load the model as a whole, or apply another fix."
            )
        self._original = _Original(vit.model)
        # Modules are copied; the dictionaries of their weights are shared, wherever these move.
        shared = {id(kept): kept for m in vit.model.modules() for kept in (m._parameters, m._buffers)}
        try:
            model = copy.deepcopy(vit.model, shared).eval()
        except Exception as error:  # what each library says of a copy that it cannot make
            raise UnsupportedModelError(
                f"ShiftAverage runs the views through a copy of the model, and {type(vit.model).__name__} has"
                f" none (it is sharded, say): {error}. Apply another fix."
            ) from error
        forget_output_hooks(model)
        last = vit.anatomy.depth - 1
        twin = vit.with_model(model, vit.name)
        self._forward = twin if vit.anatomy.head_error else twin.forward or model
        self._seen = _Seen(first_patch(vit, last))
        self._seen.stream = vit.anatomy.stream
        install(vit.anatomy.block_modules(model)[last], self._seen)

    def patches(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b p d"]:
        """The patches after the last block."""
        if not torch.compiler.is_compiling():
            self._original.check()
        self._forward(images)
        return self._seen.take()


class _Original:
    """The model that the twin is a copy of, and what its modules were then."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parts: list[tuple[Any, ...]] | None = _parts(model)

    def check(self) -> None:
        """Raises UnsupportedModelError if modules were replaced or wrapped since."""
        parts = _parts(self.model)
        if self.parts is None:
            self.parts = parts
        if self.parts != parts:
            raise UnsupportedModelError(
                "parts of the model were replaced or wrapped after ShiftAverage was applied (adapters,"
                " quantisation, sharding), and its views would run without that. Undo it, and apply it last."
            )

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "parts": None}  # the modules of a copy are others


def _parts(model: nn.Module) -> list[tuple[Any, ...]]:
    """Each module, the name of its class (ours keep the name), its weights' names, a `forward` of its own."""
    return [
        (id(module), type(module).__name__, *module._parameters, module.__dict__.get("forward"))
        for module in model.modules()
    ]


class _Seen(BlockEdit):
    """Keeps the patches after a block, for the thread that ran it."""

    def __init__(self, start: int) -> None:
        self.start, self._kept = start, _Kept()

    def run(self, block: nn.Module, inner: Inner, x: Tensor, args: Any, kwargs: Any) -> Tensor:
        y = inner(x, args, kwargs)
        self._kept.patches = y[:, self.start :]
        return y

    def take(self) -> Tensor:
        patches, self._kept.patches = self._kept.patches, None
        assert patches is not None, "the last block ran"
        return patches


class _Kept(threading.local):
    patches: Tensor | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _Kept, ()
