"""Settings are fields of frozen dataclasses, set from the command line by name.

config = with_settings(KnnConfig(), {"k": "10"})
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, replace
from typing import (
    Any,
    ClassVar,
    Literal,
    Protocol,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
    runtime_checkable,
)

from vitreg.config.codec import decode
from vitreg.errors import DataError, FixError
from vitreg.printing import did_you_mean, one_of


@runtime_checkable
class Settings(Protocol):
    """A dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


C = TypeVar("C", bound=Settings)


def with_settings(config: C, settings: Mapping[str, str], owner: str = "this task") -> C:
    """The configuration with some fields set from text (JSON, plain text, or values with commas between).

    Raises DataError for a field that it does not have, naming the nearest, or a value of another type.
    """
    known = {f.name: f for f in fields(config)}
    changed = {}
    for name, text in settings.items():
        if name not in known:
            near = did_you_mean(name, known)
            raise DataError(
                f"{owner} has no setting {name!r}.{near} Expected some of {', '.join(sorted(known))}."
            )
        changed[name] = _parsed(type(config), name, text)
    return replace(config, **changed)


def pairs(texts: Iterable[str]) -> dict[str, str]:
    """{"k": "10"} of "k=10". Raises DataError for what has no `=`."""
    for text in texts:
        if "=" not in text:
            raise DataError(f"--set {text}: expected KEY=VALUE, such as --set k=10.")
    return {key: value for key, _, value in (text.partition("=") for text in texts)}


def _parsed(cls: type[Any], name: str, text: str) -> Any:
    hint = get_type_hints(cls)[name]
    for value in _readings(text):
        with suppress(FixError):
            return decode(hint, value, name)
    if get_origin(hint) is Literal:
        raise DataError(f"setting {name}={text}: {one_of(text, get_args(hint))}")
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
