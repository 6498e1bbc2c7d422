"""Photos with one class each: a folder per class, or WordNet ids in the names.

train, val = splits("imagenette/")
photos = by_wordnet("photos/", classes=1000)
"""

import re
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from pathlib import Path

from vitreg.data.imagenet import (
    class_of,
    clip_names,
    numbers_of_names,
    plain,
    wordnet_classes,
    wordnet_id,
    wordnet_names,
)
from vitreg.data.listing import LeftOut, counted, list_photos, notes_on, printable
from vitreg.errors import DataError

ClassSource = str | Path
_NUMBER = r"-?[0-9]{1,9}"


@dataclass(frozen=True)
class Labelled:
    """Photos, the class of each, and the classes' names. `root` is how the data are called in results.

    `notes` say what was guessed, and what was left out (`left_out`).
    """

    root: str
    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    guesses: tuple[str, ...] = ()
    left_out: tuple[LeftOut, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        return (*self.guesses, *notes_on(self.left_out))


def by_wordnet(source: ClassSource, classes: int, names: Sequence[str] = ()) -> Labelled:
    """Photos for a head of so many classes, which may have `names`. Of a folder with `val/` in it, that.

    Labels are WordNet ids in file or folder names. Without any, they are the folders' names: what the head
    calls its classes, or numbers, or ImageNet's English names for a head of ImageNet's; else, for another
    head, as many sorted folders as it has classes, which a note says. Raises DataError where a photo has no
    class, or a name might be two.
    """
    root = Path(source)
    folder = root / "val" if (root / "val").is_dir() else root
    found = list_photos(folder)
    known = wordnet_classes(classes)
    given = [str(path.relative_to(folder.parent)) for path in found.paths]
    labels = [class_of(name, known) for name in given]
    called = tuple(names) or tuple(known) or tuple(map(str, range(classes)))
    if None not in labels:
        sure = tuple(label for label in labels if label is not None)
        return Labelled(str(source), found.paths, sure, called, left_out=found.left_out)
    if known and any(map(wordnet_id, given)):
        unnamed = [path for path, label in zip(found.paths, labels, strict=True) if label is None]
        raise _without_class(unnamed, len(given), classes)
    folders = ordered({path.parent.name for path in found.paths})
    number, guess = _numbers(folders, classes, names) or (None, "")
    if number is None:
        english = {plain(name) for called in wordnet_names(classes) for name in called}
        strange = [path for path in found.paths if _is_strange(path.parent.name, english)]
        raise _without_class(strange or found.paths, len(given), classes)
    photos = Labelled(str(source), found.paths, (), called, (guess,), found.left_out)
    return _numbered(photos, lambda path: number[path.parent.name])


def _is_strange(folder: str, english: AbstractSet[str]) -> bool:
    return plain(folder) not in english and not re.fullmatch(_NUMBER, folder)


def _without_class(unnamed: Sequence[Path], photos: int, classes: int) -> DataError:
    return DataError(
        f"{len(unnamed)} of {photos} photos have no class of this {classes}-way head, such as"
        f" {printable(str(unnamed[0]))}. Expected ImageNet's WordNet ids (n01440764) in file or folder names,"
        " or a folder for each class, called by its name or its number from 0."
    )


def _numbers(
    folders: Sequence[str], classes: int, names: Sequence[str]
) -> tuple[dict[str, int | None], str] | None:
    """The class of each folder, None for those that hold none, and how it was found; None if it was not."""
    of_imagenet = bool(wordnet_classes(classes))
    if (own := numbers_of_names(folders, [[name] for name in names])) is not None:
        return {**own}, "Classes are the folders' names, as the head calls them."
    if (numbers := _as_numbers(folders)) is not None:
        found = _of_numbers(numbers, classes)
        if found is not None:
            return found
    elif (english := _of_english(folders, classes)) is not None:
        return {**english}, "Classes are the folders' names, as ImageNet's classes are called in English."
    if of_imagenet or len(folders) != classes:
        return None
    guess = f"A guess: the {classes} classes of the head are the folders in their order, 0 is {folders[0]!r}"
    return {name: i for i, name in enumerate(folders)}, f"{guess} and {classes - 1} is {folders[-1]!r}."


def _of_english(folders: Sequence[str], classes: int) -> dict[str, int] | None:
    """By WordNet's names for the classes of an ImageNet head; if they do not suffice, also by CLIP's."""
    names = wordnet_names(classes)
    if (found := numbers_of_names(folders, names)) is not None or not (others := clip_names(classes)):
        return found
    return numbers_of_names(folders, [(*a, *b) for a, b in zip(names, others, strict=True)])


def _as_numbers(folders: Sequence[str]) -> dict[str, int] | None:
    """What the folders' names are as numbers, if all are. Raises DataError for two of one number."""
    if not all(re.fullmatch(_NUMBER, name) for name in folders):
        return None
    numbers = {name: int(name) for name in folders}
    for name, number in numbers.items():
        if twin := next((other for other, n in numbers.items() if n == number and other != name), None):
            raise DataError(f"the folders {name} and {twin} are the same number. Put their photos together.")
    return numbers


def _of_numbers(numbers: dict[str, int], classes: int) -> tuple[dict[str, int | None], str] | None:
    """Folders 0 to classes - 1, or 1 to classes; -1 is no class. None for other numbers."""
    known = [number for number in numbers.values() if number != -1]
    first = 1 if known and max(known) == classes else 0
    if not known or min(known) < first or max(known) >= first + classes:
        return None
    how = f"Classes are the folders' numbers, {min(known)} to {max(known)}"
    how += ", less 1: the head counts from 0." if first else ", not their order as text."
    return {name: None if n == -1 else n - first for name, n in numbers.items()}, how


def _numbered(photos: Labelled, number: Callable[[Path], int | None]) -> Labelled:
    """With labels; photos of no class are left out."""
    labels = [(path, number(path)) for path in photos.paths]
    sure = [(path, label) for path, label in labels if label is not None]
    without = [LeftOut(printable(str(path)), "of no class") for path, label in labels if label is None]
    return replace(
        photos,
        paths=tuple(path for path, _ in sure),
        labels=tuple(label for _, label in sure),
        left_out=(*photos.left_out, *without),
    )


def ordered(names: Iterable[str]) -> list[str]:
    """Class folders in the order of their numbers, if all are numbers; else as text."""
    names = sorted(names)
    return sorted(names, key=int) if all(re.fullmatch(_NUMBER, name) for name in names) else names


# -- a folder for each class, whatever a head calls it -----------------------------------------------


def by_folder(source: ClassSource) -> Labelled:
    """Photos with the name of their folder as their class. Of a folder with `val/` in it, that.

    Raises DataError where there is one class only.
    """
    root = Path(source)
    found = list_photos(root / "val" if (root / "val").is_dir() else root)
    names = ordered({path.parent.name for path in found.paths})
    if len(names) < 2:
        raise DataError(
            f"{printable(str(source))} holds one class only ({printable(names[0])}): there is nothing to tell"
            " apart."
        )
    photos = Labelled(str(source), found.paths, (), tuple(names), left_out=found.left_out)
    return _numbered(photos, lambda path: names.index(path.parent.name))


def splits(source: ClassSource) -> tuple[Labelled, Labelled]:
    """The train/ and val/ folders of a data set with a folder for each class in both.

    Classes are in the order of the folders' names, or of their numbers if all are numbers. Raises DataError
    where a folder is missing, classes differ, or there is one class only.
    """
    root = Path(source)
    train, val = (_folders(source, root / name) for name in ("train", "val"))
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))
        raise DataError(
            f"train/ and val/ of {printable(str(root))} have other classes:"
            f" {', '.join(map(printable, odd[:5]))} in one only."
        )
    return train, val


def _folders(source: ClassSource, folder: Path) -> Labelled:
    if not folder.is_dir():
        raise DataError(
            f"there is no folder {printable(str(folder))}. Expected train/CLASS/... and val/CLASS/..."
        )
    found = list_photos(folder)
    names = ordered({path.relative_to(folder).parts[0] for path in found.paths if path.parent != folder})
    loose = [path for path in found.paths if path.parent == folder]
    if loose:
        raise DataError(
            f"{printable(str(loose[0]))} lies in no class's folder. Expected"
            f" {printable(str(folder))}/CLASS/photo.jpg."
        )
    if len(names) < 2:
        raise DataError(
            f"{printable(str(folder))} holds one class only ({printable(names[0])}): there is nothing to tell"
            " apart."
        )
    number = {name: i for i, name in enumerate(names)}
    empty = sorted(
        sub.name for sub in folder.iterdir() if sub.is_dir() and sub.name not in number and sub.name[0] != "."
    )
    guesses = (
        (counted(f"folders of {folder.name}/ hold no photo and are not classes", empty),) if empty else ()
    )
    photos = Labelled(str(source), found.paths, (), tuple(names), guesses, found.left_out)
    return _numbered(photos, lambda path: number[path.relative_to(folder).parts[0]])
