"""Artifacts that are no high norms, each with its own measure: see base.py."""

from vitreg.kinds.base import Context, Finding, Meter
from vitreg.kinds.low_norm import LowNorm
from vitreg.kinds.massive_dimensions import MassiveDimensions
from vitreg.kinds.sinks import Sinks

# What a diagnosis measures beside norms, in the order in which it reports them.
METERS: tuple[type[Meter], ...] = (Sinks, LowNorm, MassiveDimensions)

__all__ = ["METERS", "Context", "Finding", "Meter"]
