from .origins import OriginPhantom, plant_attention_outliers, plant_patch_outliers, plant_position_outliers

__all__ = [
    "OriginPhantom",
    "plant_attention_outliers",
    "plant_patch_outliers",
    "plant_position_outliers",
]
