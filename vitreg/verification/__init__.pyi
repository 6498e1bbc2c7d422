from .measuring import verify
from .verdict import Control, Measure, Verdict

__all__ = [
    "Control",
    "Measure",
    "Verdict",
    "verify",
]
