from .evaluation import write_evaluation
from .report import write

__all__ = [
    "write",
    "write_evaluation",
]
