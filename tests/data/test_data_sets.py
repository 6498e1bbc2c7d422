"""Data sets as they are found: each is read as it says it is, or what was guessed or left out is said."""

import itertools
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitreg.data.datasets import depth_pairs
from vitreg.data.datasets.boxes import boxed_photos
from vitreg.data.datasets.classes import by_folder, by_wordnet, splits
from vitreg.data.datasets.ids import read_mask
from vitreg.data.datasets.masks import train_and_val, voc
from vitreg.data.imagenet import wordnet_names
from vitreg.data.images import read_images
from vitreg.data.listing import list_photos, photos_in
from vitreg.errors import DataError


def tree(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def labels_of(found) -> dict[str, int]:
    return {path.parent.name: label for path, label in zip(found.paths, found.labels, strict=True)}


# -- classes by the names of folders -----------------------------------------------------------------


@pytest.mark.parametrize("classes", [12, 1000])
@pytest.mark.parametrize("digits", [1, 4])
@pytest.mark.parametrize("first", [0, 1])
def test_numbered_folders_are_numbers(tmp_path, classes, digits, first):
    numbers = range(first, classes + first)
    found = by_wordnet(tree(tmp_path, *(f"{i:0{digits}}/x.jpg" for i in numbers)), classes)
    assert labels_of(found) == {f"{i:0{digits}}": i - first for i in numbers}
    (note,) = found.notes
    assert ("less 1" if first else "not their order as text") in note


def test_some_numbered_folders_of_a_head(tmp_path):
    found = by_wordnet(tree(tmp_path, "val/10/a.png", "val/9/b.png", "val/999/c.png", "val/-1/d.png"), 1000)
    assert labels_of(found) == {"10": 10, "9": 9, "999": 999}
    assert found.notes == (
        "Classes are the folders' numbers, 9 to 999, not their order as text.",
        f"1 left out (of no class): {tmp_path}/val/-1/d.png",
    )


@pytest.mark.parametrize(
    ("folders", "says"),
    [
        (("1", "01"), "the folders 01 and 1 are the same number"),
        (("0", "1000"), "have no class of this 1000-way head"),
        (("0", "cat"), "have no class of this 1000-way head.*such as .*cat/x.jpg"),
        (("n01440764", "n99999999"), "1 of 2 photos have no class .* n99999999/x.jpg"),
        (("tench", "a tench"), "1 of 2 photos have no class .*a tench/x.jpg"),
        (("tench", "crane"), "'crane' is the name of the classes 134 and 517"),
        (("tench", "Tinca_tinca"), "are names of the class 0. Put its photos together"),
    ],
)
def test_folders_that_may_be_anything_are_refused(tmp_path, folders, says):
    with pytest.raises(DataError, match=says.replace(" n99", ".*n99")):
        by_wordnet(tree(tmp_path, *(f"{folder}/x.jpg" for folder in folders)), 1000)


@pytest.mark.parametrize(
    "spell", [str, str.upper, lambda name: name.replace(" ", "_"), lambda name: name.replace(" ", "-")]
)
def test_english_names_of_imagenets_classes(tmp_path, spell):
    names = wordnet_names(1000)
    chosen = {
        spell(names[i][k % len(names[i])]).replace("/", ""): i
        for k, i in enumerate((0, 1, 217, 497, 701, 999))
    }
    found = by_wordnet(tree(tmp_path, *(f"{name}/x.jpg" for name in chosen)), 1000)
    assert labels_of(found) == chosen
    assert "as ImageNet's classes are called in English" in found.notes[0]


def test_what_the_head_calls_its_classes_comes_before_the_order(tmp_path):
    root = tree(tmp_path, "ant/x.jpg", "zebra/x.jpg", "Big_Cat/x.jpg")
    assert labels_of(by_wordnet(root, 3, ("zebra", "big cat", "ant"))) == {"zebra": 0, "Big_Cat": 1, "ant": 2}
    guessed = by_wordnet(root, 3, ("class 0", "class 1", "class 2"))
    assert labels_of(guessed) == {"Big_Cat": 0, "ant": 1, "zebra": 2}
    assert guessed.notes == (
        "A guess: the 3 classes of the head are the folders in their order, 0 is 'Big_Cat' and 2 is 'zebra'.",
    )


def test_what_trains_a_head_and_what_tests_it_number_classes_alike(tmp_path):
    for folders in (("9", "10", "100"), ("0", "1", "2"), ("1", "2", "3"), ("b", "a", "10")):
        root = tree(
            tmp_path / "-".join(folders), *(f"{s}/{f}/x.jpg" for s in ("train", "val") for f in folders)
        )
        assert labels_of(splits(root)[1]) == labels_of(by_wordnet(root, 3)) == labels_of(by_folder(root))


def test_a_class_without_photos_is_named(tmp_path):
    root = tree(
        tmp_path,
        *(f"{split}/{name}/x.jpg" for split in ("train", "val") for name in "ab"),
        "train/c/x.txt",
        "val/c/x.txt",
    )
    assert splits(root)[0].notes == ("1 folders of train/ hold no photo and are not classes: c",)


# -- what is left out of a folder --------------------------------------------------------------------


@pytest.fixture
def odd_tree(tmp_path):
    root = tree(
        tmp_path / "odd", "a/x.jpg", "a/.y.jpg", "a/._x.jpg", ".cache/z.jpg", "b/x.heic", "b/y.nef", "b/z.txt"
    )
    (root / "again").symlink_to(root / "a")
    (root / "b/up").symlink_to(root)
    (root / "b/gone").symlink_to("/nowhere")
    (root / "b/itself.jpg").symlink_to(root / "b/itself.jpg")
    return root


def test_the_same_is_left_out_and_said_by_every_reader(odd_tree):
    notes = {
        f"1 left out (a hidden folder): {odd_tree}/.cache",
        f"1 left out (a hidden file): {odd_tree}/a/.y.jpg",
        f"1 left out (a link that leads nowhere): {odd_tree}/b/gone",
        f"2 left out (a link to a folder that is read already): {odd_tree}/again, {odd_tree}/b/up",
    }
    # "again" is a real name in the tree's order before "b": a's photos are those of "a".
    expected = [str(odd_tree / name) for name in ("a/x.jpg", "b/itself.jpg", "b/x.heic", "b/y.nef")]
    with pytest.warns(UserWarning, match="left out") as caught:
        images = read_images(odd_tree, lambda image: None, workers=0)
    assert {str(one.message) for one in caught} == notes
    assert [*images._items] == expected
    with pytest.warns(UserWarning, match="left out") as caught:
        assert list(map(str, photos_in(odd_tree))) == expected
    assert {str(one.message) for one in caught} == notes
    assert set(by_wordnet(odd_tree, 2).notes[1:]) == notes
    pytest.importorskip("fsspec")
    from vitreg.archive.sources import find_archive

    with pytest.warns(UserWarning, match="left out") as caught:
        assert [f"{odd_tree}/{name}" for name in find_archive(str(odd_tree)).files] == expected
    assert {str(one.message) for one in caught} == notes


def test_shards_beside_photos_are_said_and_photos_that_are_not_read_give_way(tmp_path):
    tree(tmp_path, "a.tar", "b.nef")
    with pytest.warns(UserWarning, match=r"1 left out \(a camera raw.*; shards are read\): .*/b.nef"):
        read_images(tmp_path, lambda image: None)
    tree(tmp_path, "c.jpg")
    with pytest.warns(UserWarning, match=r"1 left out \(a shard beside photos\): .*/a.tar"):
        read_images(tmp_path, lambda image: None)


def test_a_folder_with_hidden_photos_only_says_so(tmp_path):
    with pytest.raises(DataError, match=r"holds no photo.*1 left out \(a hidden folder\): .*\.x"):
        list_photos(tree(tmp_path, ".x/a.jpg"))


# -- text in any encoding ----------------------------------------------------------------------------

ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1")


def picture(path: Path, values: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((6, 8, 3), np.uint8) if values is None else values).save(path)
    return path


def ids(*present: int) -> np.ndarray:
    return np.resize(np.array(present, np.uint8), (6, 8))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_lists_and_json_of_any_encoding_name_the_same_photos(tmp_path, encoding):
    name = "Käse"
    photo = picture(tmp_path / "JPEGImages" / f"{name}.png")
    picture(tmp_path / "SegmentationClass" / f"{name}.png", ids(0, 1, 255))
    for place in ("ImageSets/Segmentation/val.txt", "ImageSets/Main/trainval.txt"):
        (tmp_path / place).parent.mkdir(parents=True)
        (tmp_path / place).write_bytes(f"{name}\r\n".encode(encoding))
    assert voc(tmp_path, "val").paths == (photo,)
    (tmp_path / "list.txt").write_bytes(f"JPEGImages/{name}.png".encode(encoding))
    assert read_images(tmp_path / "list.txt", lambda image: None)._items == [str(photo)]
    (tmp_path / "nyu_test.txt").write_bytes(
        f"JPEGImages/{name}.png SegmentationClass/{name}.png".encode(encoding)
    )
    assert depth_pairs.nyu(tmp_path, "test").paths == (photo,)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_text_that_does_not_say_its_encoding_is_refused_by_name(tmp_path, encoding):
    tree(tmp_path, "SegmentationClass/a.png", "ImageSets/Segmentation/val.txt")
    (tmp_path / "ImageSets/Segmentation/val.txt").write_bytes("a\n".encode(encoding))
    with pytest.raises(DataError, match=r"cannot read .*val.txt: it is not text in UTF-8.* Save it as UTF-8"):
        voc(tmp_path, "val")


# -- lists -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".jpg", ".JPG", ".jpeg", ".png", ".bmp"])
def test_a_listed_photo_may_have_any_ending(tmp_path, ending):
    photo = picture(tmp_path / "JPEGImages" / f"a.b{ending}")
    picture(tmp_path / "SegmentationClass/a.b.png", ids(0, 1))
    (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
    for listed in ("a.b", "a.b 1", "a.b  0"):
        (tmp_path / "ImageSets/Segmentation/val.txt").write_text(listed)
        assert voc(tmp_path, "val").paths == (photo,)


def test_a_list_with_minus_one_and_twice_the_same(tmp_path):
    for name in "abc":
        picture(tmp_path / f"JPEGImages/{name}.jpg")
        picture(tmp_path / f"SegmentationClass/{name}.png", ids(0, 1))
    listed = tmp_path / "ImageSets/Segmentation/val.txt"
    listed.parent.mkdir(parents=True)
    listed.write_text("a  1\nb -1\nc  0\na  1\n")
    found = voc(tmp_path, "val")
    assert [path.stem for path in found.paths] == ["a", "c"]
    assert found.notes == (
        f"1 left out (marked -1 in {listed}): b",
        f"1 left out (listed before): a in {listed}",
    )
    listed.write_text("b -1\n")
    with pytest.raises(DataError, match=r"names no photo. All 1 are marked -1"):
        voc(tmp_path, "val")


# -- masks -------------------------------------------------------------------------------------------

LAYOUTS = {
    "folder": [("images", "masks")],
    "split": [("train/images", "train/masks"), ("val/images", "val/masks")],
    "mmseg": [("images/training", "annotations/training"), ("images/validation", "annotations/validation")],
}


def layout(root: Path, kind: str, *masks: np.ndarray, prefix: str = "") -> Path:
    for (images, targets), (i, mask) in itertools.product(LAYOUTS[kind], enumerate(masks)):
        picture(root / images / f"{prefix}{i}.png")
        picture(root / targets / f"{prefix}{i}.png", mask)
    return root


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("classes", [None, 2])
def test_masks_of_0_and_255_are_background_and_foreground(tmp_path, kind, classes):
    root = layout(tmp_path, kind, ids(0, 255), ids(0), ids(255))
    _, val = train_and_val(root, classes)
    assert val.names == ("background", "foreground")
    assert [np.unique(val.mask(i)).tolist() for i in range(3)] == [[0, 1], [0], [1]]
    assert "255 is the foreground. Set ignore=255 if it is not a class" in val.notes[0]
    with pytest.raises(DataError, match="one class only"):
        train_and_val(root, ignore=255)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("classes", [None, 3, 5])
@pytest.mark.parametrize("ignore", [None, 0, 2, 255])
def test_ids_mean_the_same_in_every_layout_and_settings_are_honoured(tmp_path, kind, classes, ignore):
    _, val = train_and_val(layout(tmp_path, kind, ids(0, 1, 2, 255)), classes, ignore)
    number = classes or (2 if ignore == 2 else 3)  # the largest id may be none
    counted = [i for i in range(number) if i != ignore]
    assert val.names == tuple(f"class {i}" for i in counted)
    expected = [counted.index(i) if i in counted else -1 for i in (0, 1, 2, 255)]
    assert val.mask(0)[0, :4].tolist() == expected
    assert f"Ids 0 to {number - 1} of the masks are classes" in val.notes[0]


def test_ade20k_is_known_by_its_masks_names_alone(tmp_path):
    root = layout(tmp_path, "mmseg", ids(0, 1, 150), prefix="ADE_val_")
    _, val = train_and_val(root)
    assert (len(val.names), val.mask(0)[0, :3].tolist()) == (150, [-1, 0, 149])
    assert "ids 1 to 150 are its classes, 0 is none" in val.notes[0]
    _, val = train_and_val(root, classes=151, ignore=0)
    assert (len(val.names), val.mask(0)[0, :3].tolist()) == (150, [-1, 0, 149])


def test_settings_are_honoured_in_vocs_layout(tmp_path):
    tree(tmp_path, "ImageSets/Segmentation/trainval.txt")
    (tmp_path / "ImageSets/Segmentation/trainval.txt").write_text("a")
    picture(tmp_path / "JPEGImages/a.jpg")
    picture(tmp_path / "SegmentationClass/a.png", ids(0, 1, 2, 255))
    _, val = train_and_val(tmp_path, classes=3, ignore=0)
    assert (val.names, val.mask(0)[0, :4].tolist()) == (("class 1", "class 2"), [-1, 0, 1, -1])


def test_an_id_of_minus_one_can_be_ignored(tmp_path):
    root = layout(tmp_path, "folder", ids(0, 1))
    (root / "masks/0.png").unlink()
    picture(root / "masks/0.tif", np.resize(np.array([0, 1, -1], np.int32), (6, 8)))
    with pytest.raises(DataError, match=r"0.tif has the id -1.* or which id to ignore"):
        train_and_val(root)
    assert train_and_val(root, ignore=-1)[1].mask(0)[0, :3].tolist() == [0, 1, -1]


def test_numbers_of_objects_are_no_classes(tmp_path):
    root = layout(tmp_path, "folder", np.resize(np.array([0, 26001], np.uint16), (6, 8)))
    with pytest.raises(DataError, match="ids up to 26001: objects rather than classes"):
        train_and_val(root)


GREY = np.arange(16).reshape(4, 4).astype(np.uint8)


@pytest.mark.parametrize(
    "values",
    [
        GREY,
        GREY.astype(np.uint16),
        GREY.astype(np.int32),
        GREY.astype(np.float32),
        np.stack([GREY] * 3, -1),
        np.stack([GREY] * 3 + [np.full_like(GREY, 255)], -1),
        np.stack([GREY, np.full_like(GREY, 255)], -1),
    ],
)
def test_ids_however_they_are_stored(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "x.tif")
    np.testing.assert_array_equal(read_mask(tmp_path / "x.tif"), GREY)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_ids_of_few_bits_are_what_was_written(tmp_path, depth):
    """Pillow spreads greys of 2 and 4 bits over 0 to 255, and writes none."""
    rows = np.arange(2**depth).astype(np.uint8)
    bits = np.unpackbits(rows[:, None], axis=1)[:, -depth:].flatten()
    header = struct.pack(">IIBBBBB", len(rows), 1, depth, 0, 0, 0, 0)
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(b"\0" + np.packbits(bits).tobytes())), (b"IEND", b"")
    chunks = [
        struct.pack(">I", len(data)) + k + data + struct.pack(">I", zlib.crc32(k + data)) for k, data in parts
    ]
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    assert read_mask(tmp_path / "x.png").tolist() == [rows.tolist()]


@pytest.mark.parametrize(
    ("values", "kind", "says"),
    [
        (np.stack([GREY, GREY, 2 * GREY], -1), "png", r"is a colour picture \(RGB\)"),
        (np.stack([GREY] * 4, -1), "png", r"is a colour picture \(RGBA\)"),
        (GREY / np.float32(7), "tiff", r"is a colour picture \(F\)|decimals"),
        (GREY, "jpeg", "is a JPEG, which blurs ids"),
    ],
)
def test_pictures_that_hold_no_ids(tmp_path, values, kind, says):
    Image.fromarray(values).save(tmp_path / "x", kind)
    with pytest.raises(DataError, match=says):
        read_mask(tmp_path / "x")


def test_palettes_that_differ_are_refused_and_those_that_agree_are_read(tmp_path):
    root = layout(tmp_path, "folder", ids(0, 1), ids(0, 1))
    for i, colours in enumerate(([0, 0, 0, 255, 0, 0], [0, 0, 0, 0, 255, 0])):
        image = Image.fromarray(ids(0, 1))
        image.putpalette(colours)
        image.save(root / f"masks/{i}.png")
    with pytest.raises(
        DataError, match=r"the id 1 is of the colour \(0, 255, 0\) in .*1.png, but \(255, 0, 0\) in .*0.png"
    ):
        train_and_val(root)
    image.save(root / "masks/0.png")
    assert train_and_val(root)[1].mask(0)[0, :2].tolist() == [0, 1]


def test_two_files_of_one_name_are_refused(tmp_path):
    root = layout(tmp_path, "folder", ids(0, 1))
    picture(root / "images/0.bmp")
    with pytest.raises(DataError, match=r"0.bmp and .*0.png have one name"):
        train_and_val(root)


# -- COCO --------------------------------------------------------------------------------------------


def coco(root: Path, images: list, annotations: list) -> Path:
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for name in "abc":
        picture(root / f"train2014/{name}.png")
    document = {"images": images, "annotations": annotations}
    (root / "annotations/instances_train2014.json").write_text(json.dumps(document))
    return root


def image(one: object, name: object, **more: object) -> dict:
    return {"id": one, "file_name": name, "width": 8, "height": 6, **more}


def box(owner: object, bbox: object = (1, 1, 2, 3), **more: object) -> dict:
    return {"id": 7, "image_id": owner, "bbox": bbox, "iscrowd": 0, **more}


def test_ids_of_annotations_need_not_be_unique(tmp_path):
    for ids_of in ((7, 7), (None, None), ("x", 7)):
        annotations = [box(1, (0, 0, 2, 2), id=ids_of[0]), box(2, (1, 1, 3, 3), id=ids_of[1])]
        found = boxed_photos(coco(tmp_path, [image(1, "a.png"), image(2, "b.png")], annotations))
        assert [boxes.tolist() for boxes in found.boxes] == [[[0, 0, 2, 2]], [[1, 1, 4, 4]]]


def test_an_image_id_of_two_photos_is_refused_and_a_photo_of_two_ids_is_one(tmp_path):
    with pytest.raises(DataError, match=r"the image id 1 is that of a.png and of b.png"):
        boxed_photos(coco(tmp_path, [image(1, "a.png"), image(1, "b.png")], [box(1)]))
    found = boxed_photos(
        coco(tmp_path, [image(1, "a.png"), image(2, "a.png")], [box(1), box(2, (0, 0, 1, 1))])
    )
    assert found.boxes[0].tolist() == [[1, 1, 3, 4], [0, 0, 1, 1]]
    assert "boxes are taken together): instances_train2014.json, image 2" in found.notes[0]


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        (box(9), "of no image that is listed"),
        (box(None), "of no image that is listed"),
        (box([1]), "of no image that is listed"),
        (None, "of no image that is listed"),
        (box(1, None), "a box that is not four numbers"),
        (box(1, [1, 2, 3]), "a box that is not four numbers"),
        (box(1, [1, 2, 3, "wide"]), "a box that is not four numbers"),
        (box(1, [1, 2, 3, float("nan")]), "a box that is not four numbers"),
        (box(1, [1, 2, 0, 3]), "a box without an area in its photo"),
        (box(1, [1, 2, -3, 3]), "a box without an area in its photo"),
        (box(1, [100, 2, 3, 3]), "a box without an area in its photo"),
        (box(1, iscrowd=1), "a crowd's"),
    ],
)
def test_annotations_that_are_no_use_are_counted_by_name(tmp_path, entry, why):
    found = boxed_photos(coco(tmp_path, [image(1, "a.png")], [box(1), entry]))
    assert len(found.boxes[0]) == 1
    named = "annotation 7" if entry else "annotation no. 2"
    assert f"1 left out ({why}): instances_train2014.json, {named}" in found.notes
    photos = tmp_path / "train2014"
    assert f"2 left out (not in instances_train2014.json): {photos}/b.png, {photos}/c.png" in found.notes


