"""The ids in one mask file, read so that they are those that were written, or refused."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int
from PIL import Image

from vitreg.data.decoding import loses_bits, opened, reason, upright_size
from vitreg.data.listing import printable
from vitreg.errors import DataError

Colour = tuple[int, ...]

# Pillow spreads greys of 2 and 4 bits over 0 to 255.
_STEPS = {"L;2": 85, "L;4": 17}


@dataclass(frozen=True)
class Stored:
    """A mask's ids (h, w), and the colours of those that occur where the mask has a palette."""

    ids: Int[np.ndarray, "h w"]
    colours: dict[int, Colour]


def read_mask(path: Path) -> Int[np.ndarray, "h w"]:
    """The ids in a mask, (h, w): a palette's indices or grey values, of up to 32 bits.

    A colour picture counts as grey where its channels are equal and it is opaque. Raises DataError for other
    colour pictures, for JPEGs (which blur ids), for decimals and for a file that cannot be read.
    """
    return read_stored(path).ids


def read_stored(path: Path) -> Stored:
    """The same, with the palette."""
    named = printable(str(path))
    try:
        with opened(str(path)) as image:
            if image.format in ("JPEG", "MPO"):
                raise DataError(
                    f"{named} is a JPEG, which blurs ids. Expected a mask as a palette or greyscale PNG."
                )
            ids = _ids_of(image)
            colours = _colours(image, ids) if image.mode == "P" else {}
    except DataError:
        raise
    except Exception as error:  # decoders raise what they like
        raise DataError(f"the mask {named} cannot be read: {reason(error)}.") from error
    if ids is None:
        raise DataError(
            f"{named} is a colour picture ({image.mode}), not a mask. Expected one id per pixel: a palette or"
            " greyscale PNG."
        )
    return Stored(ids, colours)


def _ids_of(image: Image.Image) -> Int[np.ndarray, "h w"] | None:
    """None for what is no mask."""
    step = next((_STEPS[str(t.args)] for t in getattr(image, "tile", []) if str(t.args) in _STEPS), 1)
    deep = loses_bits(image)
    values = np.array(image)
    if image.mode in ("P", "L", "1", "I") or image.mode.startswith("I;16"):
        return values.astype(np.int64) // step
    if image.mode == "F":
        whole = np.isfinite(values).all() and not (values % 1).any()
        return values.astype(np.int64) if whole else None
    if image.mode in ("RGB", "RGBA", "LA") and not deep:
        grey = values[..., :1]
        channels = {"RGB": values, "RGBA": values[..., :3], "LA": grey}[image.mode]
        opaque = image.mode == "RGB" or (values[..., -1] == 255).all()
        return grey[..., 0].astype(np.int64) if opaque and (channels == grey).all() else None
    return None


def _colours(image: Image.Image, ids: Int[np.ndarray, "h w"] | None) -> dict[int, Colour]:
    palette = np.reshape(image.getpalette("RGB") or [], (-1, 3))
    present = [] if ids is None else np.unique(ids).tolist()
    return {i: tuple(palette[i].tolist()) for i in present if i < len(palette)}


def photo_size(path: Path) -> tuple[int, int]:
    """(height, width) of a photo once it is upright, from its header. Raises DataError if it has none."""
    try:
        return upright_size(str(path))
    except Exception as error:  # decoders raise what they like
        raise DataError(f"the photo {printable(str(path))} cannot be read: {reason(error)}.") from error
