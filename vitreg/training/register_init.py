"""Where added registers start: as the tokens that the model has used as scratch space so far.

Artifacts of many models are bound to positions (the corners, say). Registers that start as the mean token
there, and positions that start as those of their neighbours, move the sinks before any training.
"""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vitreg.diagnosis.diagnosing import diagnose
from vitreg.diagnosis.result import Diagnosis
from vitreg.models.backbone import Backbone
from vitreg.models.layout import TokenLayout
from vitreg.models.positions import position_table
from vitreg.models.probe import evaluating

# A position is bound if it is an outlier in so large a share of the photos.
OFTEN = 0.5


def initial_registers(vit: Backbone, images: list[Tensor], n: int) -> Float[Tensor, "n d"] | None:
    """Start values for `n` registers; smooths the positions of `vit` that are bound to outliers, in place.

    `images` are batches (b, 3, h, w). None, and the model stays as it is, where outliers are not bound to
    positions or the model has no table of positions.
    """
    report = diagnose(vit, images, examples=0)
    bound = bound_places(report)
    table = position_table(vit)
    if table is None or not bound.any():
        return None
    tokens = _entering(vit, images)[:, vit.layout.patch_slice].mean(0)  # (p, d)
    often = torch.tensor(report.position_frequency).flatten().masked_fill(~bound.flatten(), 0)
    order = often.argsort(descending=True)[: int(bound.sum())]
    registers = tokens[order[torch.arange(n) % len(order)]]
    with torch.no_grad():
        _smooth(table.weight, bound, vit.layout)
    return registers


def bound_places(report: Diagnosis) -> Bool[Tensor, "gh gw"]:
    """The positions where most images have an outlier."""
    return torch.tensor(report.position_frequency) >= OFTEN


def _smooth(table: nn.Parameter, bound: Bool[Tensor, "gh gw"], layout: TokenLayout) -> None:
    """Bound positions become the mean of their unbound neighbours, 8 around; twice, for thick clusters."""
    rows, columns = layout.grid
    patches = table.data.view(-1, table.shape[-1])[-layout.patches :]  # a view: patches come last
    grid = patches.view(rows, columns, -1)
    left = bound.clone()
    while left.any() and not left.all():
        before, known = grid.clone(), ~left
        for r, c in left.nonzero().tolist():
            around = (slice(max(r - 1, 0), r + 2), slice(max(c - 1, 0), c + 2))
            if known[around].any():
                grid[r, c] = before[around][known[around]].mean(0)
                left[r, c] = False


def _entering(vit: Backbone, images: Iterable[Tensor]) -> Float[Tensor, "b n d"]:
    """What enters block 0, of all images."""
    found: list[Tensor] = []

    def enters(module: nn.Module, args: Any, kwargs: Any) -> None:
        found.append(vit.anatomy.stream.of_call(args, kwargs).float())

    block = vit.anatomy.block_modules(vit.model)[0]
    with block.register_forward_pre_hook(enters, with_kwargs=True), evaluating(vit.model):
        for batch in images:
            vit(batch)
    return torch.cat(found)
