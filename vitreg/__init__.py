"""vitreg: find, explain and remove attention artifacts in Vision Transformers."""

from vitreg.anatomy import Anatomy, TokenLayout
from vitreg.diagnosis import Diagnosis, diagnose
from vitreg.errors import (
    ImageError,
    MissingExtraError,
    ModelLoadError,
    NonFiniteError,
    OutputError,
    UnsupportedModelError,
    VitregError,
)
from vitreg.images import read_images
from vitreg.models import Backbone, load, wrap
from vitreg.trace import trace, watch

__version__ = "0.1.0"

__all__ = [
    "Anatomy",
    "Backbone",
    "Diagnosis",
    "ImageError",
    "MissingExtraError",
    "ModelLoadError",
    "NonFiniteError",
    "OutputError",
    "TokenLayout",
    "UnsupportedModelError",
    "VitregError",
    "diagnose",
    "load",
    "read_images",
    "trace",
    "watch",
    "wrap",
]
