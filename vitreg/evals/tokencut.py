"""TokenCut: cut the graph of like patches in two, and take the side of the clearest patch (Wang et al. 2022).

found = tokencut(gram(normalised), grid=(24, 32))
found.box                                # (left, top, right, bottom) in patches
"""

import numpy as np
from jaxtyping import Float
from scipy.linalg import eigh

from vitreg.evals.lost import Found, Grid, extent_around

_WEAK = 1e-5  # the weight between unlike patches: the graph stays connected
_SAME = 1e-9  # closer than this are equal: eigenvalues (0 to 2), and entries of an eigenvector to the largest


def tokencut(cosines: Float[np.ndarray, "p p"], grid: Grid, tau: float = 0.2) -> Found:
    """The box around one object, from the cosines of the patches' features.

    The normalised cut of a graph with weights 1 where the cosine exceeds `tau`, else 1e-5: patches beyond
    the mean of the second generalised eigenvector of (D - W) y = l D y on one side, the rest on the other.
    The object is on the side of the largest |y| (the first of several), in the part of it that connects to
    that patch. Degenerate where several y have the second eigenvalue, as where all patches are alike: no cut
    is the best, and the box is the whole photo.
    """
    nothing = Found((0, 0, grid[1], grid[0]), True)
    if len(cosines) < 3:
        return nothing
    weights = np.where(cosines > tau, 1.0, _WEAK)
    scale = weights.sum(1) ** -0.5
    # With y = D^(-1/2) z it is a standard symmetric problem, solved in half the time; order and sign turn.
    last = len(weights) - 1
    values, vectors = eigh(scale[:, None] * weights * scale, subset_by_index=[last - 2, last - 1])
    if values[1] - values[0] < _SAME:
        return nothing
    y = scale * vectors[:, 1]
    size = np.abs(y)
    seed = int((size > (1 - _SAME) * size.max()).argmax())  # patches with the same neighbours tie
    beyond = y > y.mean()
    return Found(extent_around(seed, beyond == beyond[seed], grid), False)
