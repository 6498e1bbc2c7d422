"""vitreg: find, explain and remove attention artifacts in Vision Transformers."""

from vitreg.anatomy import Anatomy, TokenLayout
from vitreg.diagnosis import Diagnosis, diagnose
from vitreg.emergence import Emergence
from vitreg.errors import (
    ImageError,
    MissingExtraError,
    ModelLoadError,
    NonFiniteError,
    OutputError,
    UnsupportedModelError,
    VitregError,
)
from vitreg.images import Batch, Images, read_images
from vitreg.models import Backbone, load, wrap
from vitreg.phantom import Phantom, plant
from vitreg.trace import trace, watch

__version__ = "0.1.0"

__all__ = [
    "Anatomy",
    "Backbone",
    "Batch",
    "Diagnosis",
    "Emergence",
    "ImageError",
    "Images",
    "MissingExtraError",
    "ModelLoadError",
    "NonFiniteError",
    "OutputError",
    "Phantom",
    "TokenLayout",
    "UnsupportedModelError",
    "VitregError",
    "diagnose",
    "load",
    "plant",
    "read_images",
    "trace",
    "watch",
    "wrap",
]
