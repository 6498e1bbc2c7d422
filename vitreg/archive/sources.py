"""What lies in an archive: a tree of photos, webdataset .tar shards, or Parquet files with image bytes.

archive = find_archive("s3://bucket/photos")
for shard in archive.shards(1024): ...            # fixed: sorted names, cut every 1024
for name, content in items(archive.place, shard): ...
"""

import glob
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from vitreg.archive.storage import Storage
from vitreg.data.decoding import reason, why_unread
from vitreg.data.listing import FailedImage, LeftOut, is_image, is_shard, notes_on, printable, walk, warn_of
from vitreg.data.shards import shard_members
from vitreg.errors import DataError

SourceKind = Literal["images", "tar", "parquet"]
ArchiveItem = tuple[str, str | bytes] | FailedImage  # a name and either the bytes or a name in the place

_ROWS = 64  # of a Parquet file that are in memory at once


@dataclass(frozen=True)
class Shard:
    """The unit of work, of retries and of restarts: `files` below the archive's root.

    Of a Parquet file, the `groups` row groups from `first` on, which begin at `row`.
    """

    index: int
    files: tuple[str, ...]
    first: int = 0
    groups: int = 0
    row: int = 0


@dataclass(frozen=True)
class Archive:
    """All files of one kind at a place, sorted: {name below the place: bytes}; and what was left out."""

    place: Storage
    kind: SourceKind
    files: dict[str, int]
    left_out: tuple[LeftOut, ...] = ()

    def shards(self, images: int) -> Iterator[Shard]:
        """Shards of `images` photos each; one for each .tar; of Parquet, row groups up to so many rows."""
        names = list(self.files)
        if self.kind == "images":
            for index, start in enumerate(range(0, len(names), images)):
                yield Shard(index, tuple(names[start : start + images]))
        elif self.kind == "tar":
            yield from (Shard(index, (name,)) for index, name in enumerate(names))
        else:
            cuts = ((name, *cut) for name in names for cut in _row_groups(self.place, name, images))
            for index, (name, first, groups, row) in enumerate(cuts):
                yield Shard(index, (name,), first, groups, row)


def find_archive(url: str) -> Archive:
    """List a folder, a file or a glob. Of a mixed folder: its photos, else .tar shards, else Parquet files.

    The other kinds and what is hidden are left out; a warning counts and names it. Raises DataError where
    there is nothing of any kind, where a folder cannot be read (an archive with a hole in it is no archive),
    and for a place that cannot be reached.
    """
    place = Storage.at(url)
    try:
        root, sizes, left_out = _find(place)
    except DataError:
        raise
    except Exception as error:  # each driver has its own
        raise DataError(f"{url} cannot be listed: {reason(error)}. Expected a readable folder.") from error
    kinds = {kind: sorted(filter(belongs, sizes)) for kind, belongs in _KINDS.items()}
    chosen = _chosen(kinds)
    if chosen is None:
        found = f"has {len(sizes)} files, but none" if sizes else "is empty or not there: no file is"
        expected = "photos (.jpg, .png, .webp, ...), .tar shards or .parquet files"
        raise DataError(f"{printable(url)} {found} named like an image archive. Expected {expected}.")
    others = [name for kind, names in kinds.items() if kind != chosen for name in names]
    left_out += [LeftOut(printable(name), f"beside {_CALLED[chosen]}, which are read") for name in others]
    warn_of(notes_on(left_out))
    return Archive(root, chosen, {name: sizes[name] for name in kinds[chosen]}, tuple(left_out))


def _chosen(names: dict[SourceKind, list[str]]) -> SourceKind | None:
    """The first kind of which there are files; photos only if one is of a format that is read here."""
    if all(map(why_unread, names["images"])):
        names = {"tar": names["tar"], "parquet": names["parquet"], "images": names["images"]}
    return next((kind for kind, found in names.items() if found), None)


def _is_parquet(name: str) -> bool:
    return name.lower().endswith(".parquet") and not os.path.basename(name).startswith(".")


_KINDS: dict[SourceKind, Callable[[str], bool]] = {
    "images": is_image,
    "tar": is_shard,
    "parquet": _is_parquet,
}
_CALLED = {"images": "photos", "tar": ".tar shards", "parquet": "Parquet files"}


