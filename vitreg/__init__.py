"""vitreg: find, explain and remove attention artifacts in Vision Transformers.

The public names are listed in __init__.pyi. Each is loaded when it is first used: `import vitreg` is cheap.
"""

import warnings
from typing import Any

import lazy_loader

_lazily, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
_RENAMED = {"find_cure": "find_fix", "Cure": "FixSearch"}


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        new = _RENAMED[name]
        warnings.warn(f"vitreg.{name} is now vitreg.{new}.", DeprecationWarning, stacklevel=2)
        return _lazily(new)
    return _lazily(name)
