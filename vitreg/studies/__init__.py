"""Questions about a model: does anything read its register neurons, and where do registers look?"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
