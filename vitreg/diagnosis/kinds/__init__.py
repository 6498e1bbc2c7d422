"""Artifacts that are no high norms, each with its own measure: see base.py."""

from vitreg.diagnosis.kinds.base import Context, Finding, Meter
from vitreg.diagnosis.kinds.locality import LocalityMeter
from vitreg.diagnosis.kinds.low_norm import LowNorm
from vitreg.diagnosis.kinds.massive_dimensions import MassiveDimensions
from vitreg.diagnosis.kinds.position_pattern import PositionPatterns
from vitreg.diagnosis.kinds.sinks import Sinks
from vitreg.diagnosis.kinds.strip_test import StripTest, strip_test
from vitreg.diagnosis.kinds.token_content import TokenContentMeter

# What a diagnosis measures beside norms, in the order in which it reports them.
METERS: tuple[type[Meter], ...] = (
    Sinks,
    LowNorm,
    MassiveDimensions,
    PositionPatterns,
    TokenContentMeter,
    LocalityMeter,
)

__all__ = ["METERS", "Context", "Finding", "Meter", "StripTest", "strip_test"]
