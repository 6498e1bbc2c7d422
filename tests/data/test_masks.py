"""Photos with masks: the layouts, what ids mean, and a clear message for each way to be wrong."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitreg.data.datasets.masks import ade20k, folder, photo_size, read_mask, train_and_val, voc
from vitreg.errors import DataError


def photo(path: Path, height: int = 6, width: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), "teal").save(path)


def mask(path: Path, ids: np.ndarray, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(ids.astype(np.uint8))
    if palette:
        image.putpalette(list(np.random.default_rng(0).integers(0, 256, 768)))
    image.save(path)


def ids(*present: int) -> np.ndarray:
    """A mask of 6 x 8 pixels that holds these."""
    return np.resize(np.array(present), (6, 8))


def folder_of(root: Path, masks: dict[str, np.ndarray]) -> Path:
    for name, values in masks.items():
        photo(root / "images" / f"{name}.jpg")
        mask(root / "masks" / f"{name}.png", values)
    return root


def voc_of(root: Path, lists: dict[str, list[str]]) -> Path:
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    (root / "SegmentationClass").mkdir()
    for split, names in lists.items():
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            photo(root / "JPEGImages" / f"{name}.jpg")
            mask(root / "SegmentationClass" / f"{name}.png", ids(0, 15, 255), palette=True)
    return root


# -- layouts -----------------------------------------------------------------------------------------


def test_voc_reads_palette_indices_and_ignores_255(tmp_path):
    train, val = train_and_val(voc_of(tmp_path, {"train": ["a", "b"], "val": ["c"]}))
    assert train is not None
    assert [path.stem for path in (*train.paths, *val.paths)] == ["a", "b", "c"]
    assert len(val.names) == 21
    assert val.names[15] == "person"
    assert val.mask(0)[0, :4].tolist() == [0, 15, -1, 0]


def test_voc_with_one_list_has_no_split(tmp_path):
    train, val = train_and_val(voc_of(tmp_path, {"trainval": ["b", "a"]}))
    assert train is None
    assert [path.stem for path in val.paths] == ["b", "a"]


def test_ade20k_counts_from_1_and_ignores_0(tmp_path):
    for split in ("training", "validation"):
        photo(tmp_path / "images" / split / "ADE_x.jpg")
        mask(tmp_path / "annotations" / split / "ADE_x.png", ids(0, 1, 150))
    train, val = train_and_val(tmp_path)
    assert train is not None
    assert len(train) == len(val) == 1
    assert len(val.names) == 150
    assert val.names[0] == "class 1"
    assert val.mask(0)[0, :3].tolist() == [-1, 0, 149]
    assert ade20k(tmp_path)[0] == train


def test_a_folder_has_as_many_classes_as_its_masks(tmp_path):
    folder_of(tmp_path / "train", {"a": ids(0, 1, 4, 255)})
    folder_of(tmp_path / "val", {"b": ids(0, 2)})
    train, val = folder(tmp_path)
    assert train.classes == val.classes == tuple(f"class {i}" for i in range(5))
    alone = train_and_val(folder_of(tmp_path / "alone", {"a": ids(0, 1)}))
    assert alone[0] is None
    assert len(alone[1].names) == 2


def test_an_ignored_id_between_others_is_no_class(tmp_path):
    _, val = train_and_val(folder_of(tmp_path, {"a": ids(0, 1, 2, 255)}), ignore=1)
    assert val.names == ("class 0", "class 2")
    assert val.mask(0)[0, :4].tolist() == [0, -1, 1, -1]


def test_an_ignored_id_beyond_the_classes_adds_none(tmp_path):
    _, val = train_and_val(folder_of(tmp_path, {"a": ids(0, 1, 200)}), ignore=200)
    assert len(val.classes) == 2


def test_a_limit_spreads_over_the_photos(tmp_path):
    root = folder_of(tmp_path, {name: ids(0, 1) for name in "abcdef"})
    assert [path.stem for path in train_and_val(root, limit=3)[1].paths] == ["a", "c", "e"]


def test_one_after_another_keeps_pairs(tmp_path):
    train, val = train_and_val(voc_of(tmp_path, {"train": ["a", "b"], "val": ["c"]}))
    both = val.after(train)
    assert [path.stem for path in both.paths] == [path.stem for path in both.masks] == ["a", "b", "c"]
    assert val.after(None) is val


def test_sixteen_bits_and_single_bits_are_ids(tmp_path):
    Image.fromarray(np.array([[0, 300]], np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(np.array([[False, True]])).save(tmp_path / "bits.png")
    assert read_mask(tmp_path / "deep.png").tolist() == [[0, 300]]
    assert read_mask(tmp_path / "bits.png").tolist() == [[0, 1]]


def test_a_photo_that_lies_on_its_side_has_the_size_of_the_upright_one(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 6)).save(tmp_path / "x.jpg", exif=exif)
    assert photo_size(tmp_path / "x.jpg") == (8, 6)


def test_the_shared_data(shared):
    train, val = train_and_val(shared / "data" / "camvid", ignore=11)
    assert train is not None
    assert (len(train), len(val), len(val.names)) == (180, 60, 11)
    train, val = train_and_val(shared / "data" / "VOCdevkit" / "VOC2012")
    assert train is None
    assert len(val) == 60


# -- bad data ----------------------------------------------------------------------------------------


def bad(root: Path, message: str, **settings: int) -> None:
    with pytest.raises(DataError, match=message):
        train_and_val(root, **settings)


def test_a_mask_of_another_size(tmp_path):
    folder_of(tmp_path, {"a": ids(0, 1)})
    mask(tmp_path / "masks" / "a.png", ids(0, 1).T)
    bad(tmp_path, r"a.png is 6 x 8 pixels, but its photo is 8 x 6")


def test_an_id_that_is_no_class(tmp_path):
    bad(
        folder_of(tmp_path, {"a": ids(0, 1, 7)}),
        r"has the id 7, but .* \(0 to 4\) and ignores \[255\]",
        classes=5,
    )


def test_a_voc_mask_with_an_id_beyond_its_classes(tmp_path):
    root = voc_of(tmp_path, {"trainval": ["a"]})
    mask(root / "SegmentationClass" / "a.png", ids(0, 21))
    bad(root, "has the id 21, but .* 21 classes")


def test_a_photo_without_a_mask(tmp_path):
    root = folder_of(tmp_path, {"a": ids(0, 1), "b": ids(0, 1)})
    (root / "masks" / "b.png").unlink()
    bad(root, r"b.jpg has no mask. Expected a file called b in")


def test_a_mask_without_a_photo(tmp_path):
    root = folder_of(tmp_path, {"a": ids(0, 1), "b": ids(0, 1)})
    (root / "images" / "b.jpg").unlink()
    bad(root, r"b.png has no photo. Expected a file called b in")


def test_a_list_that_names_a_missing_file(tmp_path):
    root = voc_of(tmp_path, {"trainval": ["a"]})
    (root / "JPEGImages" / "a.jpg").unlink()
    bad(root, r"trainval.txt names a, but there is no .*JPEGImages/a with")


def test_an_empty_and_a_missing_list(tmp_path):
    root = voc_of(tmp_path, {"trainval": []})
    bad(root, "trainval.txt names no photo")
    with pytest.raises(DataError, match=r"there is no .*val.txt"):
        voc(root, "val")


def test_one_class_only(tmp_path):
    bad(folder_of(tmp_path, {"a": ids(1, 255), "b": ids(1)}), r"one class only \(class 1\)")
    mask(tmp_path / "masks" / "a.png", ids(255))
    mask(tmp_path / "masks" / "b.png", ids(255))
    bad(tmp_path, "no class at all", classes=3)


def test_a_colour_mask(tmp_path):
    root = folder_of(tmp_path, {"a": ids(0, 1)})
    photo(root / "masks" / "a.png")
    bad(root, r"a.png is a colour picture \(RGB\), not a mask")


def test_a_mask_and_a_photo_that_cannot_be_read(tmp_path):
    root = folder_of(tmp_path, {"a": ids(0, 1)})
    whole = (root / "masks" / "a.png").read_bytes()
    (root / "masks" / "a.png").write_bytes(b"no picture")
    bad(root, r"the mask .*a.png cannot be read")
    (root / "masks" / "a.png").write_bytes(whole)
    (root / "images" / "a.jpg").write_bytes(b"no picture")
    bad(root, r"the photo .*a.jpg cannot be read")


def test_another_layout(tmp_path):
    bad(tmp_path, "has no layout that is known here. Expected VOC")
