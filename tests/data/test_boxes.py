"""Photos with boxes as VOC and COCO have them, and what is said of folders that do not hold together."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import ExifTags, Image
from voc_files import OBJECT, voc_object, voc_xml

from vitreg.data.datasets.boxes import boxed_photos
from vitreg.errors import DataError


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """Two photos of 40x30 pixels, the second first in the list."""
    root = tmp_path / "VOC2012"
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    (root / "ImageSets/Main/trainval.txt").write_text("b\na\n")
    for name in "ab":
        Image.new("RGB", (40, 30)).save(root / f"JPEGImages/{name}.jpg")
    (root / "Annotations/a.xml").write_text(voc_xml(voc_object(1, 1, 40, 30)))
    (root / "Annotations/b.xml").write_text(voc_xml(voc_object(11, 6, 20, 25), voc_object("3.5", 2, 9, 9)))
    return root


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Photos with a box, with a crowd only, with one box and one of no height; none."""
    root = tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    (root / "train2014").mkdir()
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 30, "width": 40} for i in (1, 2, 3, 4)]
    for image in images:
        Image.new("RGB", (40, 30)).save(root / "train2014" / image["file_name"])
    boxes = [(1, [5, 6, 10, 12], 0), (1, [0, 0, 9, 9], 1), (2, [1, 1, 9, 9], 1), (3, [30, 20, 15, 5], 0)]
    boxes.append((3, [3, 4, 5, 0], 0))
    annotations = [
        {"id": i, "image_id": image, "bbox": box, "iscrowd": crowd, "category_id": 1, "area": 1}
        for i, (image, box, crowd) in enumerate(boxes, 1)
    ]
    document = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cat"}]}
    (root / "annotations/instances_train2014.json").write_text(json.dumps(document))
    return root


def test_voc_boxes_count_from_zero_in_the_order_of_the_list(voc):
    found = boxed_photos(voc)
    assert [path.name for path in found.paths] == ["b.jpg", "a.jpg"]
    assert found.sizes == ((30, 40), (30, 40))
    assert found.boxes[0].tolist() == [[10, 5, 20, 25], [2.5, 1, 9, 9]]
    assert found.boxes[1].tolist() == [[0, 0, 40, 30]]  # the whole photo


def test_voc_boxes_that_count_from_zero_are_clipped(voc):
    (voc / "Annotations/a.xml").write_text(voc_xml(voc_object(0, 0, 41, 30)))
    assert boxed_photos(voc).boxes[1].tolist() == [[0, 0, 40, 30]]


def test_voc_takes_another_split_with_labels_behind_the_names(voc):
    (voc / "ImageSets/Main/cat_val.txt").write_text("a  1\n\n")
    assert [path.name for path in boxed_photos(voc, "cat_val").paths] == ["a.jpg"]


def test_the_real_voc_photos(shared):
    found = boxed_photos(shared / "data/VOCdevkit/VOC2012")
    assert len(found.paths) == 60
    first = found.paths.index(shared / "data/VOCdevkit/VOC2012/JPEGImages/2007_000032.jpg")
    assert found.sizes[first] == (281, 500)
    assert found.boxes[first][0].tolist() == [103, 77, 375, 183]
    for path, size in zip(found.paths, found.sizes, strict=True):
        with Image.open(path) as image:
            assert (image.height, image.width) == size


def test_coco_without_crowds(coco):
    found = boxed_photos(coco)
    assert [path.name for path in found.paths] == ["1.jpg", "3.jpg"]
    assert found.boxes[0].tolist() == [[5, 6, 15, 18]]
    assert found.boxes[1].tolist() == [[30, 20, 40, 25]]  # clipped; that without an area is left out
    photos, of = coco / "train2014", "instances_train2014.json, annotation"
    assert found.notes == (
        f"1 boxes are cut at the edge of their photo: {of} 4",
        f"2 left out (a crowd's): {of} 2, {of} 3",
        f"2 left out (no object): {photos}/2.jpg, {photos}/4.jpg",
        f"1 left out (a box without an area in its photo): {of} 5",
    )


def test_coco_is_quiet_and_takes_a_list_of_names(coco, tmp_path, capsys):
    names = tmp_path / "some.txt"
    names.write_text("3.jpg\n")
    assert [path.name for path in boxed_photos(coco, names=str(names)).paths] == ["3.jpg"]
    assert capsys.readouterr().out == ""


def test_coco_photos_below_images(coco):
    (coco / "images").mkdir()
    (coco / "train2014").rename(coco / "images/train2014")
    assert torch.equal(boxed_photos(coco).boxes[0], torch.tensor([[5.0, 6, 15, 18]]))


def refused(message: str, *args: Any, **settings: Any) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        boxed_photos(*args, **settings)


