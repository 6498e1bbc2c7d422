from .records import trace
from .streams import token_norms, watch

__all__ = [
    "token_norms",
    "trace",
    "watch",
]
