"""COCO's JSON of instances, as it is found in the wild: entries that are no use are left out and named."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitreg.data.listing import LeftOut, printable, text_in
from vitreg.errors import DataError


@dataclass
class CocoPhoto:
    """What the JSON states of a photo: its size, if it does, and the boxes of its objects, each with a name
    for messages. All as they stand there."""

    height: Any
    width: Any
    boxes: list[tuple[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Coco:
    """The photos by file name, and the entries that were left out, crowds among them."""

    photos: dict[str, CocoPhoto]
    left_out: list[LeftOut]


def read_coco(path: Path) -> Coco:
    """Read annotations/instances_NAME.json.

    Boxes belong to photos by image ids; ids of annotations do not matter, so that they need not be unique.
    Of several images with one file name, the boxes are taken together. Raises DataError for another JSON,
    and for one image id with two file names.
    """
    named = printable(str(path))
    if not path.is_file():
        raise DataError(f"there is no file {named}.")
    images, annotations = _parts(path, named)
    photos: dict[str, CocoPhoto] = {}
    owners: dict[Any, str] = {}
    left_out: list[LeftOut] = []
    for i, image in enumerate(images):
        one, name = _field(image, "id"), _field(image, "file_name")
        called = _called("image", one, i, path)
        if not isinstance(name, str) or not name or not _is_id(one):
            left_out.append(LeftOut(called, "without id or file_name"))
        elif owners.setdefault(one, name) != name:
            raise DataError(
                f"{named}: the image id {one} is that of {printable(owners[one])} and of {printable(name)}."
                " Expected an id for each, or boxes cannot be told apart."
            )
        elif name in photos:
            left_out.append(LeftOut(called, "its file is listed before; boxes are taken together"))
        else:
            photos[name] = CocoPhoto(_field(image, "height"), _field(image, "width"))
    if not photos:
        raise DataError(
            f"{named} is not COCO's JSON of instances: none of {len(images)} images has an id and a"
            " file_name."
        )
    for i, annotation in enumerate(annotations):
        called, owner = (
            _called("annotation", _field(annotation, "id"), i, path),
            _field(annotation, "image_id"),
        )
        if not _is_id(owner) or owner not in owners:
            left_out.append(LeftOut(called, "of no image that is listed"))
        elif _field(annotation, "iscrowd"):
            left_out.append(LeftOut(called, "a crowd's"))
        else:
            photos[owners[owner]].boxes.append((called, _field(annotation, "bbox")))
    return Coco(photos, left_out)


def _parts(path: Path, named: str) -> tuple[list[Any], list[Any]]:
    """The lists of images and of annotations."""
    try:
        document = json.loads(text_in(path.read_bytes()))
        parts = [document[name] for name in ("images", "annotations")]
        wrong = next((part for part in parts if not isinstance(part, list)), None)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, DataError) as error:
        raise DataError(
            f"{named} is not COCO's JSON of instances ({type(error).__name__}: {error})."
        ) from error
    if wrong is not None:
        raise DataError(
            f"{named} is not COCO's JSON of instances: expected lists of images and annotations, found a"
            f" {type(wrong).__name__}."
        )
    images, annotations = parts
    return images, annotations


def _field(entry: Any, name: str) -> Any:
    return entry.get(name) if isinstance(entry, dict) else None


def _is_id(value: Any) -> bool:
    return isinstance(value, int | float | str) and not isinstance(value, bool)


def _called(what: str, one: Any, place: int, path: Path) -> str:
    return f"{path.name}, {what} {one if _is_id(one) else f'no. {place + 1}'}"
