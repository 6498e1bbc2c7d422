from .fix_search import FixSearch, find_fix
from .origin import Origin, find_origin
from .register_neurons import find_register_neurons

__all__ = [
    "FixSearch",
    "Origin",
    "find_fix",
    "find_origin",
    "find_register_neurons",
]
