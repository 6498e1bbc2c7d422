"""Names for what features depend on, so that a changed input never reads a stale cache.

Everything is keyed by content: the weights' bytes, the fixes that are applied, the photo files' bytes, and
what the preprocess makes of two test pictures.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitreg.carry import bare, edits_of
from vitreg.fixes.base import applied
from vitreg.images import Preprocess
from vitreg.models import Backbone


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


def model_key(vit: Backbone) -> str:
    """The model's structure and weights, its dtype and image size, and the fixes on it."""
    blocks = vit.anatomy.block_modules(vit.model)
    fixes = [handle.fix for handle in applied(vit.model)] if any(map(edits_of, blocks)) else []
    with bare(vit.model):
        return digest(repr(vit.model), vit.model.state_dict(), vit.image_size, fixes)


def preprocess_key(preprocess: Preprocess) -> str:
    """What the preprocess makes of two pictures, one wide and one tall, and its settings if it says them."""
    random = np.random.default_rng(0)
    pictures = [
        Image.fromarray(random.integers(0, 256, (h, w, 3), dtype=np.uint8)).resize((4 * w, 4 * h))
        for h, w in ((60, 83), (83, 60))
    ]
    settings: list[Any] = (
        [preprocess] if is_dataclass(preprocess) else []
    )  # some matter for large photos only
    return digest([preprocess(picture) for picture in pictures], *settings)


def file_key(path: Path) -> str:
    """The name and the bytes of a file; one that cannot be read has a key too."""
    try:
        return digest(path.name, path.read_bytes())
    except OSError as error:
        return digest(path.name, str(error))
