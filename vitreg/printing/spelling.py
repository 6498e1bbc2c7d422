"""What to say of a name that is not among those that one may choose from."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str], count: int = 1, prefix: str = "") -> str:
    """ " Did you mean NAME?" for the nearest of the known names, whatever their case; "" if none is near.

    `count` is how many are named at most, `prefix` what stands before each of them.
    """
    by_lower = {one.lower(): one for one in reversed(list(known))}
    close = difflib.get_close_matches(name.lower(), by_lower, n=count)
    named = " or ".join(f"{prefix}{by_lower[one]}" for one in close)
    return f" Did you mean {named}?" if named else ""


def one_of(name: str, known: Iterable[str]) -> str:
    """What an error says after an unknown name: the nearest, and all that may be chosen."""
    names = list(known)
    return f"{did_you_mean(name, names)} Expected one of {', '.join(names)}.".strip()
