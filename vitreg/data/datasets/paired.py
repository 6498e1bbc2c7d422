"""Files that belong together by their names, and lists that name them."""

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vitreg.data.listing import LeftOut, is_image, lines_of, list_photos, once_each, printable, spelled
from vitreg.errors import DataError


@dataclass(frozen=True)
class PairedFiles:
    """Photos, the annotation of each, and what was left out of their folders."""

    photos: tuple[Path, ...]
    others: tuple[Path, ...]
    left_out: tuple[LeftOut, ...]


def paired(images: Path, others: Path, what: str) -> PairedFiles:
    """Photos and their annotations: files of one name in two folders, whatever their extensions.

    Raises DataError for one without the other, and for two of one name; `what` is the annotation's name.
    """
    found = [list_photos(folder) for folder in (images, others)]
    photos, annotations = (
        _by_name(part.paths, place) for part, place in zip(found, (images, others), strict=True)
    )
    for name in sorted(photos.keys() - annotations.keys()):
        raise DataError(
            f"{printable(str(photos[name]))} has no {what}. Expected a file called {printable(name)} in"
            f" {printable(str(others))}."
        )
    for name in sorted(annotations.keys() - photos.keys()):
        raise DataError(
            f"{printable(str(annotations[name]))} has no photo. Expected a file called {printable(name)} in"
            f" {printable(str(images))}."
        )
    names = sorted(photos)
    return PairedFiles(
        tuple(photos[name] for name in names),
        tuple(annotations[name] for name in names),
        tuple(one for part in found for one in part.left_out),
    )


def _by_name(paths: tuple[Path, ...], folder: Path) -> dict[str, Path]:
    by_name: dict[str, Path] = {}
    for path in paths:
        name = str(path.relative_to(folder).with_suffix(""))
        if (twin := by_name.setdefault(name, path)) != path:
            raise _twins(twin, path)
    return by_name


def _twins(one: Path, other: Path) -> DataError:
    return DataError(
        f"{printable(str(one))} and {printable(str(other))} have one name. Expected one file for each name:"
        " move the other elsewhere."
    )


# -- lists -------------------------------------------------------------------------------------------


def listed_names(path: Path) -> tuple[list[str], tuple[LeftOut, ...]]:
    """The names in a list as VOC has them, each once. A line may say more: after -1 stands what is not there.

    Left out are the photos that VOC's lists of a class mark with -1, since they do not show it. Raises
    DataError for an empty list.
    """
    lines = [line.split() for line in lines_of(path)]
    wanted = [words[0] for words in lines if words[1:] != ["-1"]]
    named = printable(str(path))
    absent = [LeftOut(printable(words[0]), f"marked -1 in {named}") for words in lines if words[1:] == ["-1"]]
    names, repeated = once_each(wanted, path)
    if not names:
        raise DataError(f"{named} names no photo." + (f" All {len(absent)} are marked -1." if absent else ""))
    return names, (*absent, *repeated)


def files_called(folder: Path, names: Sequence[str], listed: Path) -> tuple[Path, ...]:
    """The photo or mask of each listed name, with or without its extension.

    Raises DataError where there is none, or several.
    """
    by_stem: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if is_image(path.name):
            by_stem[path.stem].append(path)

    def called(name: str) -> Path:
        for spelling in spelled(name):
            whole = folder / spelling
            if is_image(whole.name) and os.path.isfile(whole):
                return whole
            if len(found := by_stem.get(spelling, [])) > 1:
                raise _twins(found[0], found[1])
            if found:
                return found[0]
        raise DataError(
            f"{printable(str(listed))} names {printable(name)}, but there is no"
            f" {printable(str(folder / name))} with .jpg, .png or another photo's extension."
        )

    return tuple(map(called, names))
