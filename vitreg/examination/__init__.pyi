from .examine import Examination, doctor

__all__ = [
    "Examination",
    "doctor",
]
