from .looking import look
from .result import Look, LookVersion

__all__ = ["Look", "LookVersion", "look"]
