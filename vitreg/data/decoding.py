"""One messy photo -> an upright 8-bit RGB image, or one line that says why not."""

import contextlib
import io
import os
import stat
import warnings
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec

import numpy as np
from jaxtyping import Float
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from vitreg.errors import ImageError

# Formats that Pillow cannot turn into pixels by itself. EPS is out also because it would run Ghostscript.
_NOT_PHOTOS = {"EPS", "PDF", "PALM", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"}

# Photos that Pillow reads with the help of others, if at all.
_HEIF = frozenset((".heic", ".heif", ".hif", ".heics", ".heifs"))
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
_PLUGINS = {
    ".avif": "AVIF, which Pillow reads from 11.3 on",
    ".jxl": "JPEG XL, which needs a plugin of Pillow",
}
_RAWS = frozenset(
    (
        ".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".fff", ".iiq", ".kdc", ".mef",
        ".mos", ".mrw", ".nef", ".nrw", ".orf", ".pef", ".raf", ".rw2", ".rwl", ".sr2", ".srf",
        ".srw", ".x3f",
    )
)  # fmt: skip
_HEIF_MISSING = "HEIC, which needs pillow-heif: pip install 'vitreg[heif]'"
_RAW = "a camera raw, of which Pillow reads a small preview at most: export it as JPEG or TIFF"


@cache
def photo_extensions() -> frozenset[str]:
    """File name endings of photos, in lower case with the dot, those included that cannot be read here."""
    return _registered() | _HEIF | _RAWS | frozenset(_PLUGINS)


@cache
def _registered() -> frozenset[str]:
    Image.init()
    return frozenset(e for e, format in Image.registered_extensions().items() if format not in _NOT_PHOTOS)


def why_unread(name: str) -> str | None:
    """Why photos with such a name cannot be read here; None if they can, or are no photos."""
    ending = os.path.splitext(name)[1].lower()
    if ending in _RAWS:
        return _RAW
    if ending in _HEIF:
        return None if find_spec("pillow_heif") else _HEIF_MISSING
    return _PLUGINS.get(ending) if ending not in Image.registered_extensions() else None


def decode(
    content: str | bytes | Image.Image, most_pixels: int | None = None, name: str | None = None
) -> Image.Image:
    """Any image -> RGB: upright, first frame, 8 bit, transparency on white.

    One of more than `most_pixels` is an ImageError before any pixel is decoded: a small file may hold a very
    large image. (Pillow has a limit of its own, 179 million.) `name` is that of the file that the bytes are
    from: by its ending, camera raws are told from TIFFs.
    """
    if isinstance(content, Image.Image):
        with _quiet():
            return _to_rgb(content)
    with opened(content, name) as image:
        if most_pixels is not None and image.width * image.height > most_pixels:
            raise ImageError(
                f"it has {image.width} x {image.height} pixels, but at most {most_pixels:,} are taken"
            )
        return _to_rgb(image)


@contextlib.contextmanager
def opened(content: str | bytes, name: str | None = None) -> Iterator[Image.Image]:
    """An image file of which only the header is read so far. Raises ImageError, or what Pillow raises."""
    path = content if isinstance(content, str) else None
    if path is not None:
        check_regular(path)
    named = name or path or ""
    with _quiet(), io.BytesIO(content) if isinstance(content, bytes) else open(content, "rb") as file:
        head = file.read(16)
        if not head:
            raise ImageError("the file is empty")
        file.seek(0)
        if os.path.splitext(named)[1].lower() in _RAWS or head[4:12] == b"ftypcrx ":
            raise ImageError(_RAW)
        if is_heif := head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS:
            _register_heif()
        Image.init()  # a spawned worker has not met all formats yet
        try:
            image = Image.open(file, formats=[name for name in Image.OPEN if name not in _NOT_PHOTOS])
        except UnidentifiedImageError as error:
            if missing := _missing_reader(head, is_heif):
                raise ImageError(missing) from error
            raise
        with image:
            if _is_raw(image):
                raise ImageError(_RAW)
            yield image


def check_regular(path: str) -> None:
    """Raise ImageError for what is not a regular file: to open a named pipe would wait forever."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ImageError("is a folder" if os.path.isdir(path) else "is not a regular file")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Pillow warns about metadata, palettes and large sizes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@cache
def _register_heif() -> None:
    """Teach Pillow HEIC, if pillow-heif is installed."""
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()


def _missing_reader(head: bytes, is_heif: bool) -> str | None:
    """What reads a file that Pillow does not know, by its first 16 bytes; None where that is not known."""
    if is_heif:
        return None if "HEIF" in Image.OPEN else _HEIF_MISSING
    if head[4:12] in (b"ftypavif", b"ftypavis"):
        return None if "AVIF" in Image.OPEN else _PLUGINS[".avif"]
    if head.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")):
        return _PLUGINS[".jxl"]
    return None


def _is_raw(image: Image.Image) -> bool:
    """Whether a file is a camera raw that Pillow takes for a TIFF: its first picture is then a preview."""
    tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    dng_version, subfile_type, reduced = 50706, 254, 1
    return dng_version in tags or bool(int(tags.get(subfile_type, 0)) & reduced)


# -- orientation -------------------------------------------------------------------------------------


def upright_size(path: str) -> tuple[int, int]:
    """(height, width) of a photo as `decode` gives it, from its header. Raises what `opened` raises."""
    with opened(path) as image:
        width, height = image.size
        if (
            image.format == "TIFF"
        ):  # newer Pillows give a turned TIFF's size when it is upright, others do not
            tags = getattr(image, "tag_v2", {})
            width, height = tags[ExifTags.Base.ImageWidth], tags[ExifTags.Base.ImageLength]
        # To look for a PNG's EXIF, Pillow decodes the whole picture.
        may_be_turned = image.format != "PNG" or _has_exif(path)
        lying = may_be_turned and image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        return (width, height) if lying else (height, width)


def _has_exif(path: str) -> bool:
    with open(path, "rb") as file:
        content = file.read()
    return any(mark in content for mark in (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp"))


# -- pixels ------------------------------------------------------------------------------------------


def _to_rgb(image: Image.Image) -> Image.Image:
    deep = loses_bits(image)
    with contextlib.suppress(Exception):  # a damaged EXIF block does not make the photo unreadable
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = _to_8bit(image)
    if deep:
        _check_brightness(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def loses_bits(image: Image.Image) -> bool:
    """Whether a file that is not decoded yet has 16 bits a colour, of which Pillow keeps the upper 8."""
    layouts = [str(tile.args) for tile in getattr(image, "tile", [])]
    return not image.mode.startswith(("I", "F")) and any(";16" in layout for layout in layouts)


def _check_brightness(image: Image.Image) -> None:
    """Raise ImageError where 16-bit colours leave the upper bits empty, as 12-bit cameras' do."""
    largest = int(np.asarray(image.convert("RGB")).max())
    if 0 < largest < 64:
        raise ImageError(
            f"its 16-bit colours fill the lowest {8 + largest.bit_length()} bits only, of which Pillow"
            f" keeps {largest.bit_length()}: save it with 8 bits a colour"
        )


# The largest values of usual scales: 0 to 1, and 8, 10, 12, 14 and 16 bits, whatever holds them.
_WHITES = (1, 255, 1023, 4095, 16383, 65535)
_NO_DATA = (-9999, -32768)  # where a map has no value, by custom
_ODD = 0.5  # per cent of the values that may be beyond black or white


def _to_8bit(image: Image.Image) -> Image.Image:
    """Deep grey -> 8 bit. Black is 0, and white the end of the first usual scale that the values fit.

    Where nearly all of them lie in the darkest quarter of that scale (few bright spots in a satellite's
    values), and where they fit no scale, black and white are values themselves, but for the outermost. What
    is no number is black.
    """
    values = np.asarray(image, np.float32)
    known = np.isfinite(values) & (np.abs(values) < 1e30) & ~np.isin(values, _NO_DATA)
    values = np.where(known, values, 0)
    if not known.any():
        return Image.fromarray(np.zeros(values.shape, np.uint8))
    black, white = _range(values[known])
    scaled = np.clip((values - black) / max(white - black, 1e-9), 0, 1) * known
    return Image.fromarray(np.rint(scaled * 255).astype(np.uint8))


def _range(values: Float[np.ndarray, " n"]) -> tuple[float, float]:
    """What becomes black and what white."""
    most = float(values.max())
    dark = float(np.percentile(values, _ODD, method="lower"))
    bright = float(np.percentile(values, 100 - _ODD, method="higher"))
    if values.min() < 0 or most > _WHITES[-1]:
        return dark, bright
    if most > 255 and not (values % 257).any():  # 8 bits that were spread over 16
        return 0.0, 65535.0
    white = float(next(white for white in _WHITES if most <= white))
    if white != 255 and 0 < bright < white / 4:  # 8 bits are as dark as they are
        return 0.0, bright
    return 0.0, white


def reason(error: BaseException) -> str:
    """One short line."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or in a format that Pillow does not know"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    kind = "" if isinstance(error, OSError | ImageError) and text else f"{type(error).__name__}: "
    return " ".join(f"{kind}{text}".split())[:300]
