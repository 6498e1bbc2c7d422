"""Photos with a depth map each: NYUd's split files, or folders images/ and depth/.

train, val = train_and_val("nyu/")
metres = val.depth(0) / 1000              # (h, w), 0 where there is no value
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float

from vitreg.data.datasets.classes import ClassSource
from vitreg.data.datasets.ids import photo_size
from vitreg.data.datasets.paired import paired
from vitreg.data.decoding import opened, reason
from vitreg.data.evenly_spaced import evenly_spaced
from vitreg.data.listing import LeftOut, notes_on, numbered_lines, printable, spelled
from vitreg.errors import DataError

# (top, bottom, left, right): the part of NYUd's 480 x 640 pixels that is tested (Eigen et al. 2014). Beyond
# it photos have a white border and the projected depth few values, so heads are trained on it too.
EIGEN_CROP = (45, 471, 41, 601)


@dataclass(frozen=True)
class DepthPairs:
    """Photos, and the file with each one's depth. `layout` is "nyu" or "folder"; notes: what is left out."""

    root: str
    paths: tuple[Path, ...]
    depths: tuple[Path, ...]
    layout: str
    crop: tuple[int, int, int, int] | None = None
    left_out: tuple[LeftOut, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        return notes_on(self.left_out)

    def __len__(self) -> int:
        return len(self.paths)

    def some(self, positions: Sequence[int]) -> "DepthPairs":
        """The photos at these positions."""
        paths, depths = (tuple(files[i] for i in positions) for files in (self.paths, self.depths))
        return replace(self, paths=paths, depths=depths)

    def only(self, text: str) -> "DepthPairs":
        """The photos with this text in their or their folder's name. Raises DataError if there are none."""
        kept = [i for i, path in enumerate(self.paths) if text in f"{path.parent.name}/{path.stem}"]
        if not kept:
            raise DataError(
                f"no photo of {self.root} has {text!r} in its name. The first is {self.paths[0]}."
            )
        return self.some(kept)

    def after(self, other: "DepthPairs | None") -> "DepthPairs":
        """The other's photos, then these, as one data set."""
        if other is None:
            return self
        return replace(
            self,
            paths=other.paths + self.paths,
            depths=other.depths + self.depths,
            left_out=other.left_out + self.left_out,
        )

    @property
    def scenes(self) -> tuple[str, ...]:
        """What was photographed, by the files' names without the number at their end: desk_1628.5 is desk."""
        return tuple(f"{path.parent}/{re.sub(r'[._-]?[0-9.]+$', '', path.stem)}" for path in self.paths)

    def depth(self, i: int) -> Float[np.ndarray, "h w"]:
        """The i-th depth map as stored, in its own size; 0 where there is no value, or outside `crop`.

        Raises DataError if it has another size than its photo, or no value at all.
        """
        path, values = self.depths[i], read_depth(self.depths[i])
        if values.shape != (found := photo_size(self.paths[i])):
            raise DataError(
                f"{path} is {values.shape[1]} x {values.shape[0]} pixels, but its photo is"
                f" {found[1]} x {found[0]}. Expected one depth for each pixel of the photo."
            )
        if self.crop is not None:
            top, bottom, left, right = self.crop
            inside = np.zeros_like(values)
            inside[top:bottom, left:right] = values[top:bottom, left:right]
            values = inside
        if not values.any():
            raise DataError(f"{path} has no valid pixel: all are 0, which means no value.")
        return values

    def check(self) -> None:
        """Read all depth maps. Raises DataError for the first bad one."""
        for i in range(len(self)):
            self.depth(i)


def read_depth(path: Path) -> Float[np.ndarray, "h w"]:
    """The stored depths (h, w) of a 16- or 32-bit picture, 0 where there is no (finite, positive) value.

    Raises DataError for 8 bits, which cannot hold millimetres, and for a file that cannot be read.
    """
    named = printable(str(path))
    try:
        with opened(str(path)) as image:
            if image.mode != "F" and not image.mode.startswith("I"):
                raise DataError(
                    f"{named} is an 8-bit picture ({image.mode}), perhaps a rendering of the depth."
                    " Expected a greyscale PNG of 16 bits."
                )
            values = np.array(image).astype(np.float32)
    except DataError:
        raise
    except Exception as error:  # decoders raise what they like
        raise DataError(f"the depth map {named} cannot be read: {reason(error)}.") from error
    return np.where(np.isfinite(values) & (values > 0), values, np.float32(0))


# -- layouts -----------------------------------------------------------------------------------------


def train_and_val(
    source: ClassSource, only: str = "", limit: int | None = None
) -> tuple[DepthPairs | None, DepthPairs]:
    """The training and the test photos of a data set in a layout that is known here.

    Without a split of its own, all its photos are the second and the first is None. `only` keeps photos with
    this text in their names, `limit` so many of each part, evenly spread. Raises DataError for another
    layout, a photo or a depth map without the other, or maps that `DepthPairs.check` refuses.
    """
    root = Path(source)
    if (root / "nyu_train.txt").exists() and (root / "nyu_test.txt").exists():
        parts = [nyu(root, "train"), nyu(root, "test")]
    elif (root / "images").is_dir():
        parts = [_of_folder(root, root)]
    elif (root / "train").is_dir() and (root / "val").is_dir():
        parts = [_of_folder(root, root / split) for split in ("train", "val")]
    else:
        raise DataError(
            f"{root} has no layout that is known here. Expected NYUd (nyu_train.txt, nyu_test.txt), or"
            " images/ and depth/, perhaps in train/ and val/."
        )
    parts = [part.only(only) for part in parts]
    parts = [part.some(evenly_spaced(len(part), limit)) for part in parts]
    for part in parts:
        part.check()
    return (parts[0] if len(parts) == 2 else None), parts[-1]


def nyu(root: ClassSource, split: str) -> DepthPairs:
    """NYU Depth v2 as nyu_train.txt and nyu_test.txt list it: photo, depth map and perhaps focal length.

    Paths are relative to the root, also with a slash before them. Raises DataError where a file is missing.
    """
    root = Path(root)
    listed = root / f"nyu_{split}.txt"
    pairs: list[tuple[Path, ...]] = []
    repeated: list[LeftOut] = []
    seen: set[tuple[Path, ...]] = set()
    for number, line in numbered_lines(listed):
        where = f"{printable(str(listed))}, line {number}"
        if len(names := line.split()) not in (2, 3):
            raise DataError(f"{where}: expected a photo, its depth map and perhaps a focal length.")
        pair = tuple(_listed(root, name, where) for name in names[:2])
        if pair in seen:
            repeated.append(LeftOut(where, "listed before"))
        else:
            seen.add(pair)
            pairs.append(pair)
    if not pairs:
        raise DataError(f"{printable(str(listed))} is empty.")
    paths, depths = zip(*pairs, strict=True)
    return DepthPairs(str(root), paths, depths, "nyu", EIGEN_CROP, tuple(repeated))


def _listed(root: Path, name: str, where: str) -> Path:
    candidates = [root / spelling.lstrip("/") for spelling in spelled(name)]
    if path := next(filter(os.path.exists, candidates), None):
        return path
    raise DataError(f"{where} names {printable(name)}, but there is no {printable(str(candidates[0]))}.")


def _of_folder(root: Path, place: Path) -> DepthPairs:
    pairs = paired(place / "images", place / "depth", "depth map")
    return DepthPairs(str(root), pairs.photos, pairs.others, "folder", left_out=pairs.left_out)
