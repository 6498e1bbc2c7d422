"""Photos with a segmentation mask each: VOC, ADE20k, or folders images/ and masks/.

train, val = train_and_val("VOCdevkit/VOC2012")
ids = val.mask(0)                      # (h, w), -1 where the pixel has no class
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Int
from PIL import ExifTags, Image, UnidentifiedImageError

from vitreg.errors import DataError
from vitreg.evals.datasets.classes import Source, photos_in
from vitreg.evals.features import spread

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip
VOID = 255  # in VOC, and by custom elsewhere: the pixel has no class


@dataclass(frozen=True)
class Masked:
    """Photos, the file with each one's mask, and what the masks' ids are called.

    Ids are 0 to len(classes) - 1 or one of `ignore`, which may lie in that range too (ADE20k's 0).
    """

    root: str
    paths: tuple[Path, ...]
    masks: tuple[Path, ...]
    classes: tuple[str, ...]
    ignore: tuple[int, ...]
    split: str

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
        return replace(self, paths=other.paths + self.paths, masks=other.masks + self.masks)

    @property
    def names(self) -> tuple[str, ...]:
        """The classes that count: all but the ignored ids. `mask` numbers them in this order."""
        return tuple(name for i, name in enumerate(self.classes) if i not in self.ignore)

    def mask(self, i: int) -> Int[np.ndarray, "h w"]:
        """The i-th mask in its own size: positions in `names`, -1 for ignored pixels.

        Raises DataError if it has another size than its photo, or an id that is no class.
        """
        ids = read_mask(self.masks[i])
        if ids.shape != (found := photo_size(self.paths[i])):
            raise DataError(
                f"{self.masks[i]} is {ids.shape[1]} x {ids.shape[0]} pixels, but its photo is"
                f" {found[1]} x {found[0]}. Expected one id for each pixel of the photo."
            )
        odd = set(np.unique(ids).tolist()) - set(range(len(self.classes))) - set(self.ignore)
        if odd:
            raise DataError(
                f"{self.masks[i]} has the id {min(odd)}, but {self.root} has {len(self.classes)} classes"
                f" (0 to {len(self.classes) - 1}) and ignores {list(self.ignore)}."
                " Set the number of classes, or which id to ignore."
            )
        return _renumbering(len(self.classes), self.ignore)[ids]

    def check(self) -> None:
        """Read all masks. Raises DataError for the first bad one, and where all are of one class."""
        seen: set[int] = set()
        for i in range(len(self)):
            seen |= set(np.unique(self.mask(i)).tolist())
        seen.discard(-1)
        if len(seen) < 2:
            what = f"one class only ({self.names[min(seen)]})" if seen else "no class at all"
            raise DataError(f"the {len(self)} masks of {self.root} ({self.split}) hold {what}.")


def _renumbering(classes: int, ignore: Sequence[int]) -> Int[np.ndarray, " ids"]:
    table = np.full(max(classes, *ignore, 0) + 1, -1)
    kept = [i for i in range(classes) if i not in ignore]
    table[kept] = range(len(kept))
    return table


def read_mask(path: Path) -> Int[np.ndarray, "h w"]:
    """The ids in a mask, (h, w): a palette's indices or grey values, of 8 or 16 bits.

    Raises DataError for a colour picture and for a file that cannot be read.
    """
    try:
        with Image.open(path) as image:
            if image.mode not in ("P", "L", "1", "I", "I;16", "I;16B"):
                raise DataError(
                    f"{path} is a colour picture ({image.mode}), not a mask. Expected one id per pixel:"
                    " a palette or greyscale PNG."
                )
            return np.array(image).astype(np.int64)
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise DataError(f"the mask {path} cannot be read: {error}") from error


def photo_size(path: Path) -> tuple[int, int]:
    """(height, width) of a photo once it is upright, from its header."""
    try:
        with Image.open(path) as image:
            # Not a PNG's EXIF, to find which Pillow decodes the whole picture.
            exif = image.getexif() if image.format != "PNG" else {}
            lying = exif.get(ExifTags.Base.Orientation, 1) >= 5
            return (image.width, image.height) if lying else (image.height, image.width)
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"the photo {path} cannot be read: {error}") from error


# -- layouts -----------------------------------------------------------------------------------------


def train_and_val(
    source: Source, classes: int | None = None, ignore: int | None = None, limit: int | None = None
) -> tuple[Masked | None, Masked]:
    """The training and the validation photos of a data set in a layout that is known here.

    Without a split of its own, all its photos are the second and the first is None. For images/ and masks/,
    `classes` says how many there are and `ignore` which id is none, besides 255. `limit`: so many
    of each, evenly spread. Raises DataError for another layout, a photo or a mask without the other, or masks
    that `Masked.check` refuses.
    """
    train, val = _recognised(Path(source), classes, ignore)
    val = val.some(spread(len(val), limit))
    val.check()
    if train is not None:
        train = train.some(spread(len(train), limit))
        train.check()
    return train, val


def _recognised(root: Path, classes: int | None, ignore: int | None) -> tuple[Masked | None, Masked]:
    if (root / "SegmentationClass").is_dir():
        lists = root / "ImageSets" / "Segmentation"
        if (lists / "train.txt").exists() and (lists / "val.txt").exists():
            return voc(root, "train"), voc(root, "val")
        return None, voc(root, "trainval")
    if (root / "annotations" / "training").is_dir():
        return ade20k(root)
    if (root / "images").is_dir():
        return None, _of_folder(root, root, "all", classes, ignore)
    if (root / "train").is_dir() and (root / "val").is_dir():
        return folder(root, classes, ignore)
    raise DataError(
        f"{root} has no layout that is known here. Expected VOC (SegmentationClass/, ImageSets/), ADE20k"
        " (images/training/, annotations/training/), or images/ and masks/, perhaps in train/ and val/."
    )


def voc(root: Source, split: str) -> Masked:
    """PASCAL VOC: 21 classes with the background, 255 (object borders) ignored.

    `split` names a list in ImageSets/Segmentation. Raises DataError where it names a missing file.
    """
    root = Path(root)
    listed = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    if not listed.exists():
        raise DataError(f"there is no {listed}. Expected the names of {split}'s photos, one per line.")
    names = listed.read_text(encoding="utf-8").split()
    if not names:
        raise DataError(f"{listed} is empty.")
    paths = [root / "JPEGImages" / f"{name}.jpg" for name in names]
    masks = [root / "SegmentationClass" / f"{name}.png" for name in names]
    for path in [*paths, *masks]:
        if not path.exists():
            raise DataError(f"{listed} names {path.stem}, but there is no {path}.")
    return Masked(str(root), tuple(paths), tuple(masks), VOC_CLASSES, (VOID,), split)


def ade20k(root: Source) -> tuple[Masked, Masked]:
    """ADE20k as in the scene parsing challenge of 2016: 150 classes, numbered from 1; 0 is ignored."""
    root = Path(root)
    classes = ("other", *(f"class {i}" for i in range(1, 151)))
    parts = []
    for split in ("training", "validation"):
        paths, masks = paired(root / "images" / split, root / "annotations" / split, "mask")
        parts.append(Masked(str(root), paths, masks, classes, (0,), split))
    return parts[0], parts[1]


def folder(root: Source, classes: int | None = None, ignore: int | None = None) -> tuple[Masked, Masked]:
    """train/images, train/masks, val/images, val/masks. Without `classes`: as many as the masks have."""
    root = Path(root)
    train, val = (_of_folder(root, root / split, split, classes, ignore) for split in ("train", "val"))
    most = max(train.classes, val.classes, key=len)
    return replace(train, classes=most), replace(val, classes=most)


def _of_folder(root: Path, place: Path, split: str, classes: int | None, ignore: int | None) -> Masked:
    paths, masks = paired(place / "images", place / "masks", "mask")
    ignored = (VOID,) if ignore is None else tuple(sorted({VOID, ignore}))
    if classes is None:
        classes = 1 + max(_largest_id(mask, ignored) for mask in masks)
    return Masked(str(root), paths, masks, tuple(f"class {i}" for i in range(classes)), ignored, split)


def _largest_id(mask: Path, ignored: Sequence[int]) -> int:
    ids = read_mask(mask)
    return int(ids[~np.isin(ids, ignored)].max(initial=-1))


def paired(images: Path, others: Path, what: str) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Photos and their annotations: files of one name in two folders, whatever their extensions.

    Raises DataError for one without the other; `what` is the annotation's name.
    """
    photos, annotations = (_by_name(folder) for folder in (images, others))
    for name in sorted(photos.keys() - annotations.keys()):
        raise DataError(f"{photos[name]} has no {what}. Expected a file called {name} in {others}.")
    for name in sorted(annotations.keys() - photos.keys()):
        raise DataError(f"{annotations[name]} has no photo. Expected a file called {name} in {images}.")
    names = sorted(photos)
    return tuple(photos[name] for name in names), tuple(annotations[name] for name in names)


def _by_name(folder: Path) -> dict[str, Path]:
    return {str(path.relative_to(folder).with_suffix("")): path for path in photos_in(folder)}
