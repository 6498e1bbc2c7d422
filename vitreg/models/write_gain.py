"""How much of what a block's MLP gives reaches the residual stream: LayerScale and the like, measured.

write_gains(vit, [5, 6])          # {layer: (d,)}, one factor for each channel
"""

import copy
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitreg.errors import UnsupportedModelError
from vitreg.hooks import rows
from vitreg.hooks.block_edit import without_edits
from vitreg.hooks.torch_internals import tree_map_only
from vitreg.models.backbone import Backbone
from vitreg.models.probe import evaluating


def write_gains(vit: Backbone, layers: list[int]) -> dict[int, Float[Tensor, " d"]]:
    """Per block and channel, how much of what the down-projection gives reaches the stream (LayerScale).

    Measured: a copy of the block, in float32, runs on what enters it, with more and more added there.
    Raises UnsupportedModelError for a block that does not simply add what its MLP gives.
    """
    entered: dict[int, Any] = {}
    with ExitStack() as stack:
        for layer, block in enumerate(vit.anatomy.block_modules(vit.model)):
            saw = partial(_saw_entering, entered, layer)
            stack.callback(block.register_forward_pre_hook(saw, with_kwargs=True).remove)
        stack.enter_context(without_edits(vit.model))
        stack.enter_context(evaluating(vit.model))
        vit(torch.zeros(1, 3, *vit.image_size))
        return {layer: _gain(vit, layer, entered[layer]) for layer in layers}


def _saw_entering(entered: dict[int, Any], layer: int, module: nn.Module, args: Any, kwargs: Any) -> None:
    entered[layer] = rows.current(), _copies((args, kwargs))


def _copies(given: Any) -> Any:
    """A block's arguments in float32; copies, for some blocks work in place."""
    return tree_map_only(
        Tensor, lambda x: x.to(torch.float32, copy=True) if x.is_floating_point() else x, given
    )


def _gain(vit: Backbone, layer: int, entered: Any) -> Float[Tensor, " d"]:
    known, given = entered
    block = _in_float32(vit.anatomy.block_modules(vit.model)[layer])
    outputs = []
    for amount in (0.0, 1.0, 2.0):
        down = block.get_submodule(vit.anatomy.down_projection)
        hook = down.register_forward_hook(lambda module, given, output, amount=amount: output + amount)
        with torch.autocast(vit.device.type, enabled=False):
            args, kwargs = _copies(given)
            output = block(*args, **kwargs)
        with rows.row(known or rows.NOTHING):
            outputs.append(vit.anatomy.stream.of_output(output))
        hook.remove()
    if outputs[0].dtype != torch.float32:
        raise UnsupportedModelError(
            f"block {layer} cannot be copied (it is quantised, or sharded over processes) and computes in"
            f" {outputs[0].dtype}, too coarse to measure how much of what its MLP writes reaches the stream."
            " Apply the fix before you quantise or shard the model."
        )
    once, twice = outputs[1] - outputs[0], outputs[2] - outputs[0]
    gain = once.mean((0, 1))
    atol = 1e-2 * float(gain.abs().max())
    alike = torch.allclose(once, gain.expand_as(once), rtol=1e-2, atol=atol)
    if not alike or not torch.allclose(twice, 2 * once, rtol=1e-2, atol=atol):
        raise UnsupportedModelError(
            f"block {layer} normalises what its MLP writes, so a token cannot be split there. Use test-time"
            " registers."
        )
    return gain


def _in_float32(block: nn.Module) -> nn.Module:
    """A copy of a block in float32, or the block itself where it has no copies (sharded, some quantised)."""
    try:
        return copy.deepcopy(block).float()
    except Exception:  # what each library says of a copy that it cannot make
        return block
