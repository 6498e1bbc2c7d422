"""What was measured per image, as means with intervals: all versions and measures share the draws."""

import numpy as np
from jaxtyping import Float

from vitreg.intervals import Estimate, bootstrap, interval
from vitreg.verification.measures import MEASURES


class Resampled:
    """Numbers per image, {version: {measure: (b,)}}, as means over images with bootstrap intervals.

    All versions and measures share the draws, so that differences are paired. NaN are left out of a mean.
    """

    def __init__(self, numbers: dict[str, dict[str, Float[np.ndarray, " b"]]], seed: int = 0) -> None:
        self._columns = {
            (version, name): values
            for version, measures in numbers.items()
            for name, values in measures.items()
            if not np.isnan(values).all()
        }
        drawn = bootstrap(np.stack(list(self._columns.values()), 1), seed)
        self._drawn = dict(zip(self._columns, drawn.T, strict=True))

    def value(self, version: str, name: str) -> Estimate | None:
        """A measure of one version; None where it was not taken."""
        if (source := MEASURES[name].largest_of) is not None:
            values = self._columns.get((version, source))
            return None if values is None else Estimate(float(np.nanmax(values)))
        if (version, name) not in self._columns:
            return None
        return Estimate(
            float(np.nanmean(self._columns[version, name])), *interval(self._drawn[version, name])
        )

    def difference(self, one: str, other: str, name: str) -> Estimate | None:
        """A measure of one version less that of another."""
        here, there = self.value(one, name), self.value(other, name)
        if here is None or there is None:
            return None
        change = here.value - there.value
        if here.low is None:
            return Estimate(change)
        return Estimate(change, *interval(self._drawn[one, name] - self._drawn[other, name]))
