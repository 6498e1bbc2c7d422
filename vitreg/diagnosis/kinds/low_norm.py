"""Low-norm outliers: a second population of patches whose norms lie far below the others'.

    diagnosis = diagnose(vit, photos)
    low = diagnosis.kind("low-norm outliers")
    print(low)                       # how many, how far below, after which block

Bach et al. (2025) describe such artifacts. A second population lies below an almost empty range of norms, in
units of each photo's own median, so that photos of different contrast are not mistaken for two populations.
What is merely the lower tail of the bulk, however long, has no such range.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitreg.diagnosis.bins import LogBins
from vitreg.diagnosis.kinds.base import Context, Finding, Meter
from vitreg.diagnosis.populations import quantile
from vitreg.models.backbone import Backbone
from vitreg.models.layout import TokenLayout

# The range is at least GAP times wide and holds at most a tenth of what lies below it; the median there is
# at most LOW times the others'. In two real models no patch of 96 photos lies below 0.55 of its photo's
# median in any block, black bars and blank squares pasted in or not; random models have single patches at
# 0.4, below ranges 1.35x wide at most.
GAP, LEAK, LOW = 1.5, 0.1, 0.5
# A population is no handful of patches at the end of a tail, where a wide range is empty by chance. Norms
# evenly spread down to zero, the longest tail below that norms have, would put k * (gap - 1) patches into a
# range above k others. That so few are there has to have a probability below exp(-14), one in a million.
FEWEST, MAX_FRACTION, IMPROBABLE = 8, 0.25, 14.0
RELATIVE = LogBins(-8, 1)


@dataclass(frozen=True)
class LowNormFinding(Finding):
    """Patches with norms far below those of their photo, after block `layer`, where they stand apart most.

    `fraction` of all patches, `per_image` of each image's, lie below `threshold` times their photo's median
    norm; `ratio` is their median norm over the others', `gap` how many times wide the almost empty range
    around the threshold is. Without such a population fractions are 0 and threshold, ratio and gap None.
    `lowest` is the smallest norm after that block, in units of its photo's median (to 4%).
    """

    kind: ClassVar[str] = "low-norm outliers"
    title: ClassVar[str] = "Low-norm outliers"
    fraction: float
    per_image: float
    threshold: float | None
    ratio: float | None
    gap: float | None
    lowest: float

    def __str__(self) -> str:
        if not self.present:
            return (
                "no second population of patches has norms far below the others': the smallest norm is"
                f" {self.lowest:.2f} of its photo's median (block {self.layer})."
            )
        return (
            f"{self.fraction:.1%} of the patches ({self.per_image:.1f} per image) have norms {self.ratio:.2f}"
            f" times the others' after block {self.layer}, below an almost empty range {self.gap:.1f}x wide."
            " Whatever weighs patches by their norm, as means and inner products do, hardly sees them."
        )


class LowNorm(Meter):
    """A histogram of norms by layer and place, in units of each photo's median."""

    def __init__(self, vit: Backbone, layout: TokenLayout) -> None:
        super().__init__(vit, layout)
        self.positions = self.zeros(vit.anatomy.depth, layout.patches, RELATIVE.count, dtype=torch.int32)

    def block(self, layer: int, residual: Float[Tensor, "b n d"], norms: Float[Tensor, "b n"]) -> None:
        patches = norms[:, self.layout.patch_slice]
        bins = RELATIVE.index(patches / patches.median(1, keepdim=True).values)
        self.positions[layer].scatter_add_(1, bins.T, torch.ones_like(bins.T, dtype=torch.int32))

    def finding(self, context: Context) -> LowNormFinding:
        counts = self.positions.sum(1)
        lowest = [float(RELATIVE.edges[int(row.nonzero()[0])]) for row in counts]
        below = {layer: found for layer, row in enumerate(counts) if (found := _population_below(row))}
        if not below:
            layer = min(range(len(lowest)), key=lowest.__getitem__)
            return LowNormFinding(False, layer, None, 0.0, 0.0, None, None, None, lowest[layer])
        layer = max(below, key=lambda x: below[x].gap)
        population = below[layer]
        frequency = self.positions[layer][:, RELATIVE.below(population.threshold)].sum(1).double()
        per_image = float(frequency.sum()) / context.images
        return LowNormFinding(
            present=True,
            layer=layer,
            positions=self.layout.as_grid(frequency / context.images).tolist(),
            fraction=per_image / self.layout.patches,
            per_image=per_image,
            threshold=population.threshold,
            ratio=population.ratio,
            gap=population.gap,
            lowest=lowest[layer],
        )


class _Population(NamedTuple):
    """What lies below an almost empty range: its middle, its width, and the medians' ratio."""

    threshold: float
    gap: float
    ratio: float


def _population_below(counts: Int[Tensor, " bins"]) -> _Population | None:
    """The population below the widest almost empty range, if it is far enough from the others."""
    edges, total = RELATIVE.edges, int(counts.sum())
    below = torch.cat([counts.new_zeros(1), counts.cumsum(0)])  # patches below each edge
    between = below[None, :] - below[:, None]
    possible = (between >= 0) & (between <= LEAK * below[:, None]) & (below * 2 < total)
    possible &= ((below >= FEWEST) & (below <= MAX_FRACTION * total))[:, None]
    expected = below[:, None] * (edges[None, :] / edges[:, None] - 1).clamp(min=0)
    possible &= (expected - between).clamp(min=0) ** 2 >= 2 * IMPROBABLE * expected  # Chernoff's bound
    start, stop = torch.arange(len(edges))[:, None], torch.arange(len(edges))[None, :]
    width = torch.where(possible & (stop > start), stop - start, 0)
    low, high = divmod(int(width.argmax()), len(edges))
    middle = (low + high) // 2
    gap = float(edges[high] / edges[low])
    if gap < GAP:
        return None
    ratio = quantile(counts[:middle], edges, 0.5) / quantile(counts[middle:], edges[middle:], 0.5)
    return _Population(float(edges[middle]), gap, ratio) if ratio <= LOW else None
