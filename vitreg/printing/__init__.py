"""What results print: verdicts with the next step, tables, spelling, and progress."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
