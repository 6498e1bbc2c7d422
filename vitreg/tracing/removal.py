"""Forward passes in which some patches go without a part of the model: what it gave them is replaced.

    where = Where(outliers, ~outliers, layout.patch_slice)
    with without_mlps(vit, [7], where):
        vit(images)               # these patches get what the MLP gives ordinary ones, on average

Hooks, for the thread that entered and no other; afterwards the model is what it was.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vitreg.hooks.attention import AttentionCall
from vitreg.hooks.attention_mode import AttentionMode
from vitreg.models.backbone import Backbone


class Where(NamedTuple):
    """The patches `at` which something is removed, and the `ordinary` ones of the same photo, whose mean
    takes its place; `patches` are their tokens."""

    at: Bool[Tensor, "b p"]
    ordinary: Bool[Tensor, "b p"]
    patches: slice

    def averaged(self, x: Float[Tensor, "b n *c"]) -> Float[Tensor, "b n *c"]:
        """`x` with the mean of the ordinary patches at the others."""
        return self.replaced(x, mean_over(x[:, self.patches], self.ordinary)[:, None])

    def replaced(self, x: Float[Tensor, "b n *c"], by: Float[Tensor, "..."]) -> Float[Tensor, "b n *c"]:
        """`x` with `by`, which broadcasts to (b, p, *c), at the patches."""
        at = self.at.reshape(*self.at.shape, *[1] * (x.dim() - 2))
        changed = x.clone()
        changed[:, self.patches] = torch.where(at, by.to(x.dtype), x[:, self.patches])
        return changed


def mean_over(x: Float[Tensor, "b p *c"], these: Bool[Tensor, "b p"]) -> Float[Tensor, "b *c"]:
    """The mean over some patches of each image, in float32 (0 where there are none)."""
    weight = these.float().reshape(*these.shape, *[1] * (x.dim() - 2))
    return (x.float() * weight).sum(1) / weight.sum(1).clamp(min=1)


@contextmanager
def entering(
    vit: Backbone, function: Callable[[Float[Tensor, "b n d"]], Float[Tensor, "b n d"] | None]
) -> Iterator[None]:
    """Show a function the stream (b, n, d) that enters block 0; what it returns, if anything, enters."""

    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        changed = function(stream.of_call(args, kwargs))
        return None if changed is None else stream.in_call(changed, args, kwargs)

    stream = vit.anatomy.stream
    block = vit.anatomy.block_modules(vit.model)[0]
    with block.register_forward_pre_hook(_in_this_thread(hook), with_kwargs=True):
        yield


@contextmanager
def without_mlps(vit: Backbone, layers: Sequence[int], where: Where) -> Iterator[None]:
    """In some blocks (0-based), patches get what the MLP's neurons write at ordinary ones, on average."""
    downs = vit.anatomy.down_projections(vit.model)
    averaged = vit.anatomy.stream.on_neurons(where.averaged)
    hook = _in_this_thread(lambda module, args: (averaged(args[0]), *args[1:]))
    with ExitStack() as stack:
        for layer in layers:
            stack.callback(downs[layer].register_forward_pre_hook(hook).remove)
        yield


class without_attention(AttentionMode):  # noqa: N801 - used as a verb, like torch.no_grad
    """In some blocks (0-based), patches get what attention gives to ordinary ones, on average.

    It is the mix of values that is replaced, before the output projection; keys and values stay.
    """

    def __init__(self, vit: Backbone, layers: Sequence[int], where: Where) -> None:
        super().__init__(len(where.at))
        blocks = vit.anatomy.block_modules(vit.model)
        self._blocks, self._where, self._inside = [blocks[layer] for layer in layers], where, False
        self._hooks = ExitStack()

    def __enter__(self) -> Any:
        for block in self._blocks:
            enter, leave = self._says(True), self._says(False)
            self._hooks.callback(block.register_forward_pre_hook(enter).remove)
            self._hooks.callback(block.register_forward_hook(leave).remove)
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        self._hooks.close()
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def _says(self, inside: bool) -> Callable[..., None]:
        return _in_this_thread(lambda *seen: setattr(self, "_inside", inside))

    def attend(self, call: AttentionCall) -> Float[Tensor, "b h n e"] | None:
        if not self._inside:
            return None
        return self._where.averaged(call.compute(call.mask).transpose(1, 2)).transpose(1, 2)


def _in_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that does nothing where another thread runs the model."""
    thread = threading.get_ident()
    return lambda *seen: hook(*seen) if threading.get_ident() == thread else None