def _find(place: Storage) -> tuple[Storage, dict[str, int], list[LeftOut]]:
    """The folder, {name below it: bytes}, and what is left out."""
    left_out: list[LeftOut] = []
    if glob.has_magic(place.path) and not place.fs.exists(place.path):
        root = place.path[: glob.magic_check.search(place.path).start()].rpartition("/")[0]  # type: ignore[attr-defined]
        found = place.fs.glob(place.path, detail=True)
    elif not place.fs.isdir(place.path):
        root = place.path.rpartition("/")[0]
        found = {place.path: place.fs.info(place.path)} if place.fs.exists(place.path) else {}
    else:
        root = place.path
        if place.is_local:
            found, left_out = _walk_local(place.path)
        else:
            found = place.fs.find(place.path, detail=True)
    below = {path[len(root) :].lstrip("/"): info for path, info in found.items()}
    files = {name: int(info.get("size") or 0) for name, info in below.items() if info["type"] != "directory"}
    hidden = {name: why for name in files if (why := _hidden(name))}
    left_out += dict.fromkeys(hidden.values())
    shown = {name: size for name, size in files.items() if name not in hidden}
    return Storage(place.url if root == place.path else root, place.fs, root), shown, left_out


def _hidden(name: str) -> LeftOut | None:
    """Of a hidden file, or one in a hidden folder: what is left out."""
    *folders, file = name.split("/")
    for depth, folder in enumerate(folders, 1):
        if folder.startswith("."):
            return LeftOut(printable("/".join(folders[:depth])), "a hidden folder")
    return LeftOut(printable(name), "a hidden file") if file.startswith(".") else None


def _walk_local(folder: str) -> tuple[dict[str, dict[str, Any]], list[LeftOut]]:
    """As read_images walks: links are followed, each folder once."""
    found = walk(folder)
    if found.unreadable:
        raise DataError(
            f"{found.unreadable[0].path} cannot be listed: {found.unreadable[0].reason}. See to its"
            " permissions, or leave it out of the archive."
        )
    return {path: {"type": "file", "size": _size(path)} for path in found.paths}, found.left_out


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:  # a dangling link: reading it will say so
        return 0


# -- reading -----------------------------------------------------------------------------------------


def items(place: Storage, kind: SourceKind, shard: Shard, column: str | None = None) -> Iterator[ArchiveItem]:
    """The images of one shard in their order. What cannot be read any further is a FailedImage, the last."""
    if kind == "images":
        yield from ((printable(name), name) for name in shard.files)
        return
    name = shard.files[0]
    try:
        with place.open(name) as file:
            if kind == "tar":
                yield from shard_members(file, name)
            else:
                yield from _rows(file, name, shard, column)
    except DataError:
        raise
    except Exception as error:  # damaged files raise what they like
        yield FailedImage(printable(name), f"the file cannot be read any further: {reason(error)}")


def _row_groups(place: Storage, name: str, images: int) -> Iterator[tuple[int, int, int]]:
    """(first row group, row groups, first row): as many groups as have `images` rows, but at least one."""
    import pyarrow.parquet as pq

    try:
        with place.open(name) as file:
            metadata = pq.ParquetFile(file).metadata
            sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    except Exception:  # when it is read, its reason goes into the manifest
        yield 0, 0, 0
        return
    first = row = 0
    while first < len(sizes):
        groups, rows = 1, sizes[first]
        while first + groups < len(sizes) and rows + sizes[first + groups] <= images:
            rows += sizes[first + groups]
            groups += 1
        yield first, groups, row
        first, row = first + groups, row + rows


def _rows(file: Any, name: str, shard: Shard, column: str | None) -> Iterator[ArchiveItem]:
    import pyarrow.parquet as pq

    parquet = pq.ParquetFile(file)
    if column and column not in (known := parquet.schema_arrow.names):
        raise DataError(f"{name} has no column {column!r}, but {', '.join(known)}. Name one of them.")
    chosen = column or image_column(parquet.schema_arrow, name)
    groups = list(range(shard.first, shard.first + (shard.groups or parquet.metadata.num_row_groups)))
    row = shard.row
    for batch in parquet.iter_batches(_ROWS, row_groups=groups, columns=[chosen]):
        for value in batch.column(0).to_pylist():
            content = value.get("bytes") if isinstance(value, dict) else value
            label = printable(f"{name}#{row}")
            yield (label, content) if isinstance(content, bytes) else FailedImage(label, "no image bytes")
            row += 1


def image_column(schema: Any, name: str) -> str:
    """The column with image bytes, or {bytes, path} structs: `image` or `bytes`, else the only such one."""
    import pyarrow.types as kinds

    def holds_bytes(kind: Any) -> bool:
        if kinds.is_struct(kind):
            return kind.get_field_index("bytes") >= 0 and holds_bytes(kind.field("bytes").type)
        return bool(kinds.is_binary(kind) or kinds.is_large_binary(kind))

    found = [field.name for field in schema if holds_bytes(field.type)]
    named = [usual for usual in ("image", "bytes") if usual in found]
    if named or len(found) == 1:
        return [*named, *found][0]
    what = f"the columns {', '.join(found)} all hold bytes" if found else f"columns are {schema.names}"
    raise DataError(f"{name}: {what}. Expected one with image bytes; name it with column (--column).")
