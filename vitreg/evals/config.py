"""Settings of the evaluations: frozen dataclasses, set from the command line by name.

config = with_settings(KnnConfig(), {"k": "10"})
"""

import difflib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

from vitreg.errors import DataError, FixError
from vitreg.fixes.codec import decode


@dataclass(frozen=True)
class Config:
    """What all tasks share. `cache` is the folder that keeps features (None: none are kept).

    `limit`: so many images of each split, evenly spread. `progress`: a bar on stderr.
    """

    seed: int = 0
    limit: int | None = None
    batch_size: int = 32
    workers: int | None = None
    cache: Path | None = None
    progress: bool = False

    def settings(self) -> dict[str, Any]:
        """What results depend on: all but where and how fast they are computed."""
        return {k: v for k, v in vars(self).items() if k not in _MACHINE}


def default_cache() -> Path:
    """$VITREG_CACHE, or vitreg/ in the user's cache folder. It may be deleted at any time."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("VITREG_CACHE") or Path(home) / "vitreg")


_MACHINE = ("batch_size", "workers", "cache", "progress", "seed")
C = TypeVar("C", bound=Config)


def with_settings(config: C, settings: Mapping[str, str]) -> C:
    """The configuration with some fields set from text (JSON, plain text, or values with commas between).

    Raises DataError for a field that it does not have, naming the nearest, or a value of another type.
    """
    known = {f.name: f for f in fields(config)}
    changed = {}
    for name, text in settings.items():
        if name not in known:
            near = nearest(name, known)
            raise DataError(
                f"this task has no setting {name!r}.{near} Expected some of {', '.join(sorted(known))}."
            )
        changed[name] = _parsed(type(config), name, text)
    return replace(config, **changed)


def nearest(name: str, known: Iterable[str]) -> str:
    """What an error adds about an unknown name: " Did you mean NAME?", or nothing if none is near."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]}?" if close else ""


def _parsed(cls: type[Config], name: str, text: str) -> Any:
    hint = get_type_hints(cls)[name]
    for value in _readings(text):
        with suppress(FixError):
            return decode(hint, value, name)
    expected = getattr(hint, "__name__", None) if get_origin(hint) is None else None
    raise DataError(f"setting {name}={text}: expected {expected or str(hint).replace('typing.', '')}.")


def _readings(text: str) -> Iterator[Any]:
    """What a text may mean: JSON, several values with commas between them, itself."""
    for reading in (text, f"[{text}]"):
        with suppress(ValueError):
            yield json.loads(reading)
    if "," in text:
        yield text.split(",")
    yield text
