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
from jaxtyping import Float
from torch import Tensor

from vitreg.anatomy import TokenLayout
from vitreg.kinds.base import Context, Finding, Meter
from vitreg.kinds.bins import LogBins
from vitreg.models import Backbone
from vitreg.threshold import MIN_GAP, Gap, widest_gap

# Their median is at most this part of the others'. In two real models no patch of 96 photos lies below 0.56
# of its photo's median in any block, black bars and blank squares pasted in or not; among random models
# single patches reach 0.4, but the range that sets them apart is at most 1.35x wide.
LOW = 0.5
# A population is no lone token at the end of a tail, where a wide empty range comes by chance.
FEWEST, MIN_FRACTION = 8, 5e-4
RELATIVE = LogBins(-6, 1)


@dataclass(frozen=True)
class LowNormFinding(Finding):
    """Patches with norms far below those of their photo, after block `layer`, where they stand apart most.

    `fraction` of all patches, `per_image` of each image's, lie below `threshold` times their photo's median
    norm; `ratio` is their median norm over the others', `gap` how wide the almost empty range between them
    is. Without such a population fractions are 0 and threshold and ratio None. `lowest` is the smallest
    norm in any layer, in units of its photo's median (to 4%).
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
        gaps = {layer: gap for layer, row in enumerate(counts) if (gap := _gap_below(row))}
        if not gaps:
            layer = min(range(len(lowest)), key=lowest.__getitem__)
            return LowNormFinding(False, layer, None, 0.0, 0.0, None, None, None, lowest[layer])
        layer = max(gaps, key=lambda x: gaps[x].width)
        gap = gaps[layer]
        low = RELATIVE.below(1 / gap.threshold)
        frequency = self.positions[layer][:, low].sum(1).double() / context.images
        return LowNormFinding(
            present=True,
            layer=layer,
            positions=self.layout.as_grid(frequency).tolist(),
            fraction=gap.fraction,
            per_image=float(frequency.sum()),
            threshold=1 / gap.threshold,
            ratio=1 / gap.ratio,
            gap=gap.width,
            lowest=min(lowest),
        )


def _gap_below(counts: Tensor) -> Gap | None:
    """The almost empty range below the bulk, found as the one above it is: by turning the axis round."""
    gap = widest_gap(counts.flip(0), (1 / RELATIVE.edges).flip(0))
    if gap is None or gap.width < MIN_GAP or gap.ratio < 1 / LOW:
        return None
    enough = max(FEWEST, MIN_FRACTION * int(counts.sum()))
    return gap if gap.fraction * int(counts.sum()) >= enough else None
