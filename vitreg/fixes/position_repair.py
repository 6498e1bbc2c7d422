"""Position repair: an outlying row of the position table, brought back to what its neighbours say.

    fix = PositionRepair.calibrate(vit)
    with fix.applied_to(vit):
        vit(images)

Some models (SigLIP is one) add position embeddings of which a few are many times as long as the rest: these
patches are outliers before any block has run, and no neuron is to blame. The table is added to the patch
embedding, so (repaired - original) added there is the same as a repaired table. No weight changes.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vitreg.data.batches import Batch
from vitreg.data.first_images import first_images
from vitreg.errors import FixError, UnsupportedModelError
from vitreg.fixes.base import Applied, Fix, applied, same_values
from vitreg.fixes.neighbours import grid_distances, nearest_clean
from vitreg.fixes.neurons import RegisterNeurons
from vitreg.hooks.block_edit import BlockEdit, Inner
from vitreg.hooks.carry import CarriedTokens
from vitreg.models.backbone import Backbone
from vitreg.models.fingerprint import Fingerprint
from vitreg.models.layout import TokenLayout
from vitreg.models.positions import added_positions, form_of_patches

# A row stands out if it is twice as long as the median row, and eight robust standard deviations of the
# logarithms of the lengths beyond it.
RATIO, DEVIATIONS = 2.0, 8.0
# A value of a row stands out by so many robust standard deviations of the clean rows' values.
VALUE_DEVIATIONS = 5.0
# The rest of a row is as long as clean rows are if it is no longer than this times the longest of them.
ROOM = 1.2
# Rows of the model at hand are those of the fix to so large a share of the longest: bfloat16 rounds.
SAME = 0.02


@dataclass(frozen=True, eq=False)
class PositionRepair(Fix):
    """Other position embeddings for some patches.

    grid      (rows, columns) of patches that the table is added to: calibrate again for another
    patches   the numbers of the repaired ones, row by row from the top left
    before    their positions (k, d) as the model adds them
    after     ... and as they should be

    In half precision patch and position are rounded at the outlier's size before it is repaired.
    """

    type: ClassVar[str] = "positions"
    does_not_cure: ClassVar[str] = (
        "outliers that later blocks make by themselves, and whatever the model learned to do with the"
        " outlying positions: it is left without them."
    )
    grid: tuple[int, int]
    patches: tuple[int, ...]
    before: Tensor = field(repr=False)
    after: Tensor = field(repr=False)

    @classmethod
    def calibrate(
        cls,
        vit: Backbone,
        images: Iterable[Batch] | Iterable[Tensor] | None = None,
        *,
        patches: Iterable[int] | None = None,
    ) -> "PositionRepair":
        """Repair the positions that stand out, or those of `patches` (numbers, row by row).

        Of `images` only the size matters, which without them is the model's own: the table is read off the
        model by noise. Raises UnsupportedModelError for a model that adds no table, FixError where no
        position stands out, ValueError for patches that there are not.
        """
        if any(handle.fix.type == cls.type for handle in applied(vit.model)):
            raise FixError("positions of this model are repaired already. Undo that fix first.")
        size = vit.image_size if images is None else tuple(first_images(images, 1).shape[-2:])
        layout = vit.anatomy.layout((size[0], size[1]))
        table = added_positions(vit, layout).table.detach()
        outlying = outlying_rows(table) if patches is None else _named(patches, layout)
        if not outlying.any():
            norms = table.norm(dim=1)
            raise FixError(
                f"no position stands out: the longest embedding is {norms.max() / norms.median():.1f}x the"
                f" median, and an outlying one is at least {RATIO:g}x, far from the others' spread. Name"
                " `patches` to repair others, or look for another cause."
            )
        return cls(
            RegisterNeurons((), fingerprint=Fingerprint.of(vit)),
            layout.grid,
            tuple(outlying.nonzero().flatten().tolist()),
            table[outlying],
            repaired_rows(table, outlying, layout.grid),
        )

    def __post_init__(self) -> None:
        super().__post_init__()
        count, places = len(self.patches), self.grid[0] * self.grid[1]
        shapes = {tuple(self.before.shape), tuple(self.after.shape)}
        inside = len(set(self.patches)) == count and all(0 <= patch < places for patch in self.patches)
        if self.neurons.chosen or not count or not inside or len(shapes) > 1 or len(self.before) != count:
            raise ValueError(
                f"found {count} patches of a grid of {self.grid} and positions of shape {shapes}: expected"
                " different patches of the grid, one row before and after for each, and no neurons. Use"
                " PositionRepair.calibrate(vit)."
            )

    def __eq__(self, other: object) -> bool:
        return same_values(self, other)

    def __hash__(self) -> int:
        return hash((self.neurons, self.grid, self.patches))

    def check(self, vit: Backbone) -> None:
        """As every fix; also raises FixError for another grid of patches."""
        super().check(vit)
        if vit.layout.grid != self.grid:
            _refuse_grid(self.grid, f"{vit.layout.grid[0]}x{vit.layout.grid[1]}")

    def placebo(self, vit: Backbone, seed: int = 0) -> "PositionRepair":
        """As many other positions, drawn at random, repaired as if they stood out."""
        others = [patch for patch in range(vit.layout.patches) if patch not in self.patches]
        order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed)).tolist()
        drawn = torch.tensor([others[i] for i in order[: len(self.patches)]]).sort().values
        table, repaired = (
            added_positions(vit).table.detach(),
            _named([*self.patches, *drawn.tolist()], vit.layout),
        )
        after = table.clone()
        after[repaired] = repaired_rows(table, repaired, self.grid)
        return PositionRepair(self.neurons, self.grid, tuple(drawn.tolist()), table[drawn], after[drawn])

    def edits(self, vit: Backbone) -> dict[int, BlockEdit]:
        """None that change a block: what it edits comes before them."""
        return {}

    def handle(self, vit: Backbone) -> Applied:
        return _AppliedRepair(self, vit)


class _AppliedRepair(Applied):
    """An edit of the module after which the table is added."""

    def __init__(self, fix: PositionRepair, vit: Backbone) -> None:
        repaired: CarriedTokens[bool] = CarriedTokens(by_stream=False)
        positions = added_positions(vit, vit.layout)
        super().__init__(fix, vit, {0: _Expect(repaired, positions.module)})
        rows = positions.table[list(fix.patches)]
        if (rows - fix.before).norm(dim=1).max() > SAME * fix.before.norm(dim=1).max():
            raise FixError(
                "the positions that the fix would repair are not those that it was made for: these weights"
                " are others, or repaired already. Calibrate with this model: PositionRepair.calibrate(vit)."
            )
        adding = vit.model.get_submodule(positions.module)
        self._edited.append((adding, _Add(fix, vit.layout, repaired)))


class _Add(BlockEdit):
    """The patch embedding with the correction of the positions already in it."""

    def __init__(self, fix: PositionRepair, layout: TokenLayout, repaired: CarriedTokens[bool]) -> None:
        self.layout, self.repaired = layout, repaired
        self.correction = torch.zeros(layout.patches, fix.before.shape[1])
        self.correction[list(fix.patches)] = fix.after - fix.before

    def run(self, block: nn.Module, inner: Inner, x: Tensor, args: Any, kwargs: Any) -> Tensor:
        y = inner(x, args, kwargs)
        form = form_of_patches(y, self.layout, self.correction.shape[1])
        if form is None:
            _refuse_grid(self.layout.grid, f"patch embeddings of shape {tuple(y.shape)}")
        correction = self.correction.to(y)
        self.repaired.leave(-1, True)
        if form == "map":
            return y + correction.T.unflatten(1, self.layout.grid)
        if form == "cells":
            return y + correction.unflatten(0, self.layout.grid)
        return y + F.pad(correction, (0, 0, y.shape[1] - self.layout.patches, 0))


class _Expect(BlockEdit):
    """Block 0 as it is, where the positions of this pass have been repaired."""

    def __init__(self, repaired: CarriedTokens[bool], module: str) -> None:
        self.repaired, self.module = repaired, module

    def run(self, block: nn.Module, inner: Inner, x: Tensor, args: Any, kwargs: Any) -> Tensor:
        if not self.repaired.take(0, x):
            raise UnsupportedModelError(
                f"block 0 runs without the module {self.module!r}, whose positions were repaired: it was"
                " replaced or wrapped after the fix was applied, or the block is called on its own. Undo the"
                " fix, and apply it again."
            )
        return inner(x, args, kwargs)


def _refuse_grid(grid: tuple[int, int], found: str) -> None:
    raise FixError(
        f"the positions were repaired for a grid of {grid[0]}x{grid[1]} patches, and found {found}. The model"
        " adds other positions there: calibrate again with vitreg.wrap(model, image_size=...) and images of"
        " that size."
    )


def _named(patches: Iterable[int], layout: TokenLayout) -> Bool[Tensor, " p"]:
    """The named patches as a mask. Raises ValueError for what is none, or leaves no neighbour."""
    numbers = sorted(set(patches))
    if not numbers or not 0 <= numbers[0] <= numbers[-1] < layout.patches or len(numbers) == layout.patches:
        raise ValueError(
            f"patches {numbers[:5]}: expected one or more of 0 to {layout.patches - 1}, but not all of them."
        )
    mask = torch.zeros(layout.patches, dtype=torch.bool)
    mask[numbers] = True
    return mask


# -- what is outlying, and what it should be -------------------------------------------------------


def outlying_rows(table: Float[Tensor, "p d"]) -> Bool[Tensor, " p"]:
    """The rows whose norm is twice the median or more, and 8 robust deviations (of logarithms) beyond it."""
    logs = table.norm(dim=1).clamp(min=1e-12).log()
    beyond = logs - logs.median()
    spread = _robust_deviation(beyond)
    return (beyond >= torch.tensor(RATIO).log()) & (beyond >= DEVIATIONS * spread)


def repaired_rows(
    table: Float[Tensor, "p d"], outlying: Bool[Tensor, " p"], grid: tuple[int, int]
) -> Float[Tensor, "k d"]:
    """The outlying rows as they should be: as much of each is kept as can be told from the excess.

    - An excess in a few dimensions: the row, with its nearest clean neighbours' mean in these, if in the
      others it is as long as clean rows are.
    - Else a row that is too long, but points where its neighbours do: scaled to their length.
    - Else, and for a row that is no longer than clean ones (what is wrong with it only its caller knows):
      its neighbours' mean.
    """
    distances, clean, rows = grid_distances(grid), table[~outlying], table[outlying]
    means, lengths = (nearest_clean(x[None], outlying[None], distances)[0] for x in (table, _lengths(table)))
    middle = clean.median(0).values
    excess = (rows - middle).abs() > VALUE_DEVIATIONS * _robust_deviation(clean - middle)
    fits = _sparse(excess) & (_lengths(rows * ~excess) <= ROOM * _longest(clean, ~excess))
    mended = torch.where(excess, means[outlying], rows)
    scaled = rows * lengths[outlying] / _lengths(rows)
    likeness = F.cosine_similarity(table, means, dim=1)
    aligned = (likeness[outlying] >= _lowest(likeness[~outlying]))[:, None]
    too_long = _lengths(rows) > _lengths(clean).max()
    kept = torch.where(fits, mended, torch.where(aligned, scaled, means[outlying]))
    return torch.where(too_long, kept, means[outlying])


def _lowest(usual: Float[Tensor, " c"]) -> Float[Tensor, ""]:
    """What is still usual; anything, where clean rows are not like their neighbours either."""
    middle = usual.median()
    return torch.minimum(usual.min(), middle - 3 * _robust_deviation(usual - middle))


def _sparse(excess: Bool[Tensor, "k d"]) -> Bool[Tensor, "k 1"]:
    return excess.float().mean(1, keepdim=True) < 0.5


def _longest(clean: Float[Tensor, "c d"], dimensions: Bool[Tensor, "k d"]) -> Float[Tensor, "k 1"]:
    """The largest norm of a clean row over the dimensions of each outlying one."""
    return (dimensions.float() @ clean.square().T).amax(1, keepdim=True).sqrt()


def _lengths(rows: Float[Tensor, "p d"]) -> Float[Tensor, "p 1"]:
    return rows.norm(dim=1, keepdim=True)


def _robust_deviation(x: Float[Tensor, "p *d"]) -> Float[Tensor, "*d"]:
    """The standard deviation of a normal distribution with the same median distance from 0."""
    return 1.4826 * x.abs().median(0).values
