"""Planted artifacts of known origin: a position embedding, an attention output, the patch embedding.

phantom = plant_position_outliers(vit, [(0, 0), (3, 4)])
find_origin(phantom.vit, images, diagnose(phantom.vit, images))
"""

from vitreg.phantoms.origins import (
    OriginPhantom,
    plant_attention_outliers,
    plant_patch_outliers,
    plant_position_outliers,
)

__all__ = ["OriginPhantom", "plant_attention_outliers", "plant_patch_outliers", "plant_position_outliers"]
