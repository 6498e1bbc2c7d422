"""Means over images with bootstrap intervals.

    low, high = interval(bootstrap(values))

Images are the units that are drawn again in the bootstrap, for the patches of an image are not independent.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

RESAMPLES = 2000


CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A value over images and its 95% bootstrap interval; a maximum has none, for none is valid."""

    value: float
    low: float | None = None
    high: float | None = None


def bootstrap(
    values: Float[np.ndarray, "b k"], seed: int = 0, resamples: int = RESAMPLES
) -> Float[np.ndarray, "r k"]:
    """Means of each column over images drawn again with replacement, the same draws for all columns."""
    random, n = np.random.default_rng(seed), len(values)
    known = ~np.isnan(values)
    sums, counts = np.where(known, values, 0.0), known.astype(float)
    means = []
    at_once = max(4_000_000 // n, 1)  # bounds the memory
    for start in range(0, resamples, at_once):
        times = random.multinomial(n, np.full(n, 1 / n), size=min(at_once, resamples - start)).astype(float)
        with np.errstate(invalid="ignore"):
            means.append((times @ sums) / (times @ counts))
    return np.concatenate(means)


def interval(means: Float[np.ndarray, " r"], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The percentile interval of bootstrapped means."""
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(means, [tail, 1 - tail])
    return float(low), float(high)
