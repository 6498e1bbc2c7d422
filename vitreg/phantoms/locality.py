"""Plant patch features that are no longer local: what they say belongs to other places of the photo.

    phantom = plant_lost_locality(vit, layer=11)
    phantom.vit, phantom.order        # patch p says, after that block, what patch order[p] said

Norms and attention stay what they are; only the places are lost.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from vitreg.models import Backbone
from vitreg.phantoms.stream import with_changed_patches


@dataclass(frozen=True)
class LocalityPhantom:
    """A planted model and its truth: `order` (p,) are the places that patches speak of after block `layer`."""

    vit: Backbone
    layer: int
    order: Int[Tensor, " p"]


def plant_lost_locality(vit: Backbone, layer: int, *, seed: int = 0) -> LocalityPhantom:
    """Shuffle the patches of every photo, all in the same way, after block `layer` (0-based)."""
    order = torch.randperm(vit.layout.patches, generator=torch.Generator().manual_seed(seed))
    planted = with_changed_patches(vit, layer, lambda x: x[:, order.to(x.device)], "lost locality")
    return LocalityPhantom(planted, layer, order)
