from .diagnosing import diagnose
from .emergence import Emergence
from .one_image import ImageView, inspect_image
from .outliers import OutlierRule
from .result import Diagnosis, Example, LayerDiagnosis

__all__ = [
    "Diagnosis",
    "Emergence",
    "Example",
    "ImageView",
    "LayerDiagnosis",
    "OutlierRule",
    "diagnose",
    "inspect_image",
]
