"""Cures for attention artifacts: each is a small frozen object that is applied to a model and undone."""

from vitreg.fixes.base import Applied, Fix, applied
from vitreg.fixes.registers import TestTimeRegisters

__all__ = ["Applied", "Fix", "TestTimeRegisters", "applied"]
