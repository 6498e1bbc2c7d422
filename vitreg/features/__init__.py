"""Features of many photos: computed once, kept, and shared by evaluations, training and archives."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
