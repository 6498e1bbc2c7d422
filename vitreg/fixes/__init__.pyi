from .attention_bias import AttentionBias
from .base import Applied, Fix, applied
from .inpainting import Inpainting
from .position_repair import PositionRepair
from .projection import Projection
from .registers import TestTimeRegisters
from .saving import load_fix, save_fix
from .shift_average import ShiftAverage
from .shift_sink import ShiftSink
from .splitting import Fork, TokenSplitting
from .trained import TrainedRegisters

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
