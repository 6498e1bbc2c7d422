"""Whether the arguments of a command stand in the order that it expects."""

import itertools
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from vitreg.errors import VitregError
from vitreg.evals.tasks import TASKS
from vitreg.models.names import LIBRARIES

_LIKE = {"DATA": "IMAGES"}  # a data set and photos look the same


def check_order(command: str, given: Mapping[str, str], between: Sequence[str] = ()) -> None:
    """Raise a VitregError that names the right order if the arguments are plainly in another one.

    `given` are the arguments by what is expected of each, in their order; `between` stand before the last.
    """
    names, values = list(given), list(given.values())
    if _fits(names, values):
        return
    for order in itertools.permutations(values):
        if _fits(names, order):
            *first, last = order
            right = shlex.join(["vitreg", command, *first, *between, last])
            raise VitregError(
                f"the arguments are in another order than {' '.join(names)}. Did you mean: {right}"
            )


def _fits(names: Sequence[str], values: Sequence[str]) -> bool:
    """Whether no argument is plainly something else than what is expected in its place."""
    return all(_may_be(value, _LIKE.get(name, name)) for name, value in zip(names, values, strict=True))


def _may_be(value: str, expected: str) -> bool:
    seen = role_of(value)
    if seen is None:  # no path: photos are where they are said to be, or there are none
        return expected not in ("IMAGES", "TASK")
    return seen == expected


def role_of(value: str) -> str | None:
    """What an argument is by its looks: a TASK, a MODEL, a FIX or IMAGES; None if it may be several."""
    path = Path(value).expanduser()
    if value in TASKS and not path.exists():
        return "TASK"
    if path.exists():
        inside = {"FIX": "fix.json", "MODEL": "config.json"}
        return next((role for role, name in inside.items() if (path / name).is_file()), "IMAGES")
    if re.match(rf"({'|'.join(LIBRARIES)}):", value):
        return "MODEL"
    return "IMAGES" if re.search(r"[*?\[{]", value) else None
