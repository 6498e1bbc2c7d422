"""Digests of values and files, so that a result can say what it depends on."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def digest(*parts: Any) -> str:
    """32 hex digits that stand for these values: numbers, text, bytes, tensors, dataclasses, collections."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        for piece in _bytes_of(part):
            found.update(piece)
    return found.hexdigest()


def _bytes_of(value: Any) -> Iterable[bytes]:
    if isinstance(value, Tensor):
        yield f"{value.dtype}{tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    elif is_dataclass(value) and not isinstance(value, type):
        yield type(value).__qualname__.encode()
        for part in fields(value):
            yield from _bytes_of((part.name, getattr(value, part.name)))
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield from _bytes_of((str(key), value[key]))
    elif isinstance(value, list | tuple):
        yield b"("
        for item in value:
            yield from _bytes_of(item)
        yield b")"
    else:
        yield value if isinstance(value, bytes) else repr(value).encode() + b"\0"


def file_key(path: Path) -> str:
    """The name and the bytes of a file; one that cannot be read has a key too."""
    try:
        return digest(path.name, path.read_bytes())
    except OSError as error:
        return digest(path.name, str(error))
