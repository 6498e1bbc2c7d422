from .anatomy import Anatomy, TokenLayout
from .backbone import Backbone, wrap
from .head import Readout, class_names, find_readout
from .loading import load
from .names import SCHEMES

__all__ = [
    "SCHEMES",
    "Anatomy",
    "Backbone",
    "Readout",
    "TokenLayout",
    "class_names",
    "find_readout",
    "load",
    "wrap",
]
