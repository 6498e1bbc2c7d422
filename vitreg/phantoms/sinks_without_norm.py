"""A phantom of attention sinks whose norms are as ordinary as all others.

    phantom = plant_sinks(vit, images, layer=1)
    diagnose(phantom.vit, images).kinds
    phantom.marked(images)            # (b, gh, gw): the sinks, in every block after `layer`

Marked patches get one vector, all other tokens another of the same length; later keys listen to the first.
"""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vitreg.errors import UnsupportedModelError
from vitreg.models.backbone import Backbone
from vitreg.models.probe import evaluating
from vitreg.phantoms.attention_sinks import make_sinks
from vitreg.phantoms.phantom import Phantom, plant
from vitreg.phantoms.swapped import directions, write_instead
from vitreg.tracing.records import trace

PLANTED_NORM = 4.0  # the smallest that `plant` takes: what all tokens get has about this length
LEAST_PULL = 3.0  # even shares that the sinks draw on average, many in one photo or few


def plant_sinks(
    vit: Backbone, images: Float[Tensor, "b 3 h w"], layer: int, *, rate: float = 0.02, seed: int = 0
) -> Phantom:
    """Make about `rate` of the patches of a copy of `vit` attention sinks after block `layer` (0-based).

    The same arguments give the same phantom; its `norm` is 1. Raises UnsupportedModelError where the MLP
    has no bias, or where keys cannot be reached because they are rotated or normalised.
    """
    phantom = plant(vit, images, layer, rate=rate, norm=PLANTED_NORM, listens=False, seed=seed)
    mark, rest = directions(vit.anatomy.width, 2, seed)
    write_instead(phantom, images, mark, rest)
    marked = phantom.marked(images)
    with torch.no_grad():
        listens = make_sinks(phantom.vit, images, marked, layer + 1)
    pull = _pull(phantom.vit, images, marked.flatten(1), layer + 1) if listens else 0.0
    if pull < LEAST_PULL:
        raise UnsupportedModelError(
            f"marked patches draw {pull:.1f} times an even share of attention after block {layer}, not"
            f" {LEAST_PULL:.0f}: keys are rotated or normalised there, or no block is left. Plant into a"
            " model that attends to its keys as they are projected, before its last block."
        )
    return replace(phantom, norm=1.0)


def _pull(vit: Backbone, images: Float[Tensor, "b 3 h w"], marked: Bool[Tensor, "b p"], layer: int) -> float:
    """How many even shares of all patches' attention marked patches draw in a block, on average."""
    with evaluating(vit.model), trace(vit, attention="full", layers=[layer]) as t:
        vit(images)
    patches = t.layout.patch_slice
    shares = t.attention[0, :, :, patches, patches].mean((1, 2))
    return float((shares / shares.mean(1, keepdim=True))[marked].mean())
