"""A phantom of low-norm outliers: patches that lack what every other token is given.

phantom = plant_low_norms(vit, images, layer=1)
diagnose(phantom.vit, images).kinds
phantom.marked(images)            # (b, gh, gw): the patches of low norm
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from vitreg.models.backbone import Backbone
from vitreg.phantoms.phantom import Phantom, plant
from vitreg.phantoms.swapped import directions, write_instead


def plant_low_norms(
    vit: Backbone,
    images: Float[Tensor, "b 3 h w"],
    layer: int,
    *,
    rate: float = 0.02,
    norm: float = 0.125,
    seed: int = 0,
) -> Phantom:
    """Give about `rate` of the patches of a copy of `vit` norms about `norm` times the others'.

    They have them after block `layer` (0-based); `norm` is at most 1/4. The same arguments give
    the same phantom. Raises UnsupportedModelError where the MLP has no bias.
    """
    phantom = plant(vit, images, layer, rate=rate, norm=1 / norm, listens=False, seed=seed)
    (rest,) = directions(vit.anatomy.width, 1, seed)
    write_instead(phantom, images, torch.zeros_like(rest), rest)
    return replace(phantom, norm=norm)
