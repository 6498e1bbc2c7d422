"""TokenCut: cut the graph of like patches in two, and take the side of the clearest patch (Wang et al. 2022).

found = tokencut(features, grid=(24, 32))
found.box                                # (left, top, right, bottom) in patches

Of few patches the whole matrix is solved. Of more, Lanczos' method finds the one eigenvector from products
with the graph, which holds one bit for each pair.
"""

import numpy as np
import torch.nn.functional as F
from jaxtyping import Float
from scipy.linalg import eigh
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor

from vitreg.evals.lost import Found, Grid, extent_around
from vitreg.evals.patch_pairs import LikePairs

MOST_SOLVED = 256  # patches whose whole matrix is solved
_WEAK = 1e-5  # the weight between unlike patches: the graph stays connected
_SAME = 1e-9  # closer than this are equal: eigenvalues (0 to 2), and entries of an eigenvector to the largest
_APART = 1e-6  # from a cosine of 1: two eigenvectors that differ
_TOLERANCE = 1e-11  # of Lanczos' method, relative to the eigenvalue
_VECTORS, _RESTARTS = 40, 50  # of Lanczos' method: about 1000 products with the graph at most


def tokencut(features: Float[Tensor, "p d"], grid: Grid, tau: float = 0.2) -> Found:
    """The box around one object, from the cosines of the patches' features.

    The normalised cut of a graph with weights 1 where the cosine exceeds `tau`, else 1e-5: patches beyond
    the mean of the second generalised eigenvector of (D - W) y = l D y on one side, the rest on the other.
    The object is on the side of the largest |y| (the first of several), in the part of it that connects to
    that patch. Degenerate where several y have the second eigenvalue, as where all patches are alike: no cut
    is the best, and the box is the whole photo.
    """
    like = LikePairs(F.normalize(features.double(), dim=1).numpy(), tau)
    y = _best_cut(like) if like.patches > 2 else None
    if y is None:
        return Found((0, 0, grid[1], grid[0]), True)
    size = np.abs(y)
    seed = int((size > (1 - _SAME) * size.max()).argmax())  # patches with the same neighbours tie
    # Its sign is arbitrary. Patches at the mean, up to rounding, are on neither side.
    from_mean = np.sign(y[seed]) * (y - y.mean())
    return Found(extent_around(seed, from_mean > _SAME * size.max(), grid), False)


def _best_cut(like: LikePairs) -> Float[np.ndarray, " p"] | None:
    """The second generalised eigenvector; None where several have its eigenvalue.

    With y = D^(-1/2) z it is a standard symmetric problem, of D^(-1/2) W D^(-1/2); order and sign turn.
    """
    scale = _weighted(like, np.ones(like.patches)) ** -0.5
    z = _solved(like, scale) if like.patches <= MOST_SOLVED else _approached(like, scale)
    return None if z is None else scale * z


def _weighted(like: LikePairs, values: Float[np.ndarray, " p"]) -> Float[np.ndarray, " p"]:
    """W times a vector."""
    return _WEAK * values.sum() + (1 - _WEAK) * like.sums(values)


def _solved(like: LikePairs, scale: Float[np.ndarray, " p"]) -> Float[np.ndarray, " p"] | None:
    weights = np.where(like.dense(), 1.0, _WEAK)
    # All of them: asked for a few only, LAPACK gives none of those that many vectors share.
    values, vectors = eigh(scale[:, None] * weights * scale, driver="evd")
    return None if values[-2] - values[-3] < _SAME else vectors[:, -2]


def _approached(like: LikePairs, scale: Float[np.ndarray, " p"]) -> Float[np.ndarray, " p"] | None:
    """By Lanczos' method, from two starts: where they end apart, or nowhere, several have the eigenvalue."""
    first = 1 / scale / np.linalg.norm(1 / scale)  # the first eigenvector, of eigenvalue 1

    def times(z: Float[np.ndarray, "..."]) -> Float[np.ndarray, " p"]:
        z = z.ravel()
        # The first eigenvalue is moved to -2, under all others (-1 to 1): the second is the largest.
        return scale * _weighted(like, scale * z) - 3 * first * (first @ z)

    graph = LinearOperator((like.patches, like.patches), times, dtype=float)
    ends = []
    for seed in range(2):
        start = np.random.default_rng(seed).standard_normal(like.patches)
        try:
            (value,), vectors = eigsh(
                graph, 1, which="LA", v0=start, ncv=_VECTORS, maxiter=_RESTARTS, tol=_TOLERANCE
            )
        except ArpackNoConvergence:
            return None
        if value < _SAME:  # all patches are alike, and all eigenvalues but the first are 0
            return None
        ends.append(vectors[:, 0])
    # A product with the graph gives patches with the same neighbours the same entry, whatever the start.
    return times(ends[0]) if abs(ends[0] @ ends[1]) > 1 - _APART else None
