"""What an outlier patch would be, were it like the clean patches nearest to it.

    distances = grid_distances((14, 14))
    filled = torch.where(outlier[..., None], nearest_clean(patches, outlier, distances), patches)

The nearest clean patches are the 4 neighbours; where all of these are outliers too, the next ring around
them, and so on. No step depends on how many outliers there are, so that it can be compiled.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def grid_distances(grid: tuple[int, int]) -> Float[Tensor, "p p"]:
    """Steps up, down, left or right from each patch to each other one; infinitely many to itself."""
    rows, columns = (axis.flatten() for axis in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
    steps = (rows[:, None] - rows).abs() + (columns[:, None] - columns).abs()
    return steps.float().fill_diagonal_(torch.inf)


def nearest_clean(
    patches: Float[Tensor, "b p d"], outlier: Bool[Tensor, "b p"], distances: Float[Tensor, "p p"]
) -> Float[Tensor, "b p d"]:
    """For each patch the mean of the clean patches nearest to it; the patch itself where none is clean."""
    away = distances.to(patches.device)[None].masked_fill(outlier[:, None], torch.inf)
    nearest = away.amin(-1, keepdim=True)
    chosen = ((away == nearest) & nearest.isfinite()).to(patches.dtype)
    # What an outlier holds may be infinite in half precision, and 0 times that is no number.
    clean = patches.masked_fill(outlier[..., None], 0)
    mean = chosen @ clean / chosen.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(nearest.isfinite(), mean, patches)
