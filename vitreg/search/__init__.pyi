from .find_fix import Cure, find_cure
from .neurons import find_register_neurons
from .origin import Origin, find_origin

__all__ = [
    "Cure",
    "Origin",
    "find_cure",
    "find_origin",
    "find_register_neurons",
]
