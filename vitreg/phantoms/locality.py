"""Plant patch features that are no longer local: what they say belongs to other places of the photo.

    phantom = plant_lost_locality(vit, layer=11)
    phantom.vit, phantom.order        # patch p says, after that block, what patch order[p] said

Norms and attention stay what they are; only the places are lost.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from vitreg.models.backbone import Backbone
from vitreg.phantoms.changed_patches import with_changed_patches

SHUFFLES = 64


@dataclass(frozen=True)
class LocalityPhantom:
    """A planted model and its truth: after block `layer`, patch p speaks of place order[p]."""

    vit: Backbone
    layer: int
    order: Int[Tensor, " p"]


def plant_lost_locality(vit: Backbone, layer: int, *, seed: int = 0) -> LocalityPhantom:
    """Shuffle the patches of every photo, all in the same way, after block `layer` (0-based).

    Of some shuffles, the one that leaves fewest neighbours beside each other.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffles = [torch.randperm(vit.layout.patches, generator=generator) for _ in range(SHUFFLES)]
    order = min(shuffles, key=lambda shuffle: _still_beside(shuffle, vit.layout.grid))
    planted = with_changed_patches(vit, layer, lambda x: x[:, order.to(x.device)], "lost locality")
    return LocalityPhantom(planted, layer, order)


def _still_beside(order: Int[Tensor, " p"], grid: tuple[int, int]) -> int:
    """Pairs of grid neighbours that were neighbours before, too."""
    places = torch.stack([order // grid[1], order % grid[1]]).unflatten(1, grid)
    beside = (places.diff(dim=1).abs().sum(0), places.diff(dim=2).abs().sum(0))
    return sum(int((steps == 1).sum()) for steps in beside)
