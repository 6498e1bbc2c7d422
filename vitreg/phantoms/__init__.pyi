from .bundled import example
from .origins import OriginPhantom, plant_attention_outliers, plant_patch_outliers, plant_position_outliers
from .phantom import Phantom, plant

__all__ = [
    "OriginPhantom",
    "Phantom",
    "example",
    "plant",
    "plant_attention_outliers",
    "plant_patch_outliers",
    "plant_position_outliers",
]
