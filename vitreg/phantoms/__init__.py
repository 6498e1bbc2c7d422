"""Models with planted artifacts of every kind and origin, whose truth is known.

phantom = plant(vit, images, layer=7)                            # register neurons
phantom = plant_position_outliers(vit, [(0, 0), (3, 4)])         # an outlying position embedding
find_origin(phantom.vit, images, diagnose(phantom.vit, images))
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
