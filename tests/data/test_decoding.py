"""Photos as they are seen: deep greys, formats that Pillow does not read by itself, camera raws."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitreg.data.decoding import decode, photo_extensions, reason, upright_size, why_unread
from vitreg.errors import ImageError


def shown(path: Path, values: np.ndarray) -> np.ndarray:
    """What becomes of a grey picture (h, w)."""
    Image.fromarray(values).save(path)
    return np.asarray(decode(str(path)))[..., 0]


def ramp(largest: float, kind: type) -> np.ndarray:
    return np.linspace(0, largest, 64).reshape(8, 8).astype(kind)


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_greys_of_any_depth_are_seen_from_black_to_white(tmp_path, kind, bits):
    values = ramp(2**bits - 1, kind)
    found = shown(tmp_path / "x.tif", values)
    assert (found[0, 0], found[-1, -1]) == (0, 255)
    np.testing.assert_allclose(found, values / (2**bits - 1) * 255, atol=0.51)


def test_8_bits_in_other_types_are_the_picture_of_8_bits_however_dark(tmp_path):
    grey = ramp(40, np.uint8)
    for kind in (np.int32, np.float32):
        np.testing.assert_array_equal(shown(tmp_path / "x.tif", grey.astype(kind)), grey)
    np.testing.assert_array_equal(shown(tmp_path / "x.png", grey.astype(np.uint16) * 257), grey)


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_a_satellites_few_bright_spots_do_not_leave_the_land_dark(tmp_path, kind):
    values = np.random.default_rng(0).integers(300, 3000, (40, 40)).astype(kind)
    values[0, :4] = 15000
    found = shown(tmp_path / "x.tif", values)
    assert found[1:].mean() > 100
    assert (found[0, :4] == 255).all()


@pytest.mark.parametrize("odd", [float("nan"), float("-inf"), -9999, -32768, -3.4e38])
def test_where_a_map_has_no_value_it_is_black_and_the_rest_is_seen(tmp_path, odd):
    values = ramp(800, np.float32)
    values[0, :3] = odd
    found = shown(tmp_path / "x.tif", values)
    assert (found[0, :3] == 0).all()
    np.testing.assert_allclose(found.flatten()[3:], values.flatten()[3:] / 1023 * 255, atol=0.51)


def test_values_on_no_usual_scale_go_from_the_darkest_to_the_brightest(tmp_path):
    values = np.linspace(-50, 9000, 400).reshape(20, 20).astype(np.float32)
    values[0, 0] = 1e6  # one pixel that is out of order
    found = shown(tmp_path / "x.tif", values)
    assert found[0, 0] == 255
    assert found[-1, -1] >= 253
    assert abs(int(found[10, 0]) - 128) < 4


def png(values: np.ndarray, colour: int) -> bytes:
    """A PNG of 16 bits a channel."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    )
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("bits", [10, 12, 14])
def test_deep_colours_that_pillow_would_show_black_are_named(bits):
    colours = np.stack([ramp(2**bits - 1, np.uint16)] * 3, -1)
    with pytest.raises(ImageError, match=rf"colours fill the lowest {bits} bits .*save it with 8 bits"):
        decode(png(colours, 2))


def test_deep_colours_that_use_their_bits_are_read():
    found = np.asarray(decode(png(np.stack([ramp(65535, np.uint16)] * 3, -1), 2)))
    assert (found[0, 0, 0], found[-1, -1, 0]) == (0, 255)
    assert np.asarray(decode(png(np.zeros((2, 2, 3)), 2))).max() == 0  # a black photo is black


# -- formats -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".nef", ".CR2", ".arw", ".dng", ".raf"])
def test_camera_raws_are_named_and_their_previews_are_not_taken_for_them(tmp_path, ending):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.tif")
    path = (tmp_path / "x.tif").rename(tmp_path / f"x{ending}")
    assert ending.lower() in photo_extensions()
    assert "camera raw" in (why_unread(path.name) or "")
    for content, name in ((str(path), None), (path.read_bytes(), f"shard.tar/x{ending}")):
        with pytest.raises(ImageError, match=r"a camera raw.*export it as JPEG or TIFF"):
            decode(content, name=name)


@pytest.mark.parametrize("tag", [{50706: b"\1\4\0\0"}, {254: 1}])
def test_a_raw_that_is_called_a_tiff_is_known_by_its_tags(tmp_path, tag):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.tif", tiffinfo=tag)
    with pytest.raises(ImageError, match="a camera raw"):
        decode(str(tmp_path / "x.tif"))


def heic(brand: bytes) -> bytes:
    return b"\0\0\0\x18ftyp" + brand + bytes(12)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (heic(b"heic"), "HEIC, which needs pillow-heif: pip install 'vitreg[heif]'"),
        (heic(b"mif1"), "HEIC, which needs pillow-heif"),
        (heic(b"avif"), "AVIF, which Pillow reads from"),
        (b"\xff\x0a" + bytes(14), "JPEG XL, which needs a plugin"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(8), "JPEG XL, which needs a plugin"),
        (heic(b"crx "), "a camera raw"),
    ],
)
def test_what_is_missing_is_said_whatever_the_file_is_called(tmp_path, monkeypatch, content, why):
    for plugin in ("HEIF", "AVIF", "JXL"):
        Image.init()
        monkeypatch.delitem(Image.OPEN, plugin, raising=False)
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name in Image.OPEN])
    monkeypatch.setattr("vitreg.data.decoding._register_heif", lambda: None)
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(ImageError) as error:
        decode(str(tmp_path / "x.jpg"))
    assert reason(error.value).startswith(why)


def test_heic_photos_are_read_upright_where_pillow_heif_is_installed(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    image = Image.new("RGB", (64, 32), "blue")
    image.paste("red", (0, 0, 32, 32))
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("IMG_1.HEIC", "named-by-another.jpg"):
        heif.from_pillow(image).save(tmp_path / name, quality=90, exif=exif.tobytes())
        assert why_unread(name) is None
        found = decode(str(tmp_path / name))
        assert upright_size(str(tmp_path / name)) == (found.height, found.width) == (64, 32)
        red, _, blue = found.getpixel((16, 5))
        assert red > 200 > 60 > blue


@pytest.mark.parametrize("kind", ["png", "jpeg", "tiff", "webp"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_size_in_the_header_is_that_of_the_decoded_photo(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (8, 6)).save(tmp_path / "x", kind, exif=exif)
    found = decode(str(tmp_path / "x"))
    assert upright_size(str(tmp_path / "x")) == (found.height, found.width)
    assert (found.height > found.width) == (orientation > 4)


def test_bytes_and_files_are_decoded_alike(tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (3, 2), "teal").save(file, "png")
    (tmp_path / "x.png").write_bytes(file.getvalue())
    assert decode(file.getvalue()).tobytes() == decode(str(tmp_path / "x.png")).tobytes()
