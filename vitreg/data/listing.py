"""What lies in a folder, what a text file lists, and what was left out of either, and why.

    found = list_photos(Path("photos"))
    found.paths                          # sorted
    notes_on(found.left_out)             # ("1 left out (a hidden folder): photos/.thumbnails",)

Every reader of photos, masks, boxes and shards goes through here, so that they leave out the same and say it
in the same words.
"""

import codecs
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vitreg.data.decoding import photo_extensions, reason, why_unread
from vitreg.errors import DataError

SHOWN = 3  # of the names in a note


@dataclass(frozen=True)
class LeftOut:
    """What a reader leaves out (a file, or an entry of one), and why, in one line."""

    path: str
    reason: str


@dataclass(frozen=True)
class FailedImage(LeftOut):
    """An image that could not be read, and why, in one line."""


def counted(what: str, names: Sequence[str]) -> str:
    """One line: how many there are of something, and the first of them by name."""
    return f"{len(names)} {what}: {', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''}"


def notes_on(left_out: Iterable[LeftOut]) -> tuple[str, ...]:
    """A line for each reason: how many were left out for it, and the first of them by name."""
    names: dict[str, list[str]] = {}
    for one in left_out:
        names.setdefault(one.reason, []).append(one.path)
    return tuple(counted(f"left out ({why})", those) for why, those in names.items())


def warn_of(notes: Iterable[str], stacklevel: int = 3) -> None:
    """Say the notes as warnings, where no result carries them."""
    for note in notes:
        warnings.warn(note, stacklevel=stacklevel)


# -- folders -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Listing:
    """The files below a folder, sorted; folders that cannot be read; and what was left out."""

    paths: list[str]
    unreadable: list[FailedImage] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)


def walk(folder: str) -> Listing:
    """All files below a folder. Links are followed, but each folder is read once.

    Hidden files and folders are left out, and of these the folders and the photos are named. What a Mac
    leaves beside files on other disks (._photo.jpg) is no photo.
    """
    found = Listing([])
    seen = set()  # real folders: a link may lead back up

    def note(error: OSError) -> None:
        found.unreadable.append(FailedImage(printable(error.filename), reason(error)))

    def leave_out(path: str, why: str) -> None:
        found.left_out.append(LeftOut(printable(path), why))

    for where, subfolders, names in os.walk(folder, onerror=note, followlinks=True):
        if (real := os.path.realpath(where)) in seen:
            subfolders.clear()
            leave_out(where, "a link to a folder that is read already")
            continue
        seen.add(real)
        for name in sorted(filter(_is_hidden, subfolders)):
            leave_out(os.path.join(where, name), "a hidden folder")
        subfolders[:] = sorted(name for name in subfolders if not _is_hidden(name))
        for name in sorted(names):
            path = os.path.join(where, name)
            if _is_hidden(name):
                if is_image(name[1:]) and not name.startswith("._"):
                    leave_out(path, "a hidden file")
            elif not is_image(name) and os.path.islink(path) and not os.path.exists(path):
                leave_out(path, "a link that leads nowhere")
            else:
                found.paths.append(path)
    return found


def photos_else_shards(paths: Iterable[str]) -> tuple[list[str], list[LeftOut]]:
    """The photos among some files, sorted, or the .tar shards where no photo is of a format that is read.

    The others are left out.
    """
    paths = sorted(paths)
    photos, shards = list(filter(is_image, paths)), list(filter(is_shard, paths))
    if not shards or not all(map(why_unread, photos)):
        return photos, [LeftOut(printable(path), "a shard beside photos") for path in shards]
    return shards, [LeftOut(printable(path), f"{why_unread(path)}; shards are read") for path in photos]


@dataclass(frozen=True)
class ListedPhotos:
    """The photos below a folder, sorted, and what was left out."""

    paths: tuple[Path, ...]
    left_out: tuple[LeftOut, ...]


