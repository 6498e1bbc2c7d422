"""A phantom of massive dimensions: a few residual channels that are large in every token.

phantom = plant_massive_dimensions(vit, images, layer=1)
diagnose(phantom.vit, images).kinds
phantom.dimensions, phantom.share
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vitreg.errors import UnsupportedModelError
from vitreg.models.backbone import Backbone
from vitreg.models.probe import evaluating
from vitreg.phantoms.planting import phantom_of, plain_linear
from vitreg.tracing.records import trace


@dataclass(frozen=True)
class MassivePhantom:
    """A planted model and its ground truth.

    From block `layer` (0-based) on, `dimensions` of the residual stream carry `share` of a patch's squared
    norm, on average over the images given and after that block.
    """

    vit: Backbone
    layer: int
    dimensions: tuple[int, ...]
    share: float
    seed: int


def plant_massive_dimensions(
    vit: Backbone,
    images: Float[Tensor, "b 3 h w"],
    layer: int,
    *,
    dimensions: int = 2,
    share: float = 0.95,
    seed: int = 0,
) -> MassivePhantom:
    """Add large values in a few dimensions to every token of a copy of `vit`, by the bias of one block's MLP.

    The same arguments give the same phantom. Raises UnsupportedModelError where that MLP has no bias, or
    where the block normalises what it writes.
    """
    planted = phantom_of(vit)
    down = plain_linear(planted.anatomy.down_projections(planted.model)[layer], layer)
    if down.bias is None:
        raise UnsupportedModelError(
            f"the MLP of block {layer} ends without a bias, so nothing can be added to every token."
            " Plant into a model whose MLP has one."
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(vit.anatomy.width, generator=generator)[:dimensions].to(down.weight.device)
    signs = torch.randint(2, (dimensions,), generator=generator).to(down.bias) * 2 - 1
    size = 1.0
    for _ in range(16):  # LayerScale may swallow a factor of 1e6, so grow until the excess shows
        with torch.no_grad():
            down.bias[chosen] = size * signs
        reached = _share(planted, images, layer, chosen)
        if abs(reached - share) < 0.01:
            return MassivePhantom(planted, layer, tuple(sorted(chosen.tolist())), reached, seed)
        grown = (share / (1 - share)) / max(reached / (1 - min(reached, 0.999)), 1e-6)
        size *= min(grown**0.5, 30.0)
    raise UnsupportedModelError(
        f"the planted dimensions carry {reached:.0%} of the squared norm, not {share:.0%}: block {layer}"
        " normalises what its MLP writes. Plant into a pre-norm model."
    )


def _share(vit: Backbone, images: Tensor, layer: int, dimensions: Tensor) -> float:
    """Which part of a patch's squared norm some dimensions carry after a block, on average."""
    with evaluating(vit.model), trace(vit, residuals=True, layers=[layer]) as t:
        vit(images)
    squares = t.residuals[0][:, t.layout.patch_slice].float().square()
    return float((squares[..., dimensions].sum(-1) / squares.sum(-1)).mean())
