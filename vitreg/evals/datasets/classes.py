"""Photos with one class each: a folder per class, or WordNet ids in the names.

train, val = splits("imagenette/")
photos = by_wordnet("photos/", classes=1000)
"""

import os
from dataclasses import dataclass
from pathlib import Path

from vitreg.decoding import photo_extensions
from vitreg.errors import DataError
from vitreg.labels import class_of, wordnet_classes

Source = str | Path


@dataclass(frozen=True)
class Labelled:
    """Photos, the class of each, and the classes' names. `root` is how the data are called in results."""

    root: str
    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]


def photos_in(folder: Path) -> list[Path]:
    """The photos below a folder, sorted. Raises DataError if there are none."""
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}.")
    walk = os.walk(folder, followlinks=True)  # subsets are often made of links to folders
    paths = (Path(where, name) for where, _, names in walk for name in names if not name.startswith("."))
    found = sorted(path for path in paths if path.suffix.lower() in photo_extensions())
    if not found:
        raise DataError(f"{folder} holds no photo. Expected .jpg, .png, ... in it or in its folders.")
    return found


def by_wordnet(source: Source, classes: int) -> Labelled:
    """Photos for a head of so many classes: labels from WordNet ids, else from as many sorted folders.

    Of a folder with `val/` in it, that. Raises DataError where a photo has no class.
    """
    root = Path(source)
    folder = root / "val" if (root / "val").is_dir() else root
    paths = photos_in(folder)
    known = wordnet_classes(classes)
    labels = [class_of(str(path.relative_to(folder.parent)), known) for path in paths]
    if None not in labels:
        return Labelled(str(source), tuple(paths), tuple(x for x in labels if x is not None), tuple(known))
    folders = sorted({path.parent.name for path in paths})
    if len(folders) == classes:
        return _by_folder(str(source), paths, folders)
    unnamed = [path for path, label in zip(paths, labels, strict=True) if label is None]
    raise DataError(
        f"{len(unnamed)} of {len(paths)} photos have no class of this {classes}-way head, such as"
        f" {unnamed[0]}. Expected ImageNet's WordNet ids (n01440764) in file or folder names,"
        " or one folder for each class."
    )


def splits(source: Source) -> tuple[Labelled, Labelled]:
    """The train/ and val/ folders of a data set with a folder for each class in both.

    Raises DataError where one is missing, classes differ, or there is one class only.
    """
    root = Path(source)
    train, val = (_folders(source, root / name) for name in ("train", "val"))
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))
        raise DataError(f"train/ and val/ of {root} have other classes: {', '.join(odd[:5])} in one only.")
    return train, val


def _folders(source: Source, folder: Path) -> Labelled:
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}. Expected train/CLASS/... and val/CLASS/...")
    paths = photos_in(folder)
    names = sorted({path.relative_to(folder).parts[0] for path in paths if path.parent != folder})
    loose = [path for path in paths if path.parent == folder]
    if loose:
        raise DataError(f"{loose[0]} lies in no class's folder. Expected {folder}/CLASS/photo.jpg.")
    if len(names) < 2:
        raise DataError(f"{folder} holds one class only ({names[0]}): there is nothing to tell apart.")
    return _by_folder(str(source), paths, names, folder)


def _by_folder(source: str, paths: list[Path], names: list[str], folder: Path | None = None) -> Labelled:
    number = {name: i for i, name in enumerate(names)}
    labels = [number[path.relative_to(folder).parts[0] if folder else path.parent.name] for path in paths]
    return Labelled(source, tuple(paths), tuple(labels), tuple(names))
