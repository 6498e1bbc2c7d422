"""Patch features that stop being local: they come to resemble far patches as much as their neighbours.

    report = diagnose(vit, photos)
    report.kind("locality").kept       # after its .layers

What Gram anchoring fights in DINOv3 (arXiv 2508.10104): the longer a model trains, the less a patch says of
its own place. Compare checkpoints with vitreg.diagnosis.emergence.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitreg.diagnosis.kinds.base import Context, Finding, Meter
from vitreg.models.backbone import Backbone
from vitreg.models.layout import TokenLayout

# What of its best locality a model must keep up to the last block. A DeiT-Ti keeps 74% (0.57 after block 2,
# 0.42 after the last), a ViT-Ti 76%; random models of 52 architectures on photos, where they have any, at
# least 57%.
COLLAPSED = 0.4
# A model whose best block has less has no locality to lose (random models on noise: below 0.06).
WORTH_LOSING = 0.15
# A collapse is one only if it stands out of chance by so many standard errors over images; of too few images
# even these are not known.
STANDARD_ERRORS, FEWEST_IMAGES = 3.0, 8
# Images whose neighbouring patches are no more alike than far ones (noise, one colour) cannot tell: their
# patch embedding has a locality of -0.001 to 0.02, that of photos 0.14 or more.
LOCAL_IMAGES = 0.05

SAME = 1e-5  # patches whose far cosine is nearer to 1 than this are the same, up to rounding
LAYERS = 6  # at most, spread over the depth
CELLS = 16  # spread over the grid, each read with two neighbours


@dataclass(frozen=True)
class Locality(Finding):
    """How much more a patch resembles its grid neighbours than far patches, after each of some `layers`.

    `near` and `far` are mean cosines to the cells beside, and to cells at least half the shorter side of the
    grid away; `locality` is their difference, `kept` what it is of the most that it could be,
    (near - far) / (1 - far): patches that all share one large component lose no locality by it. `images` is
    `kept` of the patch embedding, before any block (None: it cannot be watched). `collapsed` (None: these
    images cannot tell) is the last block's `kept` over that of the best block before it.
    """

    kind: ClassVar[str] = "locality"
    title: ClassVar[str] = "Patch features that are no longer local"
    layers: tuple[int, ...]
    near: tuple[float, ...]
    far: tuple[float, ...]
    locality: tuple[float, ...]
    kept: tuple[float, ...]
    images: float | None
    collapsed: float | None

    def __str__(self) -> str:
        best = max(range(len(self.kept) - 1), key=self.kept.__getitem__)
        if self.collapsed is None:
            return (
                "these images are too few, or they or this model have too little locality, to tell whether it"
                " is lost."
            )
        figures = (
            f"after the last block a patch resembles its neighbours with a cosine of {self.near[-1]:.2f} and"
            f" far patches with {self.far[-1]:.2f}; after block {self.layers[best]} it is"
            f" {self.near[best]:.2f} and {self.far[best]:.2f}"
        )
        if not self.present:
            return f"{figures}: {self.collapsed:.0%} of the locality is kept (lost below {COLLAPSED:.0%})."
        return (
            f"{figures}. Only {self.collapsed:.0%} of the locality is left: read dense features from block"
            f" {self.layers[best]}, or from an earlier checkpoint."
        )


class LocalityMeter(Meter):
    """Sums of cosines between some patches and their neighbours, and far ones, after some blocks."""

    def __init__(self, vit: Backbone, layout: TokenLayout) -> None:
        super().__init__(vit, layout)
        self._pairs = Pairs.spread(layout.grid, vit.device)
        depth = vit.anatomy.depth
        self.layers = tuple(sorted({max(depth * (i + 1) // LAYERS - 1, 0) for i in range(LAYERS)}))
        self.cosines = self.zeros(len(self.layers), 3)  # of near, of far, and their difference squared
        self.embedded = self.zeros(3)

    def embedding(self, patches: Float[Tensor, "b p d"]) -> None:
        chosen = patches[:, self._pairs.cells].float()
        self.embedded += self._pairs.cosines(chosen, chosen.norm(dim=-1))

    def block(self, layer: int, residual: Float[Tensor, "b n d"], norms: Float[Tensor, "b n"]) -> None:
        if layer not in self.layers:
            return
        tokens = self._pairs.cells + self.layout.patch_slice.start
        self.cosines[self.layers.index(layer)] += self._pairs.cosines(
            residual[:, tokens].float(), norms[:, tokens]
        )

    def finding(self, context: Context) -> Locality:
        near, far, _ = (self.cosines / context.images).T.tolist()
        kept, errors = zip(*(_kept(sums.tolist(), context.images) for sums in self.cosines), strict=True)
        images = _kept(self.embedded.tolist(), context.images)[0] if self.embedded.any() else None
        best = max(range(len(kept) - 1), key=kept.__getitem__)
        known = (
            context.images >= FEWEST_IMAGES
            and kept[best] >= WORTH_LOSING
            and (images is None or images >= LOCAL_IMAGES)
        )
        error = math.hypot(errors[-1], COLLAPSED * errors[best])
        return Locality(
            present=known and COLLAPSED * kept[best] - kept[-1] > STANDARD_ERRORS * error,
            layer=self.layers[-1],
            layers=self.layers,
            positions=None,
            near=tuple(near),
            far=tuple(far),
            locality=tuple(a - b for a, b in zip(near, far, strict=True)),
            kept=kept,
            images=images,
            collapsed=max(kept[-1], 0.0) / kept[best] if known else None,
        )


def _kept(sums: list[float], images: int) -> tuple[float, float]:
    """(near - far) / (1 - far), and its standard error; 0 where all patches are the same but for rounding."""
    near, far, squares = (x / images for x in sums)
    if 1 - far <= SAME:
        return 0.0, 0.0
    deviation = max(squares - (near - far) ** 2, 0.0) ** 0.5
    return (near - far) / (1 - far), deviation / images**0.5 / (1 - far)


@dataclass(frozen=True)
class Pairs:
    """Some grid cells (row-major numbers), and weights over pairs of them that give a mean cosine each.

    `near` are pairs side by side, `far` those at least half the shorter side of the grid apart (and never
    side by side).
    """

    cells: Int[Tensor, " c"]
    weights: Float[Tensor, "2 c c"]

    @staticmethod
    def spread(grid: tuple[int, int], device: torch.device) -> "Pairs":
        rows, columns = grid
        spread = ((torch.arange(CELLS) + 0.5) * rows * columns / CELLS).long()
        right = spread[spread % columns < columns - 1] + 1
        below = spread[spread < (rows - 1) * columns] + columns
        cells = torch.cat([spread, right, below]).unique()
        row, column = cells // columns, cells % columns
        down, across = (row - row[:, None]).abs(), (column - column[:, None]).abs()
        far = torch.maximum(down, across) >= max(min(grid) // 2, 2)
        both = torch.stack([down + across == 1, far]).float()
        return Pairs(cells.to(device), (both / both.sum((1, 2), keepdim=True).clamp(min=1)).to(device))

    def cosines(self, x: Float[Tensor, "b c d"], norms: Float[Tensor, "b c"]) -> Float[Tensor, " 3"]:
        """Mean cosines of near and of far pairs, and the square of their difference, summed over images."""
        unit = x / norms.clamp(min=1e-12)[..., None]
        gram = unit @ unit.transpose(1, 2)
        near, far = (self.weights.flatten(1) @ gram.flatten(1).T).double()
        return torch.stack([near.sum(), far.sum(), (near - far).square().sum()])
