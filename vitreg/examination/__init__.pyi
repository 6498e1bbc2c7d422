from .doctor import Examination, doctor

__all__ = [
    "Examination",
    "doctor",
]