@pytest.mark.parametrize("crowd", [0, None, False])
def test_what_is_missing_or_null_is_no_crowd(tmp_path, crowd):
    found = boxed_photos(
        coco(tmp_path, [image(1, "a.png")], [box(1, iscrowd=crowd), {"image_id": 1, "bbox": [0, 0, 1, 1]}])
    )
    assert len(found.boxes[0]) == 2


@pytest.mark.parametrize("size", [0, None, "", -1, [6]])
def test_a_size_that_is_not_stated_is_the_photos_own(tmp_path, size):
    found = boxed_photos(coco(tmp_path, [image(1, "a.png", height=size)], [box(1)]))
    assert found.sizes == ((6, 8),)
    why = "have the size of their files, because their annotations state none"
    assert found.notes[0] == f"1 photos {why}: {tmp_path}/train2014/a.png"


@pytest.mark.parametrize(
    "bad", [image(None, "b.png"), image(2, None), image(2, ""), image([2], "b.png"), None, 3]
)
def test_images_that_cannot_be_told_are_counted(tmp_path, bad):
    found = boxed_photos(coco(tmp_path, [image(1, "a.png"), bad], [box(1)]))
    assert len(found.paths) == 1
    assert any(note.startswith("1 left out (without id or file_name): instances") for note in found.notes)