def list_photos(folder: Path) -> ListedPhotos:
    """The photos below a folder. Raises DataError if there are none, or if a folder in it cannot be read."""
    if not folder.is_dir():
        raise DataError(f"there is no folder {printable(str(folder))}.")
    found = walk(str(folder))
    if found.unreadable:
        raise DataError(
            f"{found.unreadable[0].path} cannot be listed: {found.unreadable[0].reason}. See to its"
            " permissions, or take it out of the data set."
        )
    paths = tuple(map(Path, sorted(filter(is_image, found.paths))))
    if not paths:
        left_out = "".join(f" {note}." for note in notes_on(found.left_out))
        raise DataError(
            f"{printable(str(folder))} holds no photo. Expected .jpg, .png, ... in it or in its folders."
            f"{left_out}"
        )
    return ListedPhotos(tuple(sorted(paths)), tuple(found.left_out))


def photos_in(folder: Path) -> list[Path]:
    """The same, where no result carries notes: a warning says what was left out."""
    found = list_photos(folder)
    warn_of(notes_on(found.left_out))
    return list(found.paths)


def _is_hidden(name: str) -> bool:
    return name.startswith(".")


def is_image(path: str) -> bool:
    """Whether a file is named like a photo and not hidden. It may be of a format that cannot be read here."""
    name = os.path.basename(path)
    return os.path.splitext(name)[1].lower() in photo_extensions() and not _is_hidden(name)


def is_shard(path: str) -> bool:
    """Whether a file is named like a web dataset's shard and not hidden."""
    return path.lower().endswith((".tar", ".tar.gz", ".tgz")) and not _is_hidden(os.path.basename(path))


def printable(path: str) -> str:
    """The path with escapes for bytes that are not UTF-8 and for control characters."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return re.sub(r"[\x00-\x1f\x7f]", lambda match: f"\\x{ord(match[0]):02x}", text)


# -- lists in text files -----------------------------------------------------------------------------

# The longer marks first: UTF-32's begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)


def text_in(content: bytes) -> str:
    """Text of UTF-8, or of UTF-16 or UTF-32 with its byte order mark; else of the encoding of file names.

    Bytes that are no UTF-8 stay what they are in a path, so that a list in Latin-1 finds files with names in
    Latin-1; `spelled` tries the others. Raises DataError for what is no text.
    """
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding, "surrogateescape" if encoding == "utf-8" else "strict")
    except UnicodeDecodeError as error:
        raise DataError(f"it begins like {encoding.upper()}, but is not: {error.reason}") from error
    if "\0" in text:
        raise DataError("it is not text in UTF-8, or in UTF-16 with its byte order mark")
    return text


def lines_of(path: Path) -> list[str]:
    """The lines of a text file that hold something, without space around them.

    Raises DataError for a file that cannot be read or is no text.
    """
    return [line for _, line in numbered_lines(path)]


def numbered_lines(path: Path) -> list[tuple[int, str]]:
    """The same, each with its number from 1."""
    named = printable(str(path))
    if path.exists() and not path.is_file():  # to open a named pipe would wait forever
        raise DataError(f"{named} is not a regular file. Expected a text file with a name per line.")
    try:
        lines = text_in(path.read_bytes()).split("\n")
    except OSError as error:
        raise DataError(f"cannot read {named}: {error.strerror}. Expected a name per line.") from error
    except DataError as error:
        raise DataError(f"cannot read {named}: {error}. Save it as UTF-8.") from error
    return [(number, stripped) for number, line in enumerate(lines, 1) if (stripped := line.strip())]


def spelled(name: str) -> tuple[str, ...]:
    """How a name from a list may be meant: as it is and, if it is no UTF-8, also read as Latin-1."""
    as_bytes = name.encode("utf-8", "surrogateescape")
    try:
        as_bytes.decode()
    except UnicodeDecodeError:
        return name, as_bytes.decode("latin-1")
    return (name,)


def once_each(names: Sequence[str], where: Path) -> tuple[list[str], list[LeftOut]]:
    """The names without repetitions, which are left out."""
    counts = Counter(names)
    repeated = [
        LeftOut(f"{printable(name)} in {printable(str(where))}", "listed before")
        for name, count in counts.items()
        for _ in range(count - 1)
    ]
    return list(counts), repeated
