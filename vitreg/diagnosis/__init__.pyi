from .diagnose import diagnose
from .emergence import Emergence
from .one_image import Look, look
from .outliers import OutlierRule
from .result import Diagnosis, Example, LayerDiagnosis

__all__ = [
    "Diagnosis",
    "Emergence",
    "Example",
    "LayerDiagnosis",
    "Look",
    "OutlierRule",
    "diagnose",
    "look",
]
