"""Plant a pattern that is bound to positions: the same vector at each place of every photo.

phantom = plant_position_pattern(vit, images, layer=11, share=0.7)
phantom.vit, phantom.pattern      # the planted model, and what was added to its patches (p, d)
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vitreg.models.backbone import Backbone
from vitreg.phantoms.changed_patches import patches_after, with_changed_patches


@dataclass(frozen=True)
class PositionPhantom:
    """A planted model and its truth: `pattern` (p, d) is added to the patches after block `layer`.

    It has `rank` directions. `share` is what was asked for of the variance of those patches.
    """

    vit: Backbone
    layer: int
    pattern: Float[Tensor, "p d"]
    rank: int
    share: float


def plant_position_pattern(
    vit: Backbone,
    images: Float[Tensor, "b 3 h w"],
    layer: int,
    *,
    share: float = 0.7,
    rank: int = 3,
    seed: int = 0,
) -> PositionPhantom:
    """Add waves along rows and columns, of `rank` directions, to the patches after block `layer` (0-based).

    On `images`, the pattern has `share` of the variance of the patches there (with what the model had of
    its own, more). Raises ValueError for a share that is not between 0 and 1, or a layer out of range.
    """
    if not 0 < share < 1 or not 1 <= rank <= min(vit.layout.patches - 1, vit.anatomy.width):
        raise ValueError(
            f"share={share}, rank={rank}: expected a share between 0 and 1, and a rank of at least 1."
        )
    patches = patches_after(vit, images, layer)
    variance = (patches - patches.mean((0, 1))).square().sum(-1).mean()
    pattern = _waves(vit.layout.grid, vit.anatomy.width, rank, seed).to(patches)
    pattern *= (share / (1 - share) * variance / pattern.square().sum(1).mean()).sqrt()
    planted = with_changed_patches(vit, layer, lambda x: x + pattern.to(x), "position pattern")
    return PositionPhantom(planted, layer, pattern, rank, share)


def _waves(grid: tuple[int, int], width: int, rank: int, seed: int) -> Float[Tensor, "p d"]:
    """Orthonormal smooth maps over the grid times orthonormal directions, of equal strength."""
    generator = torch.Generator().manual_seed(seed)
    row, column = torch.meshgrid(*((torch.arange(n) + 0.5) / n for n in grid), indexing="ij")
    maps = torch.stack(
        [
            torch.cos(torch.pi * a * row) * torch.cos(torch.pi * b * column)
            for a in range(grid[0])
            for b in range(grid[1])
        ][1:],
        -1,
    ).flatten(0, 1)
    order = torch.randperm(maps.shape[1], generator=generator)[:rank]
    directions = torch.linalg.qr(torch.randn(width, rank, generator=generator)).Q
    maps = torch.nn.functional.normalize(maps[:, order], dim=0)
    return maps @ directions.T
