"""Reading images: every messy photo, every kind of source, the same batches for any number of workers."""

import contextlib
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from torch import Tensor

import vitreg
from vitreg.data.batches import Batch
from vitreg.data.cpus import usable_cpus
from vitreg.data.images import Images, demo_photos, read_images
from vitreg.errors import ImageError, MissingExtraError


def mean_colour(image: Image.Image) -> Tensor:
    """RGB -> float (3, 2, 2) in 0..255: the pixels of the four corners."""
    assert image.mode == "RGB"
    corners = image.resize((2, 2), Image.Resampling.NEAREST)
    return torch.from_numpy(np.asarray(corners).copy()).permute(2, 0, 1).float()


def fail_on_red(image: Image.Image) -> Tensor:
    if image.getpixel((0, 0)) == (255, 0, 0):
        raise ValueError("red is\nforbidden")
    return mean_colour(image)


def kill_on_red(image: Image.Image) -> Tensor:
    if image.getpixel((0, 0)) == (255, 0, 0):
        os.kill(os.getpid(), signal.SIGKILL)
    return mean_colour(image)


def keep_size(image: Image.Image) -> Tensor:
    return torch.zeros(3, image.height, image.width)


def save(path: Path, colour: object = "blue", mode: str = "RGB", size: tuple[int, int] = (4, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)  # type: ignore[arg-type]
    return path


def save_greys(folder: Path, count: int) -> list[Path]:
    """PNG files in folder, the i-th all of grey i."""
    return [save(folder / f"{i:03}.png", (i, i, i)) for i in range(count)]


def read_all(images: Images) -> list[Batch]:
    return list(images)


def read_one(path: object, **options: object) -> Tensor:
    """The one image at path, as (3, 2, 2) corners."""
    (batch,) = read_images(path, mean_colour, strict=True, **options)  # type: ignore[arg-type]
    assert batch.pixels.shape == (1, 3, 2, 2)
    return batch.pixels[0]


def first_pixel(path: object) -> tuple[int, ...]:
    return tuple(int(value) for value in read_one(path)[:, 0, 0])


def reason(path: Path, preprocess: object = mean_colour) -> str:
    """Why path cannot be read, when it stands between two good images."""
    good = [save(path.parent / name, "green") for name in ("good-1.png", "good-2.png")]
    images = read_images([good[0], path, good[1]], preprocess)  # type: ignore[arg-type]
    (batch,) = images
    assert batch.names == tuple(map(str, good))
    (failed,) = images.failed
    assert failed.path == str(path)
    assert "\n" not in failed.reason
    return failed.reason


# ---- Photos that must be read right


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 4), "blue")
    image.paste("red", (0, 0, 4, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    corners = read_one(tmp_path / "turned.png")
    assert corners[:, 0, :].T.tolist() == [[255, 0, 0]] * 2  # red was left and is now on top
    assert corners[:, 1, :].T.tolist() == [[0, 0, 255]] * 2


def test_a_damaged_exif_block_does_not_lose_the_photo(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), "blue").save(tmp_path / "x.png", exif=b"Exif\x00\x00garbage")
    assert first_pixel(tmp_path / "x.png") == (0, 0, 255)


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 100, (100, 100, 100)),
        ("LA", (100, 255), (100, 100, 100)),
        ("LA", (100, 0), (255, 255, 255)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (0, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (0, 0, 0, 128), (127, 127, 127)),
        ("I;16", 40000, (156, 156, 156)),
        ("I;16", 257, (1, 1, 1)),
    ],
)
def test_modes_become_rgb(tmp_path: Path, mode: str, colour: object, expected: tuple[int, ...]) -> None:
    assert first_pixel(save(tmp_path / "x.png", colour, mode)) == expected


