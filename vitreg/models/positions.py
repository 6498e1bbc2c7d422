"""The positions that a model adds to its patches, found by what they do.

    added_positions(vit).table                         # (p, d): what each patch gets
    table, reads = position_parameter(vit, [0, 27])    # the weights that hold it
    table.reshape(-1, vit.anatomy.width)[reads.argmax(1)]    # the rows of patches 0 and 27

No name is asked for. Whatever happens between two places before block 0, patches leave the later one as they
left the earlier one, plus the same for every image: that difference is the table. It is found wherever the
model keeps it, resampled or computed, and with norms before and after. (To look for a parameter that moves
what enters block 0 alike in every image finds none behind which a norm follows, CLIP's for one, and none that
is computed.) Which weights hold it is then a matter of its gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitreg.errors import UnsupportedModelError
from vitreg.hooks.hooked import hooked
from vitreg.models.backbone import Backbone
from vitreg.models.layout import TokenLayout
from vitreg.models.probe import evaluating, first_tensor

# Two patches that share this much of what they read (cosine) are not told apart by their position.
SHARED = 0.5


@dataclass(frozen=True)
class AddedPositions:
    """The position embeddings (p, d) that a model adds to its patches, and after which module (its path)."""

    module: str
    table: Float[Tensor, "p d"]


class PositionTable(NamedTuple):
    """A parameter of learned positions: the module that has it, under which name, and how many of its rows
    (..., t, d) are those of other tokens, before those of the patches."""

    owner: nn.Module
    name: str
    others: int

    @property
    def weight(self) -> nn.Parameter:
        found = getattr(self.owner, self.name)
        assert isinstance(found, nn.Parameter)
        return found


def position_table(vit: Backbone) -> PositionTable | None:
    """The learned positions of the patches, with or without those of prefix and registers; None without any.

    By name ("pos") and shape, for those who change or resample them. What the model adds, whatever it is
    called and wherever it is kept, `added_positions` finds.
    """
    layout, width = vit.layout, vit.anatomy.width
    for path, owner in vit.model.named_modules():
        for name, value in owner.named_parameters(recurse=False):
            if "pos" in f"{path}.{name}" and value.dim() in (2, 3) and value.shape[-1] == width:
                others = value.shape[-2] - layout.patches
                if 0 <= others <= layout.prefix + layout.registers:
                    return PositionTable(owner, name, others)
    return None


def added_positions(vit: Backbone, layout: TokenLayout | None = None) -> AddedPositions:
    """What is added to the patches of every image alike, in float32, wherever the model keeps it.

    Of all modules that run before block 0, the first whose output differs from what a later one (or block 0)
    is given by the same for every image, and not by the same for every patch. `layout` is that of the
    images' size (default: the model's own). Raises UnsupportedModelError for a model without such a table.
    """
    layout = layout or vit.layout
    outputs, inputs = _before_blocks(vit, layout)
    for order, module, output in outputs:
        for later, given in inputs:
            if later > order and (table := _constant_difference(output, given)) is not None:
                return AddedPositions(module, table)
    raise UnsupportedModelError(
        f"{type(vit.model).__name__} adds no table of positions to its patches: nothing that enters a module"
        " up to block 0 differs from an earlier output by the same for every image. Its positions are rotary"
        " or relative, say, or mixed with the patches otherwise: it has no table whose rows stand out."
    )


def position_parameter(vit: Backbone, patches: Sequence[int]) -> tuple[nn.Parameter, Float[Tensor, "k r"]]:
    """The weights of the table (their last axis is the width), and how much of each of their r rows each of k
    patches reads. `patches` are row-major numbers in the grid.

    A table that the model resamples to the grid is read in several rows. Raises UnsupportedModelError for a
    model that adds no table, or computes it.
    """
    tables = _possible(vit)
    frozen = [table for table in tables if not table.requires_grad]
    for table in frozen:
        table.requires_grad_(True)
    try:
        with torch.enable_grad():
            added = added_positions(vit).table
            for table in tables:
                reads = [_read(added, patch, table) for patch in (0, -1, *patches)]
                if float(F.cosine_similarity(reads[0], reads[1], dim=0)) < SHARED and reads[0].any():
                    return table, torch.stack(reads[2:])
    finally:
        for table in frozen:
            table.requires_grad_(False)
    raise UnsupportedModelError(
        f"{vit.name} computes the positions that it adds to its patches: no weights of the model's width hold"
        " them."
    )


def _possible(vit: Backbone) -> list[nn.Parameter]:
    """What is outside of the blocks, and as wide as a token."""
    stack = vit.model.get_submodule(vit.anatomy.blocks)
    inside = {id(weight) for weight in stack.parameters()}
    outside = [weight for weight in vit.model.parameters() if id(weight) not in inside]
    return [weight for weight in outside if weight.dim() > 1 and weight.shape[-1] == vit.anatomy.width]


def _read(added: Float[Tensor, "p d"], patch: int, table: nn.Parameter) -> Float[Tensor, " r"]:
    """How much of each row of the table a patch reads.

    For a probe v, the gradient of v @ patch with respect to a row that it reads f times is f v.
    """
    probe = torch.randn(table.shape[-1], generator=torch.Generator().manual_seed(0))
    gradient = torch.autograd.grad(added[patch] @ probe, table, retain_graph=True, allow_unused=True)[0]
    if gradient is None:
        gradient = torch.zeros_like(table)
    return gradient.reshape(-1, table.shape[-1]).float().norm(dim=1) / probe.norm()


Seen = tuple[int, str, Float[Tensor, "b p d"]]


def _before_blocks(
    vit: Backbone, layout: TokenLayout
) -> tuple[list[Seen], list[tuple[int, Float[Tensor, "b p d"]]]]:
    """The patches in what modules give and are given up to block 0, in order, for noise and a blank image."""
    outputs: list[Seen] = []
    inputs: list[tuple[int, Tensor]] = []
    first, width = vit.anatomy.block_modules(vit.model)[0], vit.anatomy.width
    entered: list[nn.Module] = []
    probes = _probes(vit, layout)

    def patches(tensor: Tensor | None) -> Tensor | None:
        if (
            first in entered or tensor is None or tensor.shape[:1] != probes.shape[:1]
        ):  # what is the same for all images, say
            return None
        return _patches(tensor, layout, width)

    def enters(module: nn.Module, args: Any, kwargs: Any) -> None:
        of_call = (
            vit.anatomy.stream.of_call(args, kwargs) if module is first else first_tensor((args, kwargs))
        )
        if (given := patches(of_call)) is not None:
            inputs.append((len(outputs), given))
        entered.append(module)

    def leaves(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if (left := patches(first_tensor(output))) is not None:
                outputs.append((len(outputs), name, left))

        return hook

    hooks: list[Any] = []
    gradients = torch.is_grad_enabled()
    with evaluating(vit.model), torch.set_grad_enabled(gradients):
        for name, module in vit.model.named_modules():
            hooks.append(module.register_forward_pre_hook(enters, with_kwargs=True))
            hooks.append(module.register_forward_hook(leaves(name)))
        with hooked(hooks):
            vit(probes)
    return outputs, inputs


def _probes(vit: Backbone, layout: TokenLayout) -> Float[Tensor, "b 3 h w"]:
    """Two noise images and a blank one."""
    size = vit.anatomy.pixels(layout.grid)
    noise = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return torch.cat([noise, torch.zeros(1, 3, *size)]).to(vit.device, vit.dtype)


def form_of_patches(x: Tensor, layout: TokenLayout, width: int) -> str | None:
    """How a tensor holds all patches: "map" (b, d, gh, gw), "cells" (b, gh, gw, d), "tokens" (b, n, d)."""
    shape = tuple(x.shape[1:])
    if shape in ((layout.patches, width), (layout.tokens, width)):
        return "tokens"
    return "map" if shape == (width, *layout.grid) else "cells" if shape == (*layout.grid, width) else None


def _patches(x: Tensor, layout: TokenLayout, width: int) -> Float[Tensor, "b p d"] | None:
    """The patches in a tensor of any of these forms, which come last among tokens."""
    form = form_of_patches(x, layout, width)
    if form is None:
        return None
    tokens = x.flatten(2).mT if form == "map" else x.flatten(1, -2)
    return tokens[:, -layout.patches :].clone()  # for some models add positions in place


def _constant_difference(
    before: Float[Tensor, "b p d"], after: Float[Tensor, "b p d"]
) -> Float[Tensor, "p d"] | None:
    """after - before, if it is the same for each image up to rounding, and not the same for each patch."""
    rounding = 4 * torch.finfo(before.dtype).eps * (before.abs() + after.abs()).amax(0).float()
    difference = after.float() - before.float()
    mean = difference.mean(0)
    if ((difference - mean).abs() > rounding).any() or not ((mean - mean[:1]).abs() > 2 * rounding).any():
        return None
    return mean.cpu()
