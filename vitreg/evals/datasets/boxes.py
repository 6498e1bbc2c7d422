"""Photos with the boxes of their objects: Pascal VOC folders, COCO folders.

photos = boxed_photos("VOCdevkit/VOC2012")                        # ImageSets/Main/trainval.txt
photos = boxed_photos("coco", names="coco20k.txt")                # annotations/instances_train2014.json
photos.boxes[0]                                                   # (k, 4), xyxy pixels
"""

import contextlib
import io
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import ExifTags, Image
from pycocotools.coco import COCO
from torch import Tensor

from vitreg.errors import DataError

_SLACK = 1.0  # pixels that VOC's boxes may reach beyond the photo: some count from 0


@dataclass(frozen=True, eq=False)
class Boxed:
    """Photos, the (height, width) of each in pixels, and its boxes (k, 4), k > 0.

    Boxes are (left, top, right, bottom) in pixels from the photo's corner, right and bottom excluded.
    `root` is how the data are called in results, `notes` say what was left out.
    """

    root: str
    paths: tuple[Path, ...]
    sizes: tuple[tuple[int, int], ...]
    boxes: tuple[Tensor, ...]
    notes: tuple[str, ...] = ()


def boxed_photos(source: str | Path, split: str | None = None, names: str | None = None) -> Boxed:
    """The photos of a VOC or a COCO folder that have boxes, in the order of its list.

    `split` is VOC's list in ImageSets/Main (default trainval), or COCO's name in
    annotations/instances_NAME.json (default train2014), whose photos lie in NAME/ or images/NAME/. `names`
    is a text file with the file names of some of COCO's photos. Raises DataError for what does not hold
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
        f"{root} has neither Annotations/ (VOC: beside JPEGImages/ and ImageSets/Main/) nor annotations/"
        " (COCO: with instances_train2014.json, beside train2014/)."
    )


# -- VOC ---------------------------------------------------------------------------------------------


def _voc(root: Path, split: str) -> Boxed:
    listed = root / "ImageSets" / "Main" / f"{split}.txt"
    numbers = [line.split()[0] for line in _text(listed).splitlines() if line.strip()]
    if not numbers:
        raise DataError(f"{listed} names no photo.")
    paths, sizes, boxes = [], [], []
    for number in numbers:
        annotation, photo = root / "Annotations" / f"{number}.xml", root / "JPEGImages" / f"{number}.jpg"
        if not annotation.is_file():
            raise DataError(f"{listed} names {number}, but there is no {annotation}.")
        if not photo.is_file():
            raise DataError(f"{annotation} has no photo: there is no {photo}.")
        size, found = _voc_boxes(annotation)
        _check_size(photo, size)
        paths.append(photo)
        sizes.append(size)
        boxes.append(found)
    return Boxed(str(root), tuple(paths), tuple(sizes), tuple(boxes))


def _voc_boxes(path: Path) -> tuple[tuple[int, int], Tensor]:
    """(height, width) and boxes (k, 4). VOC counts pixels from 1 and includes the last."""
    try:
        tree = ET.fromstring(path.read_bytes())
    except ET.ParseError as error:
        raise DataError(f"{path} is no valid XML: {error}.") from error
    height, width = (int(_number(path, tree, f"size/{side}")) for side in ("height", "width"))
    objects = tree.findall("object")
    if not objects:
        raise DataError(
            f"{path} has no box: expected <object> with <bndbox>. Leave the photo out of the split."
        )
    corners = ("xmin", "ymin", "xmax", "ymax")
    boxes = torch.tensor([[_number(path, item, f"bndbox/{name}") for name in corners] for item in objects])
    boxes[:, :2] -= 1
    if (wrong := _misplaced(boxes, (height, width))) is not None:
        shown = ", ".join(f"{value:g}" for value in (boxes[wrong] + torch.tensor([1.0, 1, 0, 0])).tolist())
        raise DataError(
            f"{path}: the box ({shown}) of object {wrong + 1} has no area or is not inside the photo of"
            f" {width}x{height} pixels (width x height)."
        )
    return (height, width), _clipped(boxes, (height, width))


def _number(path: Path, tree: ET.Element, place: str) -> float:
    text = tree.findtext(place)
    try:
        return float(text or "")
    except ValueError:
        raise DataError(f"{path}: expected a number in <{tree.tag}> at {place}, found {text!r}.") from None


# -- COCO --------------------------------------------------------------------------------------------


def _coco(root: Path, split: str, names: str | None) -> Boxed:
    path = root / "annotations" / f"instances_{split}.json"
    folder = next((f for f in (root / split, root / "images" / split) if f.is_dir()), None)
    if folder is None:
        raise DataError(f"there is no folder {root / split}, nor {root / 'images' / split}: expected photos.")
    coco, by_name = _opened(path)
    wanted = sorted(by_name) if names is None else _text(Path(names)).split()
    paths, sizes, boxes = [], [], []
    flat = 0
    for name in wanted:
        if name not in by_name:
            raise DataError(f"{names} names {name}, which is not in {path}.")
        if not (folder / name).is_file():
            raise DataError(f"{path} names {name}, but there is no {folder / name}.")
        size, found, without_area = _coco_boxes(coco, by_name[name])
        _check_size(folder / name, size)
        flat += without_area
        if len(found):
            paths.append(folder / name)
            sizes.append(size)
            boxes.append(found)
    if not paths:
        raise DataError(f"none of {len(wanted)} photos of {path} has a box that is not a crowd's.")
    counted = {"photos without a box (crowds aside)": len(wanted) - len(paths), "boxes without an area": flat}
    notes = tuple(f"left out: {count} {what}" for what, count in counted.items() if count)
    return Boxed(str(root), tuple(paths), tuple(sizes), tuple(boxes), notes)


def _coco_boxes(coco: COCO, image: dict[str, Any]) -> tuple[tuple[int, int], Tensor, int]:
    """(height, width), boxes (k, 4) without the crowds', and how many more have no area (COCO has some)."""
    size = (int(image["height"]), int(image["width"]))
    found = coco.loadAnns(coco.getAnnIds(imgIds=image["id"], iscrowd=False))
    boxes = torch.tensor([item["bbox"] for item in found], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    boxes = _clipped(boxes, size)
    has_area = (boxes[:, 2:] > boxes[:, :2]).all(1)
    return size, boxes[has_area], int((~has_area).sum())


def _opened(path: Path) -> tuple[COCO, dict[str, Any]]:
    """COCO's index, and its images by file name."""
    if not path.is_file():
        raise DataError(f"there is no file {path}.")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it reports its progress
            coco = COCO(str(path))
        images = coco.loadImgs(coco.getImgIds())
        return coco, {image["file_name"]: image for image in images if image["height"] and image["width"]}
    except (ValueError, KeyError, AssertionError, TypeError) as error:
        raise DataError(f"{path} is not COCO's JSON of instances ({error!r}).") from error


# -- both --------------------------------------------------------------------------------------------


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}. Expected a name per line.") from error


def _check_size(photo: Path, size: tuple[int, int]) -> None:
    """Raise DataError for a photo that is not of the size that its boxes are for; not if it is unreadable."""
    with contextlib.suppress(OSError), Image.open(photo) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        found = image.size if turned else image.size[::-1]
        if found != size:
            raise DataError(
                f"{photo} is of {found[1]}x{found[0]} pixels (width x height), but its annotation says"
                f" {size[1]}x{size[0]}."
            )


def _misplaced(boxes: Tensor, size: tuple[int, int]) -> int | None:
    """The first box without an area, or that reaches beyond the photo by more than rounding."""
    flat = (boxes[:, 2:] <= boxes[:, :2]).any(1)
    outside = (boxes - _clipped(boxes, size)).abs().amax(1) > _SLACK
    wrong = (flat | outside).nonzero()
    return int(wrong[0]) if len(wrong) else None


def _clipped(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    height, width = size
    return boxes.clamp(min=0).minimum(torch.tensor([width, height, width, height], dtype=boxes.dtype))
