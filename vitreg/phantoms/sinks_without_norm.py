"""A phantom of attention sinks whose norms are as ordinary as all others.

    phantom = plant_sinks(vit, images, layer=1)
    diagnose(phantom.vit, images).kinds
    phantom.marked(images)            # (b, gh, gw): the sinks, in every block after `layer`

Marked patches get one vector, all other tokens another of the same length; later keys listen to the first.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from vitreg.errors import UnsupportedModelError
from vitreg.models import Backbone
from vitreg.phantom import Phantom, plant
from vitreg.phantoms.swapped import directions, write_instead
from vitreg.sinks import make_sinks

# The smallest norm that `plant` takes. The two vectors are as long as what makes it, times LENGTH: about
# 1.5 times a token's own norm.
PLANTED_NORM, LENGTH = 4.0, 0.4


def plant_sinks(
    vit: Backbone, images: Float[Tensor, "b 3 h w"], layer: int, *, rate: float = 0.02, seed: int = 0
) -> Phantom:
    """Make about `rate` of the patches of a copy of `vit` attention sinks after block `layer` (0-based).

    The same arguments give the same phantom; its `norm` is 1. Raises UnsupportedModelError where the MLP
    has no bias, or where keys and values cannot be reached because they are rotated or normalised.
    """
    phantom = plant(vit, images, layer, rate=rate, norm=PLANTED_NORM, seed=seed)
    mark, rest = LENGTH * directions(vit.anatomy.width, 2, seed)
    write_instead(phantom, images, mark, rest)
    with torch.no_grad():
        listens = make_sinks(phantom.vit, images, phantom.marked(images), layer + 1)
    if not listens:
        raise UnsupportedModelError(
            f"the keys and values after block {layer} are rotated, normalised or not there, so no patch can"
            " be made an attention sink. Plant into a model that attends to its keys as they are projected,"
            " before its last block."
        )
    return replace(phantom, norm=1.0)