def test_a_palette_with_transparency_lies_on_white(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.paste(1, (2, 0, 4, 4))
    image.save(tmp_path / "x.png", transparency=0)
    corners = read_one(tmp_path / "x.png")
    assert corners[:, 0, :].T.tolist() == [[255, 255, 255], [0, 255, 0]]


def test_cmyk(tmp_path: Path) -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    image.save(tmp_path / "x.jpg", quality=100)
    red, green, blue = first_pixel(tmp_path / "x.jpg")
    assert red > 250 > 5 > max(green, blue)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([[0, 30000], [60000, 65535]], [0, 117, 233, 255]),  # fits 16 bits: white is 65535
        ([[0, 100000], [100000, 200000]], [0, 128, 128, 255]),  # does not: white is the largest value
        ([[-100, 0], [0, 100]], [0, 128, 128, 255]),
        ([[-7, -7], [-7, -7]], [0, 0, 0, 0]),
    ],
)
def test_32_bit_grey_is_scaled(tmp_path: Path, values: list[list[int]], expected: list[int]) -> None:
    Image.fromarray(np.array(values, np.int32)).save(tmp_path / "x.tif")
    assert read_one(tmp_path / "x.tif")[0].flatten().tolist() == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([[0, 0.2], [0.6, 1]], [0, 51, 153, 255]),
        ([[0, 51], [153, 200]], [0, 51, 153, 200]),
        ([[0, 257], [25700, 51400]], [0, 1, 100, 200]),
        ([[-1, 0], [1, 3]], [0, 64, 128, 255]),
        ([[float("nan"), 0.2], [float("inf"), 1]], [0, 51, 0, 255]),
    ],
)
def test_float_tiff_is_scaled(tmp_path: Path, values: list[list[float]], expected: list[int]) -> None:
    Image.fromarray(np.array(values, np.float32)).save(tmp_path / "x.tiff")
    assert read_one(tmp_path / "x.tiff")[0].flatten().tolist() == expected


def test_the_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert first_pixel(tmp_path / "x.gif") == (255, 0, 0)


def test_a_file_whose_name_is_not_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9\n.png")
    try:
        Path(name).write_bytes(save(tmp_path / "x.bin.png").read_bytes())
    except OSError:
        pytest.skip("this file system allows only UTF-8 names")
    (tmp_path / "x.bin.png").unlink()
    (batch,) = read_images(tmp_path, mean_colour)
    assert batch.names == (f"{tmp_path}/caf\\xe9\\x0a.png",)
    batch.names[0].encode()


def test_pillow_warnings_do_not_leak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # 16 pixels: a warning, for Pillow
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert first_pixel(save(tmp_path / "x.png")) == (0, 0, 255)
    assert not caught


# ---- Files that cannot be read


def test_a_huge_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "huge.png", size=(300, 100))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 14_000)
    assert "30000 pixels" in reason(path)
    assert Image.MAX_IMAGE_PIXELS == 14_000


