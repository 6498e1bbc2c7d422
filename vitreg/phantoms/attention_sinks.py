"""Make the marked tokens of a phantom attention sinks: later keys listen to them, later values ignore them.

Real outliers are attended to by everything and pass little on. Here each later block's key weights are
changed so that a marked token's key points along the mean query of each head, and its value weights so
that the marked direction is projected out.
"""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vitreg.hooks.attention import AttentionCall
from vitreg.hooks.hooked import hooked
from vitreg.models.backbone import Backbone
from vitreg.models.probe import evaluating
from vitreg.tracing.streams import watch

# How much more attention a typical query gives a marked token than another one on average.
PULL = 20.0


def make_sinks(
    vit: Backbone, images: Float[Tensor, "b 3 h w"], marked: Bool[Tensor, "b gh gw"], first: int
) -> bool:
    """Change the blocks from `first` on, in place; True if the values of each could be changed.

    Projections are recognised by what they compute: the rows of a weight whose output is the k or v that
    attention received. Keys that are rotated or normalised on the way are left as they are.
    """
    layout = vit.layout_for(images)
    tokens = torch.zeros(len(images), layout.tokens, dtype=torch.bool, device=vit.device)
    tokens[:, layout.patch_slice] = marked.flatten(1)
    ignored = []
    # Block by block: what a block makes of the marked tokens changes what the next one sees.
    for layer in range(first, vit.anatomy.depth):
        projections = _Projections(vit, images, layer)
        with torch.no_grad():
            projections.listen(tokens)
            ignored.append(projections.ignore(tokens))
    return bool(ignored) and all(ignored)


class _Projections:
    """The linear maps of one block that lead to its queries, keys and values, from one forward pass."""

    def __init__(self, vit: Backbone, images: Tensor, layer: int) -> None:
        self._candidates: list[tuple[Tensor, Tensor, Tensor]] = []  # weight, input, output
        self._prefix = vit.anatomy.prefix
        hooks: list[Any] = []
        for module in vit.anatomy.block_modules(vit.model)[layer].modules():
            if isinstance(module, nn.Linear):
                hooks.append(module.register_forward_hook(self._saw_linear))
            elif isinstance(module, nn.MultiheadAttention):
                hooks.append(module.register_forward_pre_hook(self._saw_multihead, with_kwargs=True))
        seeing = watch(vit, on_attention=partial(self._saw_attention, layer))
        with hooked(hooks), evaluating(vit.model), seeing:
            vit(images)

    def _saw_linear(self, module: nn.Linear, args: tuple[Tensor, ...], output: Tensor) -> None:
        self._candidates.append((module.weight, args[0], output))

    def _saw_multihead(self, module: nn.MultiheadAttention, args: Any, kwargs: Any) -> None:
        x = args[0] if args else kwargs["query"]
        if isinstance(module.in_proj_weight, Tensor):
            y = F.linear(x, module.in_proj_weight, module.in_proj_bias)
            self._candidates.append((module.in_proj_weight, x, y))

    def _saw_attention(self, wanted: int, layer: int, call: AttentionCall) -> None:
        if layer == wanted:
            self._key, self._value = self._source(call.k), self._source(call.v)
            self._target = self._listening_key(call)

    def _listening_key(self, call: AttentionCall) -> Float[Tensor, "h c"]:
        """The smallest key that the mean CLS query and the mean patch query both attend to, by PULL."""
        scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
        q, k = call.q.float() * scale, call.k.float()
        groups = [q[:, :, : self._prefix], q[:, :, self._prefix :]] if self._prefix else [q]
        means = torch.stack([group.mean((0, 2)) for group in groups], 1)  # (h, groups, c)
        logits = torch.einsum("hgc,bhnc->hgbn", means, k)
        wanted = math.log(PULL / k.shape[-2]) + logits.logsumexp(-1).mean(-1)
        # Directions in which the queries hardly point would need huge keys: leave them out.
        return (torch.linalg.pinv(means, rtol=0.1) @ wanted[..., None])[..., 0]

    def _source(self, x: Float[Tensor, "b h n c"]) -> tuple[Tensor, Tensor] | None:
        """The weight rows whose output is `x`, and their input."""
        flat = x.transpose(1, 2).flatten(2)
        for weight, given, output in self._candidates:
            if output.dim() == 3 and output.shape[:2] != flat.shape[:2]:  # sequence-first
                given, output = given.transpose(0, 1), output.transpose(0, 1)
            for start in range(0, output.shape[-1] - flat.shape[-1] + 1, flat.shape[-1]):
                rows = slice(start, start + flat.shape[-1])
                if output.shape[:-1] == flat.shape[:-1] and torch.allclose(
                    output[..., rows], flat, atol=1e-5
                ):
                    return weight[rows], given
        return None

    def listen(self, tokens: Bool[Tensor, "b n"]) -> None:
        """Give marked tokens the key that queries attend to."""
        if self._key is not None:
            weight, given = self._key
            m = given[tokens].float().mean(0)
            change = self._target.flatten() - weight.float() @ m
            weight += torch.outer(change, m / m.square().sum()).to(weight)

    def ignore(self, tokens: Bool[Tensor, "b n"]) -> bool:
        """Project what marked tokens have in common out of the values; False where values were not found."""
        if self._value is None:
            return False
        weight, given = self._value
        m = given[tokens].float().mean(0)
        weight -= torch.outer(weight.float() @ m, m / m.square().sum()).to(weight)
        return True
