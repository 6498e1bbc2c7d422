"""A copy of a model whose patches are changed after one block, as the phantoms of several kinds need it.

planted = with_changed_patches(vit, layer=5, change=lambda patches: 2 * patches, kind="doubled")
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitreg.hooks.stream import Stream
from vitreg.models.backbone import Backbone
from vitreg.models.probe import evaluating
from vitreg.phantoms.planting import phantom_of
from vitreg.tracing.records import trace

PatchChange = Callable[[Float[Tensor, "b p d"]], Float[Tensor, "b p d"]]


def with_changed_patches(vit: Backbone, layer: int, change: PatchChange, kind: str) -> Backbone:
    """A copy of `vit` in which `change` is made to the patches (b, p, d) after block `layer` (0-based).

    The weights stay; a hook on the block makes the change, so that it works on every architecture. Raises
    ValueError for a layer that the model does not have.
    """
    if not 0 <= layer < vit.anatomy.depth:
        raise ValueError(f"layer {layer}: expected 0 to {vit.anatomy.depth - 1}.")
    planted = phantom_of(vit, kind)
    block = vit.anatomy.block_modules(planted.model)[layer]
    block.register_forward_hook(partial(_changed, change, vit.anatomy.stream, vit.layout.patch_slice.start))
    return planted


def _changed(
    change: PatchChange, stream: Stream, start: int, block: nn.Module, args: Any, output: Any
) -> Any:
    residual = stream.of_output(output)
    with torch.no_grad():
        new = torch.cat([residual[:, :start], change(residual[:, start:])], 1)
    return stream.in_output(new, output)


def patches_after(vit: Backbone, images: Float[Tensor, "b 3 h w"], layer: int) -> Float[Tensor, "b p d"]:
    """The patches of the residual stream after one block, in float32."""
    with evaluating(vit.model), trace(vit, norms=False, residuals=True, layers=[layer]) as t:
        vit(images)
    return t.residuals[0][:, t.layout.patch_slice].float()
