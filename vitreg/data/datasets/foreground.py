"""Photos with a foreground mask each: ImageNet-Segmentation's one file, or any layout of masks.py.

with foreground("gtsegs_ijcv.mat", cache) as photos:
    photos.mask(0)                 # (h, w): above 0 foreground, 0 background, -1 neither
"""

import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitreg.data.datasets.classes import ClassSource
from vitreg.data.datasets.masks import VOID, Masked, train_and_val
from vitreg.data.datasets.paired import paired
from vitreg.data.decoding import check_regular, reason
from vitreg.data.listing import printable
from vitreg.errors import DataError, MissingExtraError
from vitreg.files import write_atomically
from vitreg.provenance import digest


@contextmanager
def foreground(source: ClassSource, cache: Path | None = None) -> Iterator[Masked]:
    """Photos whose masks have a background, 0; every other class is foreground.

    Of VOC and of folders, the validation photos if they are told apart. A `.mat` file (ImageNet-Segmentation,
    Guillaumin et al. 2014) is unpacked into `cache`, once, or into a temporary folder. Raises DataError for
    another layout and for masks without a background, MissingExtraError where h5py is missing.
    """
    path = Path(source)
    if path.suffix != ".mat":
        yield _with_background(train_and_val(path)[1])
    elif cache is not None:
        yield _imagenet(path, cache / f"{path.stem}-{_state(path)}")
    else:
        with tempfile.TemporaryDirectory(prefix="vitreg-") as folder:
            yield _imagenet(path, Path(folder))


def _with_background(photos: Masked) -> Masked:
    if 0 in photos.ignore:
        raise DataError(
            f"{photos.root} has no background class: every pixel is of some class. Expected masks where 0 is"
            " the background, such as VOC's."
        )
    return photos


def _state(path: Path) -> str:
    try:
        found = path.stat()
    except OSError as error:
        raise DataError(
            f"there is no file {path}. Expected ImageNet-Segmentation's gtsegs_ijcv.mat."
        ) from error
    return digest(str(path.resolve()), found.st_size, found.st_mtime_ns)


# -- ImageNet-Segmentation ---------------------------------------------------------------------------


def _imagenet(mat: Path, folder: Path) -> Masked:
    try:
        import h5py
    except ImportError as error:
        raise MissingExtraError("h5py", "eval") from error
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    try:
        check_regular(str(mat))
        with h5py.File(mat) as file:
            _unpack(file, folder)
    except Exception as error:  # h5py and damaged arrays raise what they like
        raise DataError(
            f"{printable(str(mat))} is not laid out as gtsegs_ijcv.mat: {reason(error)}. Expected an HDF5"
            " file (MATLAB 7.3) with value/img and value/gt."
        ) from error
    pairs = paired(folder / "images", folder / "masks", "mask")
    return Masked(str(mat), pairs.photos, pairs.others, ("background", "foreground"), (VOID,), "all")


def _unpack(file: Any, folder: Path) -> None:
    """Each photo and mask as a PNG; those that an earlier run wrote stay.

    MATLAB stores columns first, so arrays come as (3, w, h); value/gt holds a cell with one mask per photo.
    """
    images, masks = file["value/img"], file["value/gt"]
    if len(images) != len(masks):
        raise KeyError(f"{len(images)} photos, but {len(masks)} masks")
    for i in range(len(images)):
        written = folder / "masks" / f"{i:05}.png"
        if not written.exists():
            photo, mask = file[images[i, 0]], file[file[masks[i, 0]][0, 0]]
            _write_png(folder / "images" / written.name, np.array(photo).T)
            _write_png(written, np.array(mask).T)  # last: where it is, both are


def _write_png(path: Path, pixels: np.ndarray) -> None:
    data = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels, dtype=np.uint8)).save(data, "png", compress_level=1)
    write_atomically(path, data.getvalue())
