"""From a folder, a glob, a list or a web dataset to the photos in it."""

import contextlib
import glob
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from vitreg.data.listing import (
    FailedImage,
    lines_of,
    notes_on,
    photos_else_shards,
    printable,
    spelled,
    walk,
    warn_of,
)
from vitreg.errors import DataError, ImageError, MissingExtraError

Source = str | Path | Image.Image | Tensor | Sequence[str | Path | Image.Image]


_Named = tuple[str, Image.Image | Tensor | bytes | str]


Item = str | _Named | FailedImage  # a path, something in memory with its name, or what failed while listing


def list_source(source: Source) -> list[Item]:
    """The photos of a source, in order. Raises ImageError where there is none."""
    if isinstance(source, Tensor):
        if source.ndim != 4 or source.shape[1] != 3 or not source.is_floating_point() or not len(source):
            found = f"found a {source.dtype} tensor of shape {tuple(source.shape)}"
            raise ImageError(f"{found}, but expected float (b, 3, h, w) that is already preprocessed.")
        return [(f"image-{i}", row) for i, row in enumerate(source)]
    parts = [source] if isinstance(source, str | Path | Image.Image) else source
    if not len(parts):
        raise ImageError("found an empty list, but expected paths or PIL images.")
    items: list[Item] = []
    for i, part in enumerate(parts):
        if isinstance(part, Image.Image):
            items.append((f"image-{i}", part))
        else:
            items += _list_path(os.path.expanduser(part))
    return items


def _list_path(path: str) -> list[Item]:
    if os.path.isdir(path):
        return _list_folder(path)
    if os.path.exists(path):
        return [*_list_text(path)] if path.lower().endswith(".txt") else [path]
    if "{" in path:
        try:
            from braceexpand import braceexpand
        except ImportError as error:
            raise MissingExtraError("braceexpand", "webdataset") from error

        with contextlib.suppress(ValueError):  # unbalanced: not meant as braces
            if (pieces := list(braceexpand(path))) != [path]:
                return [item for piece in pieces for item in _list_path(piece)]
    if glob.has_magic(path):
        return [*_images_or_shards(path, glob.glob(path, recursive=True))]
    expected = "a folder, an image, a glob, a .txt list of paths or .tar shards"
    raise ImageError(f"there is no file or folder {printable(path)}. Expected {expected}.")


def _list_folder(folder: str) -> list[Item]:
    found = walk(folder)
    warn_of(notes_on(found.left_out), stacklevel=6)
    chosen = _images_or_shards(folder, found.paths) if found.paths or not found.unreadable else []
    return [*found.unreadable, *chosen]


def _images_or_shards(where: str, paths: list[str]) -> list[str]:
    """The images among the paths, sorted; the .tar shards if there is no image."""
    chosen, left_out = photos_else_shards(paths)
    warn_of(notes_on(left_out), stacklevel=6)
    if chosen:
        return chosen
    empty = "is empty" if os.path.isdir(where) else "matches no file"
    what = f"has {len(paths)} files, but none named like an image or .tar shard" if paths else empty
    raise ImageError(f"{printable(where)} {what}. Expected images (.jpg, .png, .webp, ...).")


def _list_text(path: str) -> list[str]:
    try:
        listed = [line for line in lines_of(Path(path)) if not line.startswith("#")]
    except DataError as error:
        raise ImageError(str(error)) from error
    if not listed:
        raise ImageError(f"{printable(path)} lists no image. Expected one path per line.")
    return [_listed(os.path.dirname(path), line) for line in listed]


def _listed(folder: str, line: str) -> str:
    """Where a line's image lies: beside the list or in the current folder, as it is spelled there."""
    candidates = [place for name in spelled(line) for place in (os.path.join(folder, name), name)]
    return next(filter(os.path.exists, candidates), candidates[0])
