"""Where do outlier norms begin? A threshold from the data, for any model's scale.

High-norm tokens are a second population, not the tail of the first. So the threshold is the middle of
the widest almost empty range of the norm histogram (log axis) above its median; a model whose norms
only trail off has no such range, however long the tail. Published fixed cut-offs (75, 150) fit one
model each.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

# A second population must lie beyond a range 1.5x wide, with at most a tenth of its own mass inside
# that range, its median at least 3x that of the rest (published outliers: 3x to 50x; what feeds them
# one block earlier in the ViT-Ti: 2.4x), and hold between 0.01% and 25% of the tokens.
MIN_GAP = 1.5
MIN_RATIO = 3.0
MAX_LEAK = 0.1
MIN_FRACTION, MAX_FRACTION = 1e-4, 0.25


@dataclass(frozen=True)
class Gap:
    """An almost empty range of norms between `low` and `high`, and the outliers beyond it.

    `threshold` is the bin edge in its (geometric) middle, `fraction` the share of tokens beyond it, `ratio`
    the median norm of these over the median of the rest.
    """

    low: float
    high: float
    threshold: float
    fraction: float
    ratio: float

    @property
    def width(self) -> float:
        """How many times larger the upper end is than the lower."""
        return self.high / self.low

    @property
    def separates(self) -> bool:
        """Whether what lies beyond is a population of its own."""
        return self.width >= MIN_GAP and self.ratio >= MIN_RATIO


def widest_gap(counts: Int[Tensor, " bins"], edges: Float[Tensor, " edges"]) -> Gap | None:
    """The widest almost empty range above the median of a histogram, or None if nothing lies beyond one.

    `counts` per bin, `edges` (bins + 1) norms in equal ratios. O(bins^2) on the occupied bins.
    """
    total = int(counts.sum())
    if not total:
        return None
    occupied = counts.nonzero().flatten()
    inside = slice(int(occupied[0]), int(occupied[-1]) + 1)  # nothing lies beyond the rest
    counts, edges = counts[inside], edges[inside.start : inside.stop + 1]
    above = counts.flip(0).cumsum(0).flip(0)  # mass in bin i and beyond
    above = torch.cat([above, above.new_zeros(1)])
    median_bin = int((counts.cumsum(0) * 2 >= total).nonzero()[0])
    start = torch.arange(len(edges))[:, None]
    stop = torch.arange(len(edges))[None, :]
    leaked = above[:, None] - above[None, :]  # mass between the two edges
    beyond = above[None, :].expand_as(leaked)
    possible = (start > median_bin) & (stop > start) & (leaked <= MAX_LEAK * beyond)
    possible &= (beyond >= max(1.0, MIN_FRACTION * total)) & (beyond <= MAX_FRACTION * total)
    if not possible.any():
        return None
    width = torch.where(possible, stop - start, -1)
    low, high = divmod(int(width.argmax()), len(edges))
    middle = (low + high + 1) // 2
    return Gap(
        low=float(edges[low]),
        high=float(edges[high]),
        threshold=float(edges[middle]),
        fraction=int(above[middle]) / total,
        ratio=quantile(counts[middle:], edges[middle:], 0.5) / quantile(counts[:middle], edges, 0.5),
    )


def quantile(counts: Tensor, edges: Tensor, q: float) -> float:
    """The q-quantile of a histogram, interpolated (geometrically) within its bin."""
    mass = counts.cumsum(0)
    rank = max(q * float(mass[-1]), 0.5)
    index = min(int(torch.searchsorted(mass.double(), rank)), len(counts) - 1)
    before = float(mass[index] - counts[index])
    inside = (rank - before) / max(float(counts[index]), 1.0)
    low, high = float(edges[index]), float(edges[index + 1])
    return low * (high / low) ** min(max(inside, 0.0), 1.0)
