"""One messy photo -> an upright 8-bit RGB image, or one line that says why not."""

import contextlib
import io
import os
import stat
import warnings
from functools import cache

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vitreg.errors import ImageError

# Formats that Pillow cannot turn into pixels by itself. EPS is out also because it would run Ghostscript.
_NOT_PHOTOS = {"EPS", "PDF", "PALM", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"}


@cache
def photo_extensions() -> frozenset[str]:
    """File name endings of photos, in lower case with the dot."""
    Image.init()
    return frozenset(e for e, format in Image.registered_extensions().items() if format not in _NOT_PHOTOS)


def decode(content: str | bytes | Image.Image, most_pixels: int | None = None) -> Image.Image:
    """Any image -> RGB: upright, first frame, 8 bit, transparency on white.

    One of more than `most_pixels` is an ImageError before any pixel is decoded: a small file may hold a very
    large image. (Pillow has a limit of its own, 179 million.)
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about metadata, palettes and large sizes
        if isinstance(content, Image.Image):
            return _to_rgb(content)
        if isinstance(content, str) and not stat.S_ISREG(os.stat(content).st_mode):
            # To open a named pipe would wait forever.
            raise ImageError("is a folder" if os.path.isdir(content) else "is not a regular file")
        with io.BytesIO(content) if isinstance(content, bytes) else open(content, "rb") as file:
            if not file.read(1):
                raise ImageError("the file is empty")
            file.seek(0)
            Image.init()  # a spawned worker has not met all formats yet
            with Image.open(file, formats=[name for name in Image.OPEN if name not in _NOT_PHOTOS]) as image:
                if most_pixels is not None and image.width * image.height > most_pixels:
                    raise ImageError(
                        f"it has {image.width} x {image.height} pixels, but at most {most_pixels:,} are taken"
                    )
                return _to_rgb(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    with contextlib.suppress(Exception):  # a damaged EXIF block does not make the photo unreadable
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = _to_8bit(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _to_8bit(image: Image.Image) -> Image.Image:
    """Deep grey -> 8 bit. White is 65535 (for floats the first of 1, 255, 65535 that fits) or the maximum."""
    values = np.nan_to_num(np.asarray(image, np.float32), posinf=0, neginf=0)
    low, high = float(values.min()), float(values.max())
    whites = (1, 255, 65535) if image.mode == "F" else (65535,)
    fitting = [(0.0, white) for white in whites if low >= 0 and high <= white]
    black, white = [*fitting, (low, high)][0]
    return Image.fromarray(np.rint((values - black) / max(white - black, 1e-9) * 255).astype(np.uint8))


def reason(error: BaseException) -> str:
    """One short line."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or in a format that Pillow does not know"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    kind = "" if isinstance(error, OSError | ImageError) and text else f"{type(error).__name__}: "
    return " ".join(f"{kind}{text}".split())[:300]
