from .trace import token_norms, trace, watch

__all__ = [
    "token_norms",
    "trace",
    "watch",
]