def test_a_truncated_file(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.jpg")
    path = tmp_path / "half.jpg"
    path.write_bytes((tmp_path / "whole.jpg").read_bytes()[:2000])
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    assert "truncated" in reason(path)


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").touch()
    assert reason(tmp_path / "x.jpg") == "the file is empty"


def test_not_an_image(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_text("<html>404</html>")
    assert reason(tmp_path / "x.jpg") == "not an image, or in a format that Pillow does not know"


def test_postscript_in_disguise_never_runs_ghostscript(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n"
    )
    assert reason(tmp_path / "x.jpg").startswith("not an image")


def test_a_file_that_vanished(tmp_path: Path) -> None:
    paths = save_greys(tmp_path, 3)
    images = read_images(tmp_path, mean_colour)
    paths[1].unlink()
    (batch,) = images
    assert batch.names == (str(paths[0]), str(paths[2]))
    assert [(failed.path, failed.reason) for failed in images.failed] == [
        (str(paths[1]), "No such file or directory")
    ]


def test_a_broken_link(tmp_path: Path) -> None:
    save(tmp_path / "good.png")
    (tmp_path / "x.jpg").symlink_to(tmp_path / "nowhere.jpg")
    images = read_images(tmp_path, mean_colour)
    assert len(read_all(images)) == 1
    assert [failed.reason for failed in images.failed] == ["No such file or directory"]


@contextlib.contextmanager
def as_nobody():  # type: ignore[no-untyped-def]
    """The superuser may read everything: become someone else for a while."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_permission_denied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "good.png")
    save(tmp_path / "secret.png").chmod(0)
    save(tmp_path / "closed" / "x.png")
    (tmp_path / "closed").chmod(0)
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)  # from here no folder above needs to be readable
    read_all(read_images("good.png", mean_colour))
    try:
        with as_nobody():
            images = read_images(".", mean_colour)
            (batch,) = images
    finally:
        (tmp_path / "closed").chmod(0o755)
    assert batch.names == ("./good.png",)
    assert {(failed.path, failed.reason) for failed in images.failed} == {
        ("./secret.png", "Permission denied"),
        ("./closed", "Permission denied"),
    }


def test_a_folder_named_like_an_image(tmp_path: Path) -> None:
    inside = save(tmp_path / "folder.jpg" / "inside.png")
    save(tmp_path / "good.jpg")
    images = read_images(str(tmp_path / "*.jpg"), mean_colour)
    (batch,) = images
    assert batch.names == (str(tmp_path / "good.jpg"),)
    assert images.failed[0].reason == "is a folder"
    (batch,) = read_images(tmp_path, mean_colour)  # as part of a tree it is a folder like any other
    assert batch.names == (str(inside), str(tmp_path / "good.jpg"))


def test_a_named_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.jpg")
    assert stat.S_ISFIFO((tmp_path / "x.jpg").stat().st_mode)
    assert reason(tmp_path / "x.jpg") == "is not a regular file"


def test_a_preprocess_that_raises(tmp_path: Path) -> None:
    red = save(tmp_path / "red.png", "red")
    assert reason(red, fail_on_red) == "the preprocess raised ValueError: red is forbidden"


@pytest.mark.parametrize(
    ("result", "found"),
    [
        (None, "NoneType"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), "torch.uint8 (3, 4, 4)"),
        (torch.zeros(1, 4, 4), ""),
    ],
)
def test_a_preprocess_that_gives_something_else(tmp_path: Path, result: object, found: str) -> None:
    images = read_images(save(tmp_path / "x.png"), lambda image: result)  # type: ignore[arg-type,return-value]
    with pytest.raises(ImageError, match=r"expected a float tensor \(3, h, w\)") as error:
        read_all(images)
    assert f"the preprocess gave {found}" in str(error.value)


def test_strict_raises_at_the_first_bad_image(tmp_path: Path) -> None:
    save_greys(tmp_path, 3)
    (tmp_path / "001.png").write_text("bad")
    with pytest.raises(ImageError, match=r"001\.png: not an image") as error:
        read_all(read_images(tmp_path, mean_colour, strict=True))
    assert "Without strict it would be skipped" in str(error.value)


# ---- Sources


def test_a_folder_tree_is_read_sorted_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b/z.JPG", "b/a.png", "a.webp", "c/deep/er/x.jpeg", "._a.webp", ".hidden/x.png"):
        save(tmp_path / name)
    (tmp_path / "notes.md").write_text("no image, and named like none")
    with pytest.warns(UserWarning, match=r"^1 left out \(a hidden folder\): \S+/\.hidden$"):
        images = read_images(tmp_path, mean_colour)
    (batch,) = images
    assert batch.names == tuple(
        str(tmp_path / name) for name in ("a.webp", "b/a.png", "b/z.JPG", "c/deep/er/x.jpeg")
    )
    assert images.total == 4
    assert not images.failed


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    save(tmp_path / "elsewhere" / "x.png")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "photos")
    with pytest.warns(UserWarning, match=r"1 left out \(a link to a folder that is read already\): .*/loop$"):
        (batch,) = read_images(tmp_path / "photos", mean_colour)
    assert batch.names == (str(tmp_path / "photos" / "link" / "x.png"),)


def test_globs_files_and_lists_of_paths(tmp_path: Path) -> None:
    paths = save_greys(tmp_path / "photos [2019]", 3)  # a real name with a glob's characters
    odd = tmp_path / "picture"
    odd.write_bytes(paths[0].read_bytes())
    sources = [str(paths[2]), paths[0].parent, str(tmp_path / "**" / "001.*"), odd]
    (batch,) = read_images(sources, mean_colour)
    assert batch.names == tuple(map(str, (paths[2], *paths, paths[1], odd)))


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = save(tmp_path / "photos" / "x.png")
    (batch,) = read_images("~/photos", mean_colour)
    assert batch.names == (str(path),)


def test_a_text_file_of_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside, here, far = (
        save(tmp_path / "list" / "a.png"),
        save(tmp_path / "b.png"),
        save(tmp_path / "c c.png"),
    )
    text = tmp_path / "list" / "photos.txt"
    text.write_text(f"\ufeff# my photos\n\na.png\r\n  b.png \n{far}\n  # more\nlost.png\n", encoding="utf-8")
    monkeypatch.chdir(here.parent)
    images = read_images(text, mean_colour)
    (batch,) = images
    assert batch.names == (str(beside), "b.png", str(far))
    assert [failed.path for failed in images.failed] == [str(text.parent / "lost.png")]


def test_images_in_memory_are_left_as_they_are() -> None:
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    images = read_images([image, Image.new("RGB", (4, 4), "red")], mean_colour)
    (batch,) = images
    assert batch.names == ("image-0", "image-1")
    assert batch.pixels[:, :, 0, 0].tolist() == [[255, 255, 255], [255, 0, 0]]
    assert image.mode == "RGBA"
    (single,) = read_images(image, mean_colour)
    assert single.names == ("image-0",)


def test_a_tensor_is_taken_as_it_is() -> None:
    noise = torch.randn(5, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    batches = read_all(read_images(noise, batch_size=2, limit=4))
    assert torch.equal(torch.cat([batch.pixels for batch in batches]), noise[:4].detach().float())
    assert [batch.names for batch in batches] == [("image-0", "image-1"), ("image-2", "image-3")]


def write_shard(path: Path, members: list[Path]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for member in members:
            tar.add(member, member.name)
            label = member.with_suffix(".cls")
            label.write_text("7")
            tar.add(label, label.name)
    return path


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_web_dataset_shards(tmp_path: Path, workers: int) -> None:
    paths = save_greys(tmp_path / "images", 50)
    paths[20].write_text("bad")
    (tmp_path / "images" / "._x.png").write_text("what a Mac leaves behind")
    shards = [write_shard(tmp_path / "shards" / f"x-{i:03}.tar", paths[i::3]) for i in range(3)]
    expected = [f"{shards[i]}/{path.name}" for i in range(3) for path in paths[i::3]]
    bad = expected.pop(expected.index(f"{shards[2]}/020.png"))
    for source in (
        tmp_path / "shards",
        tmp_path / "shards" / "x-{000..002}.tar",
        tmp_path / "shards" / "*.tar",
    ):
        images = read_images(source, mean_colour, batch_size=20, workers=workers)
        batches = read_all(images)
        assert [name for batch in batches for name in batch.names] == expected
        assert [len(batch.names) for batch in batches] == [20, 20, 9]
        assert torch.cat([batch.pixels for batch in batches])[:, 0, 0, 0].tolist() == [
            float(Path(name).stem) for name in expected
        ]
        assert [failed.path for failed in images.failed] == [bad]
        assert images.total is None


def test_a_cut_shard_gives_what_it_has(tmp_path: Path) -> None:
    paths = save_greys(tmp_path / "images", 4)
    whole = write_shard(tmp_path / "a.tar", paths)
    cut = tmp_path / "b.tar"
    cut.write_bytes(whole.read_bytes()[:4700])
    (tmp_path / "c.tar").write_text("not a tar")
    images = read_images([cut, tmp_path / "c.tar", whole], mean_colour)
    (batch,) = images
    assert batch.names[-4:] == tuple(f"{whole}/{path.name}" for path in paths)
    assert 0 < len(batch.names[:-4]) < 4
    assert [failed.path for failed in images.failed] == [str(cut), str(tmp_path / "c.tar")]
    assert all(failed.reason.startswith("the shard cannot be read any further: ") for failed in images.failed)


def test_what_a_shard_holds_besides_photos_that_can_be_read_is_named(tmp_path: Path) -> None:
    paths = save_greys(tmp_path / "images", 3)
    shard = write_shard(tmp_path / "x.tar", paths)
    with tarfile.open(shard, "a") as tar:
        for name in (".hidden.png", "._mac.png", "x.nef"):
            tar.add(paths[0], name)
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "000.png"
        tar.addfile(link)
    images = read_images(shard, mean_colour, workers=0)
    assert [len(batch.names) for batch in images] == [3]
    assert [(Path(failed.path).name, failed.reason[:12]) for failed in images.failed] == [
        (".hidden.png", "a hidden fil"),
        ("x.nef", "a camera raw"),
        ("link.png", "a link"),
    ]


@pytest.mark.parametrize("end", [0, 512])  # between members, and in the middle of the next one's header
def test_a_shard_that_ends_without_an_end_is_not_taken_for_whole(tmp_path: Path, end: int) -> None:
    shard = write_shard(tmp_path / "x.tar", save_greys(tmp_path / "images", 4))
    with tarfile.open(shard) as tar:
        last = tar.getmembers()[4]
    shard.write_bytes(shard.read_bytes()[: last.offset] + b"x" * end)
    images = read_images(shard, mean_colour, workers=0)
    assert [len(batch.names) for batch in images] == [2]
    assert [failed.path for failed in images.failed] == [str(shard)]
    assert "breaks off, or is damaged" in images.failed[0].reason


def test_a_shard_that_is_a_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.tar")
    images = read_images([tmp_path / "x.tar", save(tmp_path / "a.png")], mean_colour, workers=0)
    assert [batch.names for batch in images] == [(str(tmp_path / "a.png"),)]
    assert "is not a regular file" in images.failed[0].reason


def test_shards_need_no_other_package_but_braces_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = write_shard(tmp_path / "x.tar", save_greys(tmp_path / "images", 1))
    for name in ("webdataset", "braceexpand"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'vitreg\[webdataset\]'"):
        read_images(tmp_path / "{x,y}.tar", mean_colour)
    assert [batch.names for batch in read_images(shard, mean_colour)] == [(f"{shard}/000.png",)]


def test_the_demo_photos() -> None:
    photos = demo_photos()
    assert 6 <= len(photos) <= 8
    assert sum(photo.stat().st_size for photo in photos) < 300_000
    sources = (photos[0].parent / "SOURCES.md").read_text()
    assert all(f"`{photo.name}`" in sources for photo in photos)
    (batch,) = read_images(photos, mean_colour, strict=True)
    assert batch.names == tuple(map(str, photos))


# ---- Nothing to read


def test_messages_when_there_is_nothing_to_read(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("# nothing\n\n")
    for source, message in [
        (tmp_path / "lost", r"no file or folder \S+/lost\. Expected a folder, an image, a glob"),
        ([tmp_path / "lost.jpg"], r"no file or folder \S+/lost\.jpg"),
        (tmp_path / "x-{0..1}.tar", r"no file or folder \S+/x-0\.tar"),
        (tmp_path / "{odd", r"no file or folder \S+/{odd"),
        (tmp_path / "empty", r"/empty is empty\. Expected images"),
        (tmp_path / "texts", r"/texts has 1 files, but none named like an image or \.tar shard"),
        (tmp_path / "*.jpg", r"/\*\.jpg matches no file"),
        (tmp_path / "texts" / "*", r"/\* has 1 files, but none"),
        (tmp_path / "texts" / "a.txt", r"a\.txt lists no image. Expected one path per line"),
        ([], "found an empty list, but expected paths or PIL images"),
        (
            torch.zeros(2, 3, 4),
            r"torch\.float32 tensor of shape \(2, 3, 4\), but expected float \(b, 3, h, w\)",
        ),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), r"torch\.uint8 tensor"),
        (torch.zeros(0, 3, 4, 4), r"\(0, 3, 4, 4\)"),
    ]:
        with pytest.raises(ImageError, match=message):
            read_images(source, mean_colour)  # type: ignore[arg-type]


def test_when_no_image_could_be_read(tmp_path: Path) -> None:
    for i in range(5):
        (tmp_path / f"{i}.jpg").touch()
    images = read_images(tmp_path, mean_colour)
    with pytest.raises(
        ImageError, match=r"none of 5 images could be read: \S+/0\.jpg: the file is empty; "
    ) as error:
        read_all(images)
    assert "2.jpg" in str(error.value)
    assert "3.jpg" not in str(error.value)
    assert len(images.failed) == 5


def test_a_shard_without_images(tmp_path: Path) -> None:
    (tmp_path / "a.cls").write_text("1")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "a.cls", "a.cls")
    with pytest.raises(ImageError, match="no image found"):
        read_all(read_images(tmp_path / "x.tar", mean_colour))


def test_the_preprocess_of_a_model(tmp_path: Path) -> None:
    path = save(tmp_path / "x.png")
    (batch,) = read_images(path, SimpleNamespace(preprocess=mean_colour))
    assert batch.pixels[0, 2, 0, 0] == 255
    with pytest.raises(
        ImageError, match=r"SimpleNamespace was wrapped without a preprocess.*Pass a function"
    ):
        read_images(path, SimpleNamespace(preprocess=None))
    with pytest.raises(ImageError, match=r"no preprocess was given\. Pass a function"):
        read_images(path)


@pytest.mark.parametrize("option", [{"batch_size": 0}, {"limit": 0}, {"workers": -1}])
def test_options_out_of_range(option: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(option))} is .*, but must be at least"):
        read_images(torch.zeros(1, 3, 4, 4), **option)  # type: ignore[arg-type]


def test_images_of_different_sizes(tmp_path: Path) -> None:
    images = [Image.new("RGB", (size, 4)) for size in (4, 4, 6, 4)]
    with pytest.raises(
        ImageError, match=r"\(3, 4, 6\) for image-2, but \(3, 4, 4\) for image-0.*batch_size=1"
    ):
        read_all(read_images(images, keep_size))
    assert [batch.pixels.shape[-1] for batch in read_images(images, keep_size, batch_size=1)] == [4, 4, 6, 4]


# ---- Batches, workers, repetition


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    bad=st.lists(st.booleans(), min_size=1, max_size=40),
    batch_size=st.integers(1, 12),
    limit=st.none() | st.integers(1, 30),
    workers=st.sampled_from([0, 2]),
)
def test_any_bad_files_any_batch_size_any_workers(
    tmp_path_factory: pytest.TempPathFactory,
    bad: list[bool],
    batch_size: int,
    limit: int | None,
    workers: int,
) -> None:
    folder = tmp_path_factory.mktemp("photos")
    paths = save_greys(folder, len(bad))
    for path, is_bad in zip(paths, bad, strict=True):
        if is_bad:
            path.write_text("bad")
    good = [i for i, is_bad in enumerate(bad) if not is_bad]
    images = read_images(folder, mean_colour, batch_size=batch_size, limit=limit, workers=workers)
    if not good:
        with pytest.raises(ImageError, match="none of"):
            read_all(images)
        return
    batches = read_all(images)
    assert [name for batch in batches for name in batch.names] == [str(paths[i]) for i in good[:limit]]
    assert [value for batch in batches for value in batch.pixels[:, 0, 0, 0].tolist()] == good[:limit]
    assert all(len(batch.names) == batch_size for batch in batches[:-1])
    assert {batch.pixels.dtype for batch in batches} == {torch.float32}
    if limit is None:
        assert [failed.path for failed in images.failed] == [str(paths[i]) for i in range(len(bad)) if bad[i]]


def test_each_iteration_gives_the_same_and_leaves_the_random_state_alone(tmp_path: Path) -> None:
    save_greys(tmp_path, 20)
    (tmp_path / "003.png").write_text("bad")
    before = torch.get_rng_state()
    images = {
        workers: read_images(tmp_path, mean_colour, batch_size=6, workers=workers) for workers in (0, 2)
    }
    first, second, third = read_all(images[0]), read_all(images[0]), read_all(images[2])
    for other in (second, third):
        assert [batch.names for batch in first] == [batch.names for batch in other]
        assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(first, other, strict=True))
    assert len(images[0].failed) == 1  # of the latest iteration, not of both
    assert torch.equal(before, torch.get_rng_state())


def test_failures_are_those_seen_so_far(tmp_path: Path) -> None:
    save_greys(tmp_path, 20)
    for i in (0, 19):
        (tmp_path / f"{i:03}.png").write_text("bad")
    images = read_images(tmp_path, mean_colour, batch_size=2)
    iterator = iter(images)
    next(iterator)
    assert [Path(failed.path).name for failed in images.failed] == ["000.png"]


def test_no_workers_for_few_images(tmp_path: Path) -> None:
    save_greys(tmp_path, 20)
    assert read_images(tmp_path, mean_colour, batch_size=11).workers == 0
    assert read_images(tmp_path, mean_colour, batch_size=10).workers == min(usable_cpus(), 4)
    assert read_images(tmp_path, mean_colour, batch_size=10, limit=19).workers == 0
    assert read_images(torch.zeros(100, 3, 4, 4), batch_size=10).workers == 0


def test_an_early_break_leaves_no_process(tmp_path: Path) -> None:
    save_greys(tmp_path, 40)
    for _ in read_images(tmp_path, mean_colour, batch_size=2, workers=2):
        assert len(multiprocessing.active_children()) == 2
        break
    assert not multiprocessing.active_children()


def test_an_error_leaves_no_process(tmp_path: Path) -> None:
    save_greys(tmp_path, 40)
    (tmp_path / "012.png").write_text("bad")
    with pytest.raises(ImageError, match=r"012\.png") as error:
        read_all(read_images(tmp_path, mean_colour, batch_size=2, workers=2, strict=True))
    assert error.value.__traceback__ is not None  # its frames are alive, and hold no workers
    assert not multiprocessing.active_children()


def test_an_error_about_a_batch_leaves_no_process(tmp_path: Path) -> None:
    for i in range(40):
        save(tmp_path / f"{i:02}.png", size=(4 + i, 4))
    with pytest.raises(ImageError, match="one size") as error:
        read_all(read_images(tmp_path, keep_size, batch_size=2, workers=2))
    assert error.value.__traceback__ is not None
    assert not multiprocessing.active_children()


def test_a_killed_worker_is_an_error_that_says_so(tmp_path: Path) -> None:
    save_greys(tmp_path, 10)
    save(tmp_path / "005.png", "red")
    with pytest.raises(
        ImageError, match=r"processes that read images failed.*exited unexpectedly.*workers=0"
    ):
        read_all(read_images(tmp_path, kill_on_red, workers=1))


@pytest.mark.slow
def test_workers_that_are_not_forked(tmp_path: Path) -> None:
    save_greys(tmp_path, 10)
    script = """
import multiprocessing, sys
from torchvision.transforms import ToTensor
from vitreg.errors import ImageError
from vitreg.data.images import read_images
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    print([len(batch.names) for batch in read_images(sys.argv[1], ToTensor(), batch_size=6, workers=1)])
    try:
        list(read_images(sys.argv[1], lambda image: None, workers=1))
    except ImageError as error:
        print(error)
"""
    (tmp_path / "script.py").write_text(script)
    result = subprocess.run(
        [sys.executable, "-W", "error", tmp_path / "script.py", tmp_path],
        capture_output=True,
        text=True,
        cwd=Path(vitreg.__file__).parents[1],
        env={**os.environ, "PYTHONPATH": str(Path(vitreg.__file__).parents[1])},
        check=False,
    )
    sizes, message = result.stdout.splitlines()
    assert sizes == "[6, 4]"
    assert "no lambda" in message
    assert result.stderr == ""


# ---- Progress


def test_progress_is_shown_on_stderr_and_cleaned_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, for rich
    monkeypatch.setenv("TERM", "xterm")
    save_greys(tmp_path, 10)
    (tmp_path / "000.png").write_text("bad")
    images = read_images(tmp_path, mean_colour, batch_size=5, progress=True)
    assert capsys.readouterr() == ("", "")
    assert len(read_all(images)) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "5/9" in shown.err
    assert "9/9" in shown.err
    assert "/s" in shown.err
    hidden, visible = "\x1b[?25l", "\x1b[?25h"  # the cursor
    with pytest.raises(ZeroDivisionError):
        [1 / 0 for _ in images]
    after = capsys.readouterr().err
    assert after.rindex(visible) > after.rindex(hidden)


def test_no_progress_unless_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_greys(tmp_path, 3)
    read_all(read_images(tmp_path, mean_colour))
    assert capsys.readouterr() == ("", "")
