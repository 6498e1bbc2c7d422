"""Histograms on a log axis, whose sums over images answer questions about a bound that comes later.

RELATIVE = LogBins(-8, 1)               # powers of two
counts += torch.bincount(RELATIVE.index(ratios).flatten(), minlength=RELATIVE.count)
counts[RELATIVE.below(bound)].sum()        # once the bound is known
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

PER_OCTAVE = 16  # 4% a bin, the resolution at which thresholds are chosen
ROUNDING = 1e-4


@dataclass(frozen=True)
class LogBins:
    """Bins of equal ratio from 2**low to 2**high; values beyond count in the first or the last of them."""

    low: int
    high: int

    @property
    def count(self) -> int:
        return (self.high - self.low) * PER_OCTAVE

    @property
    def edges(self) -> Float[Tensor, " edges"]:
        return torch.exp2(torch.arange(self.count + 1) / PER_OCTAVE + self.low)

    def index(self, values: Float[Tensor, "*n"]) -> Int[Tensor, "*n"]:
        """The bin of each value."""
        return ((values.log2() - self.low) * PER_OCTAVE).floor().clamp(0, self.count - 1).long()

    def below(self, bound: float | None) -> Bool[Tensor, " bins"]:
        """The bins below a bound, a bin edge to within rounding; all of them for None."""
        return self.edges[:-1] * (1 + ROUNDING) < (torch.inf if bound is None else bound)


NORMS = LogBins(-6, 18)  # of tokens in a residual stream
