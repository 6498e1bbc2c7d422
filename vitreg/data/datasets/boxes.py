"""Photos with the boxes of their objects: Pascal VOC folders, COCO folders.

photos = boxed_photos("VOCdevkit/VOC2012")                        # ImageSets/Main/trainval.txt
photos = boxed_photos("coco", names="coco20k.txt")                # annotations/instances_train2014.json
photos.boxes[0]                                                   # (k, 4), xyxy pixels
"""

import contextlib
import math
import os
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vitreg.data.datasets.coco import Coco, read_coco
from vitreg.data.datasets.paired import files_called, listed_names
from vitreg.data.decoding import upright_size
from vitreg.data.listing import (
    LeftOut,
    counted,
    is_image,
    lines_of,
    notes_on,
    once_each,
    printable,
    spelled,
    walk,
)
from vitreg.errors import DataError

_SLACK = 1.0  # pixels that boxes may reach beyond the photo: some of VOC's count from 0
_CUT = "are cut at the edge of their photo"
Size = tuple[int, int]
Corners = tuple[float, ...] | None  # left, top, right, bottom in pixels; None where they are not four numbers


@dataclass(frozen=True, eq=False)
class Boxed:
    """Photos, the (height, width) of each in pixels, and its boxes (k, 4), k > 0.

    Boxes are (left, top, right, bottom) in pixels from the photo's corner, right and bottom excluded.
    `root` is how the data are called in results, `notes` say what was guessed, and left out (`left_out`).
    """

    root: str
    paths: tuple[Path, ...]
    sizes: tuple[Size, ...]
    boxes: tuple[Tensor, ...]
    guesses: tuple[str, ...] = ()
    left_out: tuple[LeftOut, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        return (*self.guesses, *notes_on(self.left_out))


def boxed_photos(source: str | Path, split: str | None = None, names: str | None = None) -> Boxed:
    """The photos of a VOC or a COCO folder that have boxes, in the order of its list.

    `split` is VOC's list in ImageSets/Main (default trainval), or COCO's name in
    annotations/instances_NAME.json (default train2014), whose photos lie in NAME/ or images/NAME/. `names`
    is a text file with the file names of some of COCO's photos.

    Photos without an object and boxes that are none are left out, and counted and named in the notes. A
    photo's size is its own where the annotation states none. Raises DataError for what does not hold
    together.
    """
    root = Path(source)
    if (root / "Annotations").is_dir():
        if names is not None:
            raise DataError(
                f"{root} is a VOC folder: it takes a split of its ImageSets/Main, no files={names}."
            )
        return _voc(root, split or "trainval")
    if (root / "annotations").is_dir():
        return _coco(root, split or "train2014", names)
    raise DataError(
        f"{printable(str(root))} has neither Annotations/ (VOC: beside JPEGImages/ and ImageSets/Main/) nor"
        " annotations/ (COCO: with instances_train2014.json, beside train2014/)."
    )


@dataclass(frozen=True)
class _Annotated:
    """A photo, the size that its annotation states, and its boxes, each with what it is called in notes."""

    photo: Path
    size: Size | None
    boxes: list[tuple[str, Corners]]


# -- VOC ---------------------------------------------------------------------------------------------


def _voc(root: Path, split: str) -> Boxed:
    listed = root / "ImageSets" / "Main" / f"{split}.txt"
    names, left_out = listed_names(listed)
    photos = files_called(root / "JPEGImages", names, listed)
    annotations = [root / "Annotations" / f"{photo.stem}.xml" for photo in photos]
    for name, annotation in zip(names, annotations, strict=True):
        if not annotation.is_file():
            raise DataError(
                f"{printable(str(listed))} names {printable(name)}, but there is no"
                f" {printable(str(annotation))}."
            )
    annotated = (_voc_annotation(*both) for both in zip(annotations, photos, strict=True))
    return _boxed(str(root), annotated, left_out)


def _voc_annotation(path: Path, photo: Path) -> _Annotated:
    """VOC counts pixels from 1 and includes the last."""
    named = printable(str(path))
    try:
        tree = ET.fromstring(path.read_bytes())
    except (ET.ParseError, ValueError, LookupError) as error:  # no XML, or in an encoding that it is not
        raise DataError(f"{named} is not valid XML: {error}.") from error
    sides = [_number(tree.findtext(f"size/{side}")) for side in ("height", "width")]
    boxes: list[tuple[str, Corners]] = []
    for i, item in enumerate(tree.findall("object"), 1):
        corners = [_number(item.findtext(f"bndbox/{name}")) for name in ("xmin", "ymin", "xmax", "ymax")]
        known = [value for value in corners if value is not None]
        boxes.append((f"{named}, object {i}", _from_one(known) if len(known) == 4 else None))
    return _Annotated(photo, _size(*sides), boxes)


def _from_one(corners: list[float]) -> Corners:
    left, top, right, bottom = corners
    return left - 1, top - 1, right, bottom


def _number(value: object) -> float | None:
    """A finite number, also as text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _size(height: float | None, width: float | None) -> Size | None:
    """None where it is not stated, or as 0."""
    return (int(height), int(width)) if height and width and height >= 1 and width >= 1 else None


# -- COCO --------------------------------------------------------------------------------------------


def _coco(root: Path, split: str, names: str | None) -> Boxed:
    path = root / "annotations" / f"instances_{split}.json"
    folder = next((f for f in (root / split, root / "images" / split) if f.is_dir()), None)
    if folder is None:
        raise DataError(
            f"there is no folder {printable(str(root / split))}, nor"
            f" {printable(str(root / 'images' / split))}: expected photos."
        )
    coco = read_coco(path)
    wanted, left_out = _wanted(coco, path, names)
    annotated = [_coco_annotation(coco, folder, path, name) for name in wanted]
    if names is None:
        left_out += coco.left_out + _unnamed(folder, coco, path)
    return _boxed(str(root), annotated, left_out)


def _wanted(coco: Coco, path: Path, names: str | None) -> tuple[list[str], list[LeftOut]]:
    """The file names of the photos that were asked for."""
    if names is None:
        return sorted(coco.photos), []
    listed = Path(names)
    given, repeated = once_each(lines_of(listed), listed)
    spellings = {name: [one for one in spelled(name) if one in coco.photos] for name in given}
    for name, known in spellings.items():
        if not known:
            raise DataError(f"{names} names {printable(name)}, which is not in {printable(str(path))}.")
    if not given:
        raise DataError(f"{names} names no photo.")
    return [known[0] for known in spellings.values()], repeated


def _coco_annotation(coco: Coco, folder: Path, path: Path, name: str) -> _Annotated:
    photo, entry = folder / name, coco.photos[name]
    if not os.path.isfile(photo):
        raise DataError(
            f"{printable(str(path))} names {printable(name)}, but there is no {printable(str(photo))}."
        )
    boxes = [(called, _from_sides(bbox)) for called, bbox in entry.boxes]
    return _Annotated(photo, _size(_number(entry.height), _number(entry.width)), boxes)


def _from_sides(bbox: object) -> Corners:
    """Of COCO's left, top, width, height."""
    values = [_number(value) for value in bbox] if isinstance(bbox, list) else []
    known = [value for value in values if value is not None]
    if len(values) != 4 or len(known) != 4:
        return None
    left, top, width, height = known
    return left, top, left + width, top + height


def _unnamed(folder: Path, coco: Coco, path: Path) -> list[LeftOut]:
    """The photos in the folder that the JSON does not name, and what a folder's reader leaves out."""
    found, named = walk(str(folder)), {str(folder / name) for name in coco.photos}
    strange = [file for file in found.paths if is_image(file) and file not in named]
    return [*found.left_out, *(LeftOut(printable(file), f"not in {path.name}") for file in strange)]


# -- both --------------------------------------------------------------------------------------------


def _boxed(root: str, annotated: Iterable[_Annotated], left_out: Iterable[LeftOut]) -> Boxed:
    """The photos that have boxes, each box inside its photo."""
    out, unsized, cut = [*left_out], [], []
    found: list[tuple[Path, Size, Tensor]] = []
    for one in annotated:
        photo = printable(str(one.photo))
        if (size := _checked_size(one)) is None:
            out.append(LeftOut(photo, "its size is not stated, nor can it be read"))
            continue
        kept = []
        for called, corners in one.boxes:
            inside, why = _inside(corners, size)
            if inside is None:
                out.append(LeftOut(called, why))
            else:
                kept.append(inside)
                cut += [called] if why else []
        if kept:
            found.append((one.photo, size, torch.tensor(kept)))
            unsized += [photo] if one.size is None else []
        else:
            out.append(LeftOut(photo, "no usable box" if one.boxes else "no object"))
    if not found:
        raise DataError(
            f"no photo of {root} has a box. {' '.join(f'{note}.' for note in notes_on(out))}".strip()
        )
    guesses = {
        "photos have the size of their files, because their annotations state none": unsized,
        f"boxes {_CUT}": cut,
    }
    paths, sizes, boxes = zip(*found, strict=True)
    said = tuple(counted(what, names) for what, names in guesses.items() if names)
    return Boxed(root, paths, sizes, boxes, said, tuple(out))


def _checked_size(one: _Annotated) -> Size | None:
    """The photo's size, stated or its own. Raises DataError for a photo that is not of the size that its
    boxes are for; not if it is unreadable."""
    own: Size | None = None
    with contextlib.suppress(Exception):  # decoders raise what they like
        own = upright_size(str(one.photo))
    if own and one.size and own != one.size:
        raise DataError(
            f"{printable(str(one.photo))} is of {own[1]}x{own[0]} pixels (width x height), but its annotation"
            f" says {one.size[1]}x{one.size[0]}."
        )
    return one.size or own


def _inside(corners: Corners, size: Size) -> tuple[Corners, str]:
    """The part of a box that lies in its photo, or None; and what to say of the box, if anything."""
    if corners is None:
        return None, "a box that is not four numbers"
    height, width = size
    inside = tuple(
        min(max(value, 0.0), side) for value, side in zip(corners, (width, height) * 2, strict=True)
    )
    left, top, right, bottom = inside
    if left >= right or top >= bottom:
        return None, "a box without an area in its photo"
    beyond = max(abs(a - b) for a, b in zip(corners, inside, strict=True))
    return inside, _CUT if beyond > _SLACK else ""
