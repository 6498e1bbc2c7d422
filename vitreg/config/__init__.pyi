from .codec import decode, encode
from .settings import with_settings

__all__ = [
    "decode",
    "encode",
    "with_settings",
]
