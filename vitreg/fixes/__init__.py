"""Cures for attention artifacts: each is a small frozen object that is applied to a model and undone."""

from vitreg.fixes.attention_bias import AttentionBias
from vitreg.fixes.base import Applied, Fix, applied
from vitreg.fixes.inpainting import Inpainting
from vitreg.fixes.position_repair import PositionRepair
from vitreg.fixes.projection import Projection
from vitreg.fixes.registers import TestTimeRegisters
from vitreg.fixes.saving import load_fix, save_fix
from vitreg.fixes.shift_average import ShiftAverage
from vitreg.fixes.shift_sink import ShiftSink
from vitreg.fixes.splitting import Fork, TokenSplitting
from vitreg.fixes.trained import TrainedRegisters

__all__ = [
    "Applied",
    "AttentionBias",
    "Fix",
    "Fork",
    "Inpainting",
    "PositionRepair",
    "Projection",
    "ShiftAverage",
    "ShiftSink",
    "TestTimeRegisters",
    "TokenSplitting",
    "TrainedRegisters",
    "applied",
    "load_fix",
    "save_fix",
]
