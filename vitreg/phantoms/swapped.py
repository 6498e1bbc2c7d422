"""What a phantom's marked patches get, and what all other tokens get: two vectors of one's choice.

    phantom = plant(vit, images, layer=1)
    write_instead(phantom, images, marked=mark, elsewhere=rest)

The planted neurons write to marked patches only, and a bias writes to every token: the bias takes `elsewhere`
and the neurons the difference. So marked patches can differ from the rest without standing out by norm, or
by the lack of what all others have.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitreg.errors import UnsupportedModelError
from vitreg.models.probe import evaluating
from vitreg.phantoms.phantom import Phantom
from vitreg.tracing.records import trace


def write_instead(
    phantom: Phantom,
    images: Float[Tensor, "b 3 h w"],
    marked: Float[Tensor, " d"],
    elsewhere: Float[Tensor, " d"],
) -> None:
    """Change the planted block, in place, so that its MLP adds `marked` and `elsewhere` instead.

    Both are in units of the length of what the phantom's neurons write to a marked patch. Raises
    UnsupportedModelError where the MLP has no bias.
    """
    down = phantom.vit.anatomy.down_projections(phantom.vit.model)[phantom.layer]
    assert isinstance(down, nn.Linear)  # or nothing could have been planted
    if down.bias is None:
        raise UnsupportedModelError(
            f"the MLP of block {phantom.layer} ends without a bias, so nothing can be added to every token."
            " Plant into a model whose MLP has one."
        )
    columns = list(phantom.neurons)
    with torch.no_grad():
        sizes = phantom.write.to(down.weight) @ down.weight[:, columns]
        length = _activations(phantom, images)[columns] @ sizes
        down.weight[:, columns] = torch.outer((marked - elsewhere).to(down.weight), sizes)
        down.bias.add_(length * elsewhere.to(down.bias))


def _activations(phantom: Phantom, images: Tensor) -> Float[Tensor, " f"]:
    """The mean neurons of marked patches in the planted block."""
    mask = phantom.marked(images).flatten(1)
    with evaluating(phantom.vit.model), trace(phantom.vit, neurons=True, layers=[phantom.layer]) as t:
        phantom.vit(images)
    return t.neurons[0][:, t.layout.patch_slice][mask].mean(0)


def directions(width: int, count: int, seed: int) -> Float[Tensor, "count d"]:
    """Random orthogonal unit vectors that use all dimensions, so that none of these becomes massive."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, count, generator=generator)).Q.T
