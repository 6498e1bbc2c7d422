"""From a name or a module to a Backbone: a model that vitreg can read."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
