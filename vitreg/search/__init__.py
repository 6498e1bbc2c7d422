"""Find what makes the artifacts of a model, and the fix that suits it."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