def test_a_folder_that_is_neither(tmp_path):
    refused("has neither Annotations/ (VOC", tmp_path)
    refused("has neither Annotations/ (VOC", tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("xml", "note"),
    [
        (voc_xml(), r"1 left out \(no object\): .*/a.jpg$"),
        (voc_xml(voc_object(20, 1, 10, 9)), r"1 left out \(a box without an area in its photo\): .*object 1"),
        (voc_xml(voc_object(90, 1, 99, 9)), r"1 left out \(a box without an area in its photo\): .*object 1"),
        (voc_xml(voc_object(1, 1, "wide", 9)), r"1 left out \(a box that is not four numbers\): .*object 1"),
        (voc_xml(voc_object(1, 1, "nan", 9)), r"1 left out \(a box that is not four numbers\): .*object 1"),
        (voc_xml(OBJECT.format("<xmin>1</xmin>")), r"1 left out \(a box that is not four numbers\)"),
        ("<annotation></annotation>", r"1 left out \(no object\)"),
    ],
)  # fmt: skip
def test_photos_and_boxes_that_are_no_use_are_counted(voc, xml, note):
    (voc / "Annotations/a.xml").write_text(xml)
    found = boxed_photos(voc)
    assert [path.name for path in found.paths] == ["b.jpg"]
    assert any(re.search(note, one) for one in found.notes), found.notes


def test_a_box_is_cut_at_the_edge_of_its_photo_and_that_is_said(voc):
    (voc / "Annotations/a.xml").write_text(voc_xml(voc_object(1, 1, 9, 9), voc_object(1, 1, 90, 9)))
    found = boxed_photos(voc)
    assert found.boxes[1].tolist() == [[0, 0, 9, 9], [0, 0, 40, 9]]
    assert found.notes == (f"1 boxes are cut at the edge of their photo: {voc}/Annotations/a.xml, object 2",)


@pytest.mark.parametrize(
    "size", ["", "<size><width>0</width><height>0</height></size>", "<size><width>?</width></size>"]
)
def test_a_size_that_is_not_stated_is_the_photos(voc, size):
    (voc / "Annotations/a.xml").write_text(f"<annotation>{size}{voc_object(1, 1, 9, 9)}</annotation>")
    found = boxed_photos(voc)
    assert found.sizes == ((30, 40), (30, 40))
    assert found.notes[0].startswith(
        "1 photos have the size of their files, because their annotations state none: "
    )
    (voc / "JPEGImages/a.jpg").write_bytes(b"no photo")
    assert boxed_photos(voc).notes[0].startswith("1 left out (its size is not stated, nor can it be read): ")


def test_a_file_that_is_no_xml(voc):
    for content in (
        b"<annotation><size>",
        b"",
        b"\xff\xfe\x00",
        b"<?xml version='1.0' encoding='klingon'?><a/>",
    ):
        (voc / "Annotations/a.xml").write_bytes(content)
        refused("a.xml is not valid XML", voc)


def test_an_annotation_without_its_photo(voc):
    (voc / "JPEGImages/a.jpg").unlink()
    refused("trainval.txt names a, but there is no", voc)


def test_a_split_that_names_a_missing_annotation(voc):
    (voc / "Annotations/b.xml").unlink()
    refused("trainval.txt names b, but there is no", voc)


def test_a_photo_of_another_size(voc, coco):
    Image.new("RGB", (30, 40)).save(voc / "JPEGImages/a.jpg")
    refused("a.jpg is of 30x40 pixels (width x height), but its annotation says 40x30", voc)
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (30, 40)).save(voc / "JPEGImages/a.jpg", exif=turned)
    assert len(boxed_photos(voc).paths) == 2
    Image.new("RGB", (41, 30)).save(coco / "train2014/1.jpg")
    refused("1.jpg is of 41x30", coco)


def test_a_photo_that_cannot_be_read_is_for_later(voc):
    (voc / "JPEGImages/a.jpg").write_bytes(b"no photo")
    assert len(boxed_photos(voc).paths) == 2


def test_bad_splits(voc):
    refused("cannot read", voc, "test")
    (voc / "ImageSets/Main/test.txt").write_text("\n")
    refused("test.txt names no photo", voc, "test")
    refused("is a VOC folder: it takes a split", voc, names="some.txt")


def test_bad_coco_folders(coco, tmp_path):
    (coco / "train2014/3.jpg").unlink()
    refused("names 3.jpg, but there is no", coco)
    names = tmp_path / "some.txt"
    names.write_text("1.jpg\n7.jpg\n")
    refused("some.txt names 7.jpg, which is not in", coco, names=str(names))
    refused("there is no folder", coco, "val2014")
    (coco / "val2014").mkdir()
    refused("instances_val2014.json", coco, "val2014")
    names.write_text("2.jpg\n")
    refused("no photo of", coco, names=str(names))


@pytest.mark.parametrize("text", ["{", "[]", '{"images": [{"id": 1}], "annotations": []}'])
def test_coco_that_is_no_coco(coco, text):
    (coco / "annotations/instances_train2014.json").write_text(text)
    refused("is not COCO's JSON of instances", coco)
