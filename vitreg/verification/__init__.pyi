from .verdict import Control, Measure, Verdict
from .verify import verify

__all__ = [
    "Control",
    "Measure",
    "Verdict",
    "verify",
]
