"""Photos with a segmentation mask each: VOC, ADE20k, or folders of photos and of masks.

train, val = train_and_val("VOCdevkit/VOC2012")
ids = val.mask(0)                      # (h, w), -1 where the pixel has no class
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Int

from vitreg.data.datasets.classes import ClassSource
from vitreg.data.datasets.ids import Colour, Stored, photo_size, read_mask, read_stored
from vitreg.data.datasets.paired import PairedFiles, files_called, listed_names, paired
from vitreg.data.evenly_spaced import evenly_spaced
from vitreg.data.listing import LeftOut, notes_on, printable
from vitreg.errors import DataError

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip
VOID = 255  # in VOC, and by custom elsewhere: the pixel has no class
_MOST_CLASSES = 4096  # ADE20k in full has 3,688
FOREGROUND = 255  # in masks that hold it and 0 only


@dataclass(frozen=True)
class Masked:
    """Photos, the file with each one's mask, and what the masks' ids are called.

    A pixel's id is one of `ids` (of each class in turn; if empty, 0 to len(classes) - 1) or one of `ignore`,
    which may lie among those too (ADE20k's 0). `notes` say how ids were read, and what was left out.
    """

    root: str
    paths: tuple[Path, ...]
    masks: tuple[Path, ...]
    classes: tuple[str, ...]
    ignore: tuple[int, ...]
    split: str
    ids: tuple[int, ...] = ()
    guesses: tuple[str, ...] = ()
    left_out: tuple[LeftOut, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def some(self, positions: Sequence[int]) -> "Masked":
        """The photos at these positions."""
        paths, masks = (tuple(files[i] for i in positions) for files in (self.paths, self.masks))
        return replace(self, paths=paths, masks=masks)

    def after(self, other: "Masked | None") -> "Masked":
        """The other's photos, then these, as one data set of the same classes."""
        if other is None:
            return self
        return replace(
            self,
            paths=other.paths + self.paths,
            masks=other.masks + self.masks,
            guesses=tuple(dict.fromkeys(other.guesses + self.guesses)),
            left_out=other.left_out + self.left_out,
        )

    @property
    def notes(self) -> tuple[str, ...]:
        return (*self.guesses, *notes_on(self.left_out))

    @property
    def names(self) -> tuple[str, ...]:
        """The classes that count: all but the ignored ids. `mask` numbers them in this order."""
        return tuple(name for i, name in zip(self._ids, self.classes, strict=True) if i not in self.ignore)

    @property
    def _ids(self) -> tuple[int, ...]:
        return self.ids or tuple(range(len(self.classes)))

    def mask(self, i: int) -> Int[np.ndarray, "h w"]:
        """The i-th mask in its own size: positions in `names`, -1 for ignored pixels.

        Raises DataError if it has another size than its photo, or an id that is no class.
        """
        return self._numbered(i, read_stored(self.masks[i]))

    def _numbered(self, i: int, stored: Stored) -> Int[np.ndarray, "h w"]:
        ids, named = stored.ids, printable(str(self.masks[i]))
        if ids.shape != (found := photo_size(self.paths[i])):
            raise DataError(
                f"{named} is {ids.shape[1]} x {ids.shape[0]} pixels, but its photo is"
                f" {found[1]} x {found[0]}. Expected one id for each pixel of the photo."
            )
        present = np.unique(ids)
        if odd := set(present.tolist()) - set(self._ids) - set(self.ignore):
            raise DataError(
                f"{named} has the id {min(odd)}, but {self.root} has {len(self.classes)} classes"
                f" ({min(self._ids)} to {max(self._ids)}) and ignores {list(self.ignore)}."
                " Set the number of classes, or which id to ignore."
            )
        numbers = {one: k for k, one in enumerate(one for one in self._ids if one not in self.ignore)}
        table = np.full(present[-1] - present[0] + 1, -1)
        for one in present.tolist():
            table[one - present[0]] = numbers.get(one, -1)
        return table[ids - present[0]]

    def check(self) -> None:
        """Read all masks. Raises DataError for the first bad one, where all are of one class, and where an id
        has other colours in other masks: then it stands for other things."""
        seen: set[int] = set()
        colours: dict[int, tuple[Colour, Path]] = {}
        for i, path in enumerate(self.masks):
            stored = read_stored(path)
            seen |= set(np.unique(self._numbered(i, stored)).tolist())
            for one, colour in stored.colours.items():
                known, where = colours.setdefault(one, (colour, path))
                if known != colour and one not in self.ignore:
                    raise DataError(
                        f"the id {one} is of the colour {colour} in {printable(str(path))}, but {known} in"
                        f" {printable(str(where))}. Expected one palette, so that an id is one class."
                    )
        seen.discard(-1)
        if len(seen) < 2:
            what = f"one class only ({self.names[min(seen)]})" if seen else "no class at all"
            said = "".join(f" {guess}" for guess in self.guesses)
            raise DataError(f"the {len(self)} masks of {self.root} ({self.split}) hold {what}.{said}")


# -- layouts -----------------------------------------------------------------------------------------


def train_and_val(
    source: ClassSource, classes: int | None = None, ignore: int | None = None, limit: int | None = None
) -> tuple[Masked | None, Masked]:
    """The training and the validation photos of a data set in a layout that is known here.

    Without a split of its own, all its photos are the second and the first is None. `classes` says how many
    there are (default: VOC's 21, ADE20k's 150, elsewhere as many as the masks hold) and `ignore` which id is
    none, besides 255; a note says how ids were read. `limit`: so many of each, evenly spread. Raises
    DataError for another layout, a photo or a mask without the other, or masks that `Masked.check` refuses.
    """
    if classes is not None and classes < 2:
        raise DataError(f"classes={classes}: expected at least 2.")
    train, val = _recognised(Path(source), classes, ignore)
    val = val.some(evenly_spaced(len(val), limit))
    val.check()
    if train is not None:
        train = train.some(evenly_spaced(len(train), limit))
        train.check()
    return train, val


def _recognised(root: Path, classes: int | None, ignore: int | None) -> tuple[Masked | None, Masked]:
    if (root / "SegmentationClass").is_dir():
        lists = root / "ImageSets" / "Segmentation"
        if (lists / "train.txt").exists() and (lists / "val.txt").exists():
            return voc(root, "train", classes, ignore), voc(root, "val", classes, ignore)
        return None, voc(root, "trainval", classes, ignore)
    if (root / "annotations" / "training").is_dir():
        return ade20k(root, classes, ignore)
    if (root / "images").is_dir():
        return None, _of_folders(root, {"all": (root / "images", root / "masks")}, classes, ignore)[0]
    if (root / "train").is_dir() and (root / "val").is_dir():
        return folder(root, classes, ignore)
    raise DataError(
        f"{printable(str(root))} has no layout that is known here. Expected VOC (SegmentationClass/,"
        " ImageSets/), images/training/ and annotations/training/ (ADE20k, mmsegmentation), or images/ and"
        " masks/, perhaps in train/ and val/."
    )


def voc(root: ClassSource, split: str, classes: int | None = None, ignore: int | None = None) -> Masked:
    """PASCAL VOC: 21 classes with the background, 255 (object borders) ignored.

    `split` names a list in ImageSets/Segmentation. Raises DataError where it names a missing file.
    """
    root = Path(root)
    listed = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    if not listed.exists():
        raise DataError(
            f"there is no {printable(str(listed))}. Expected the names of {split}'s photos, one per line."
        )
    names, left_out = listed_names(listed)
    folders = (root / "JPEGImages", root / "SegmentationClass")
    paths, masks = (files_called(place, names, listed) for place in folders)
    called = VOC_CLASSES if classes in (None, len(VOC_CLASSES)) else _called(range(classes or 0))
    return Masked(str(root), paths, masks, called, _ignored(ignore), split, left_out=left_out)


def ade20k(root: ClassSource, classes: int | None = None, ignore: int | None = None) -> tuple[Masked, Masked]:
    """images/ and annotations/ with training/ and validation/, as ADE20k and mmsegmentation have them.

    ADE20k itself is known by its masks' names (ADE_...): 150 classes, numbered from 1; 0 is ignored. Of
    others, ids are read as everywhere.
    """
    root = Path(root)
    splits = {
        split: (root / "images" / split, root / "annotations" / split) for split in ("training", "validation")
    }
    if classes is not None or ignore is not None:
        return _two(_of_folders(root, splits, classes, ignore))
    pairs = {split: paired(*places, "mask") for split, places in splits.items()}
    if not all(mask.name.startswith("ADE_") for pair in pairs.values() for mask in pair.others):
        return _two(_of_folders(root, splits, None, None))
    called = ("other", *_called(range(1, 151)))
    guess = "The masks are called as ADE20k's: ids 1 to 150 are its classes, 0 is none."
    return _two([_masked(root, split, pair, called, (0,), (), guess) for split, pair in pairs.items()])


def folder(root: ClassSource, classes: int | None = None, ignore: int | None = None) -> tuple[Masked, Masked]:
    """train/images, train/masks, val/images, val/masks. Without `classes`: as many as the masks have."""
    root = Path(root)
    splits = {split: (root / split / "images", root / split / "masks") for split in ("train", "val")}
    return _two(_of_folders(root, splits, classes, ignore))


def _two(parts: Sequence[Masked]) -> tuple[Masked, Masked]:
    train, val = parts
    return train, val


def _of_folders(
    root: Path, splits: dict[str, tuple[Path, Path]], classes: int | None, ignore: int | None
) -> list[Masked]:
    """Each split's photos and masks, from its two folders; ids mean the same in all."""
    pairs = {split: paired(*places, "mask") for split, places in splits.items()}
    masks = [mask for pair in pairs.values() for mask in pair.others]
    ignored, binary = _ignored(ignore), False
    if classes in (None, 2):
        present = _ids_in(masks)
        binary = ignore is None and present == {0, FOREGROUND}
        classes = classes or _number_of_classes(root, present - set(ignored))
    assert classes is not None
    guess = f"Ids 0 to {classes - 1} of the masks are classes, {' and '.join(map(str, ignored))} none."
    called, ids = _called(range(classes)), tuple[int, ...]()
    if binary:
        guess = "The masks hold 0 and 255 only: 255 is the foreground. Set ignore=255 if it is not a class."
        called, ids, ignored = ("background", "foreground"), (0, FOREGROUND), ()
    return [_masked(root, split, pair, called, ignored, ids, guess) for split, pair in pairs.items()]


def _masked(
    root: Path,
    split: str,
    pairs: PairedFiles,
    called: tuple[str, ...],
    ignored: tuple[int, ...],
    ids: tuple[int, ...],
    guess: str,
) -> Masked:
    return Masked(
        str(root), pairs.photos, pairs.others, called, ignored, split, ids, (guess,), pairs.left_out
    )


def _number_of_classes(root: Path, ids: set[int]) -> int:
    largest = max(ids, default=0)
    if largest > _MOST_CLASSES:
        raise DataError(
            f"the masks of {printable(str(root))} have ids up to {largest}: objects rather than classes, or"
            " colours. Expected ids from 0; set the number of classes if they are meant."
        )
    return max(largest, 0) + 1


def _called(numbers: range) -> tuple[str, ...]:
    return tuple(f"class {i}" for i in numbers)


def _ignored(ignore: int | None) -> tuple[int, ...]:
    return tuple(sorted({VOID, VOID if ignore is None else ignore}))


def _ids_in(masks: Sequence[Path]) -> set[int]:
    return {int(one) for mask in masks for one in np.unique(read_mask(mask))}
