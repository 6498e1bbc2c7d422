from .manifest import Extraction
from .run import extract_archive

__all__ = [
    "Extraction",
    "extract_archive",
]
