from .anatomy import Anatomy
from .backbone import Backbone, wrap
from .head import Readout, class_names, find_readout
from .layout import TokenLayout
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
