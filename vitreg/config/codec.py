"""Frozen dataclasses as JSON, read back against their own type hints: nothing is taken on trust.

    document = encode(neurons)
    neurons = decode(RegisterNeurons, document, "fix.json: neurons")

A number that is NaN or infinite was not measured and is left out. Keys that are not known are warned about
and skipped, for a later version may have put them there.
"""

import math
import types
import warnings
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from vitreg.errors import FixError, FixWarning


def encode(value: Any) -> Any:
    """Plain JSON values. Raises FixError for what has none."""
    if is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in fields(value)}
    if isinstance(value, Mapping):
        encoded = {str(key): encode(item) for key, item in value.items()}
        return {key: item for key, item in encoded.items() if not _unmeasured(item)}
    if isinstance(value, tuple | list):
        return [None if _unmeasured(item) else item for item in map(encode, value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if getattr(value, "ndim", None) == 0:  # a scalar of numpy or torch
        return encode(value.item())
    raise FixError(f"a {type(value).__name__} cannot be saved: expected numbers, text, lists and mappings.")


def _unmeasured(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def decode(hint: Any, value: Any, where: str) -> Any:
    """`value` as what the type hint asks for. Raises FixError, which says `where`, if it is not that."""
    if is_dataclass(hint):
        return _dataclass(hint, value, where)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        fitting = [option for option in arguments if _fits(option, value)]
        return decode(fitting[0], value, where) if fitting else _refuse(hint, value, where)
    if origin is Literal:
        return value if value in arguments else _refuse(hint, value, where)
    if origin is tuple:
        return _tuple(arguments, value, where)
    if not _fits(hint, value):
        return _refuse(hint, value, where)
    return hint(value) if hint is float else value


def fields_of(cls: Any, document: Any, where: str, leave_out: tuple[str, ...] = ()) -> dict[str, Any]:
    """The arguments that make a dataclass. Those left out are for the caller to add."""
    if not isinstance(document, dict):
        _refuse(dict, document, where)
    hints = get_type_hints(cls)
    expected = {f.name: f for f in fields(cls) if f.name not in leave_out}
    if missing := [name for name, f in expected.items() if name not in document and _needed(f)]:
        raise FixError(f"{where}: {missing[0]!r} is missing. The file is damaged; save or download it again.")
    warn_of_unknown(document, expected, where)
    return {
        name: decode(hints[name], document[name], f"{where}: {name}") for name in expected if name in document
    }


def warn_of_unknown(found: Mapping[str, Any], known: Mapping[str, Any], where: str) -> None:
    """Warn (FixWarning) of keys that this version does not know."""
    if unknown := sorted(set(found) - set(known)):
        warnings.warn(
            f"{where}: {', '.join(map(repr, unknown[:5]))} is not known to this version of vitreg and is"
            " ignored. Upgrade vitreg if the fix was saved by a later one.",
            FixWarning,
            stacklevel=2,
        )


def _dataclass(cls: Any, document: Any, where: str) -> Any:
    return cls(**fields_of(cls, document, where))


def _needed(field: "Field[Any]") -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        return _refuse(list, value, where)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    if len(arguments) != len(value):
        raise FixError(f"{where}: expected {len(arguments)} values, found {len(value)}.")
    return tuple(
        decode(hint, item, f"{where}[{i}]")
        for i, (hint, item) in enumerate(zip(arguments, value, strict=True))
    )


def _fits(hint: Any, value: Any) -> bool:
    """Whether a JSON value may stand for a simple type: an integer is a float, a boolean is no number."""
    if is_dataclass(hint):
        return isinstance(value, dict)
    kind = get_origin(hint) or hint
    if kind is Literal:
        return value in get_args(hint)
    if kind in (dict, tuple):
        return isinstance(value, dict if kind is dict else list)
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return kind in (int, bool, str, type(None)) and type(value) is kind


def _refuse(hint: Any, value: Any, where: str) -> Any:
    expected = getattr(hint, "__name__", str(hint)) if get_origin(hint) is None else str(hint)
    found = repr(value) if len(repr(value)) <= 40 else f"{type(value).__name__} {repr(value)[:40]}..."
    raise FixError(
        f"{where}: expected {expected.replace('typing.', '')}, found {found}. The file is damaged or was"
        " edited; save or download it again."
    )
