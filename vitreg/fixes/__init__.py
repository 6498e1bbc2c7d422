"""Cures for attention artifacts: each is a small frozen object that is applied to a model and undone."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
