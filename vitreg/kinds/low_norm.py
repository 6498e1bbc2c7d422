"""Low-norm outliers: a second population of patches whose norms lie far below the others'.

    diagnosis = diagnose(vit, photos)
    low = next(finding for finding in diagnosis.kinds if finding.kind == "low-norm outliers")
    print(low)                       # how many, how far below, after which block

The rule for high norms, upside down (Bach et al., 2025, describe such artifacts), on norms in units of each
photo's own median, so that photos of different contrast are not mistaken for two populations.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitreg.anatomy import TokenLayout
from vitreg.kinds.base import Context, Finding, Meter
from vitreg.kinds.bins import LogBins
from vitreg.models import Backbone
from vitreg.populations import Population, second_population

# Their median is at most this part of the others'. In two real models no patch of 96 photos lies below 0.55
# of its photo's median in any block, black bars and blank squares pasted in or not; in random models single
# patches reach 0.4.
LOW = 0.5
# A population is no handful of tokens at the end of a tail, and stands apart from it: thresholds misjudge
# at most this share of it.
FEWEST, MAX_MISJUDGED = 8, 0.5
RELATIVE = LogBins(-6, 1)


@dataclass(frozen=True)
class LowNormFinding(Finding):
    """Patches with norms far below those of their photo, after block `layer`, where they stand apart most.

    `fraction` of all patches, `per_image` of each image's, lie below `threshold` times their photo's median
    norm; `ratio` is their median norm over the others', `misjudged` the share of all patches that the
    threshold puts on the wrong side. Without such a population fractions are 0 and threshold and ratio None.
    `lowest` is the smallest norm after that block, in units of its photo's median (to 4%).
    """

    kind: ClassVar[str] = "low-norm outliers"
    title: ClassVar[str] = "Low-norm outliers"
    fraction: float
    per_image: float
    threshold: float | None
    ratio: float | None
    misjudged: float
    lowest: float

    def __str__(self) -> str:
        if not self.present:
            return (
                "no second population of patches has norms far below the others': the smallest norm is"
                f" {self.lowest:.2f} of its photo's median (block {self.layer})."
            )
        return (
            f"{self.fraction:.1%} of the patches ({self.per_image:.1f} per image) have norms {self.ratio:.2f}"
            f" times the others' after block {self.layer}, a population of their own (any threshold misjudges"
            f" {self.misjudged:.2%} of the patches). Whatever weighs patches by their norm, as means and"
            " inner products do, hardly sees them."
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
            return LowNormFinding(False, layer, None, 0.0, 0.0, None, None, 0.0, lowest[layer])
        layer = max(below, key=lambda x: below[x].gain)
        population = below[layer]
        threshold = 1 / population.threshold
        frequency = self.positions[layer][:, RELATIVE.below(threshold)].sum(1).double() / context.images
        return LowNormFinding(
            present=True,
            layer=layer,
            positions=self.layout.as_grid(frequency).tolist(),
            fraction=population.fraction,
            per_image=float(frequency.sum()),
            threshold=threshold,
            ratio=1 / population.ratio,
            misjudged=population.misjudged,
            lowest=lowest[layer],
        )


def _population_below(counts: Int[Tensor, " bins"]) -> Population | None:
    """A population below the bulk, found as one above it is: by turning the axis round."""
    found = second_population(counts.flip(0), (1 / RELATIVE.edges).flip(0))
    if found is None or not found.stands_out or found.misjudged > MAX_MISJUDGED * found.share:
        return None
    enough = found.fraction * int(counts.sum()) >= FEWEST
    return found if enough and found.ratio >= 1 / LOW else None
