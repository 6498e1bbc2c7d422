"""Planted artifacts of known origin: a position embedding, an attention output, the patch embedding.

phantom = plant_position_outliers(vit, [(0, 0), (3, 4)])
find_origin(phantom.vit, images, diagnose(phantom.vit, images))
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
