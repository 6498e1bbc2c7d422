"""LOST: the object is what resembles the patch that resembles the fewest others (Siméoni et al. 2021).

found = lost(features, grid=(24, 32))
found.box                                # (left, top, right, bottom) in patches

Everything is float64: what decides is the sign of sums that may be close to zero.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import ndimage
from torch import Tensor

from vitreg.evals.patch_pairs import dot_products

Grid = tuple[int, int]  # (rows, columns) of patches


class Found(NamedTuple):
    """Where the object is: (left, top, right, bottom) in patches, right and bottom excluded.

    `degenerate` says that the method did not tell any patch from the others.
    """

    box: tuple[int, int, int, int]
    degenerate: bool


def lost(features: Float[Tensor, "p d"], grid: Grid, bias: float = 0.0, similar: int = 100) -> Found:
    """The box around one object, from the dot products A of the patches' features.

    The seed is the patch with the fewest positive A (the first of several). Of the `similar` patches with
    the fewest, those that are positive with the seed vote, A summed over them; the object is the connected
    part of positive votes that holds the seed. `bias` is added to A first; a negative one keeps features
    that all point one way from being all alike. Degenerate where every vote is positive, as where every A
    is: the box is the whole photo whatever it shows.
    """
    (found,) = lost_by_bias(features, grid, [bias], similar)
    return found


def lost_by_bias(
    features: Float[Tensor, "p d"], grid: Grid, biases: Sequence[float], similar: int = 100
) -> list[Found]:
    """What `lost` finds with each bias, from one pass over all pairs of patches."""
    rows = features.double().numpy()
    alike = np.empty((len(biases), len(rows)), int)
    for block, products in dot_products(rows, rows):
        for count, bias in zip(alike, biases, strict=True):
            count[block] = (products + bias > 0).sum(1)
    return [_around_rarest(rows, grid, *each, similar) for each in zip(alike, biases, strict=True)]


def _around_rarest(
    rows: Float[np.ndarray, "p d"], grid: Grid, alike: Int[np.ndarray, " p"], bias: float, similar: int
) -> Found:
    rarest = np.argsort(alike, kind="stable")[:similar]
    seed = int(rarest[0])
    voters, votes = rows[rarest[rows[rarest] @ rows[seed] + bias > 0]], np.zeros(len(rows))
    for _, products in dot_products(voters, rows):
        votes += (products + bias).sum(0)
    return Found(extent_around(seed, votes > 0, grid), bool((votes > 0).all()))


def extent_around(seed: int, chosen: Bool[np.ndarray, " p"], grid: Grid) -> tuple[int, int, int, int]:
    """The extent of the chosen patches that connect to the seed over edges; of the seed if it is not one.

    (left, top, right, bottom) in patches, right and bottom excluded.
    """
    parts, _ = ndimage.label(chosen.reshape(grid))
    own = parts == parts.flat[seed] if chosen[seed] else np.arange(chosen.size).reshape(grid) == seed
    rows, columns = own.any(1).nonzero()[0], own.any(0).nonzero()[0]
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
