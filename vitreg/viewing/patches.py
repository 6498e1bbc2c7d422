"""Patches and other tokens by name, and the same place in models with other grids.

patch_of("outlier", photo, version)      # the photo's patch with the largest norm
parse("3,4")                             # what the command line says
"""

from typing import TYPE_CHECKING

import numpy as np
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vitreg.diagnosis.one_image import Query

if TYPE_CHECKING:
    from vitreg.viewing.result import LookVersion

Patch = tuple[int, int]  # row and column, from 0

# A patch, or the name of one, or the name of another token: "CLS", "register 0".
PatchName = str | Patch

EXPECTED = "a patch as ROW,COLUMN (from 0), 'outlier' (the one with the largest norm), or 'centre'"


def parse(text: str) -> PatchName:
    """What was written for a patch or token: "3,4" is the patch (3, 4)."""
    row, comma, column = text.partition(",")
    if comma and row.strip().isdecimal() and column.strip().isdecimal():
        return int(row), int(column)
    return text


def title_of(name: PatchName) -> str:
    """What a patch or token is called in a picture."""
    if isinstance(name, str):
        return {"outlier": "the largest norm's patch", "centre": "the centre patch"}.get(name, name)
    return f"patch {name[0]},{name[1]}"


def patch_of(name: PatchName, photo: int, version: "LookVersion") -> Patch:
    """The patch of that name. Raises ValueError for a name that is none, or a place outside of the grid."""
    norms = version.photos[photo].norms[version.diagnosis.detect_layer]
    rows, columns = norms.shape
    if name == "outlier":
        row, column = divmod(int(np.argmax(norms)), columns)
        return row, column
    if name == "centre":
        return rows // 2, columns // 2
    if isinstance(name, str):
        raise ValueError(f"{name!r}: expected {EXPECTED}.")
    if not (0 <= name[0] < rows and 0 <= name[1] < columns):
        raise ValueError(f"patch {name[0]},{name[1]} is outside of the grid of {rows}x{columns} patches.")
    return name


def same_place(patch: Patch, here: tuple[int, int], there: tuple[int, int]) -> Patch:
    """The patch of another grid that covers the middle of this one."""
    row, column = (int((x + 0.5) / n * m) for x, n, m in zip(patch, here, there, strict=True))
    return row, column


def query_of(name: PatchName, photo: int, first: "LookVersion", version: "LookVersion") -> Query:
    """The token of a version that a name means: a patch is named in the first version."""
    if isinstance(name, str) and name.lower() == "cls":
        return "CLS"
    if isinstance(name, str) and name.startswith("register"):
        return name
    return same_place(patch_of(name, photo, first), first.diagnosis.grid, version.diagnosis.grid)


def cosines_to(features: Float[Tensor, "gh gw d"], patch: Patch) -> Float[np.ndarray, "gh gw"]:
    """The cosine of all patches' features to those of one."""
    units = F.normalize(features, dim=-1)
    alike: np.ndarray = (units @ units[patch]).numpy()
    return alike
