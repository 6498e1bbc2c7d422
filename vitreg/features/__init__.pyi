from .config import Config, default_cache
from .extraction import Features, extract_features

__all__ = [
    "Config",
    "Features",
    "default_cache",
    "extract_features",
]
