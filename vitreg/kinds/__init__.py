"""Artifacts that are no high norms, each with its own measure: see base.py."""

from vitreg.kinds.base import Context, Finding, Meter
from vitreg.kinds.locality import LocalityMeter
from vitreg.kinds.position_pattern import PositionPatterns

# What a diagnosis measures beside norms, in the order in which it reports them.
METERS: tuple[type[Meter], ...] = (PositionPatterns, LocalityMeter)

__all__ = ["METERS", "Context", "Finding", "Meter"]
