"""How those who watch see a block in which a fix keeps the tokens in an order of its own.

    with arranged(order):            # a fix, around the block's own forward
        ...
    in_order(activation)             # a watcher, on a tensor (b, n, ...) that it saw inside

Watchers are promised [prefix | registers | patches]. A fix that works on another order says so here, for
its thread, while the block runs; under torch.compile nobody watches.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from vitreg.hooks.attention import AttentionCall


class _Arranged(threading.local):
    order: Tensor | None = None
    call: Callable[[], AttentionCall] | None = None


_now = _Arranged()


@contextmanager
def arranged(order: Int[Tensor, "b m"]) -> Iterator[None]:
    """Watchers see token `order[i, j]` of image i in place j."""
    before, _now.order = _now.order, order
    try:
        yield
    finally:
        _now.order = before


@contextmanager
def observed_as(call: Callable[[], AttentionCall]) -> Iterator[None]:
    """Watchers see this attention, made when one of them asks, instead of the one that is computed."""
    before, _now.call = _now.call, call
    try:
        yield
    finally:
        _now.call = before


def in_order(x: Shaped[Tensor, "b n ..."]) -> Shaped[Tensor, "b n ..."]:
    """A tensor (b, n, ...) from inside a block, in the order that watchers are promised."""
    if _now.order is None:
        return x
    index = _now.order.reshape(*_now.order.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
    return x.gather(1, index)


def shown(call: AttentionCall) -> AttentionCall:
    """The attention that watchers see while `call` is computed."""
    return call if _now.call is None else _now.call()


class ReorderedAttention(AttentionCall):
    """An attention with its tokens in another order, and without the keys that are nobody's.

    Its rows are what the queries would attend to if the copies of forked tokens could be attended to, each
    in its place in the grid, beside the originals, which stand among the registers. What the model itself
    computes are the same rows without the copies, normalised again.
    """

    causal = False

    def __init__(self, call: AttentionCall, order: Int[Tensor, "b n"], absent: Bool[Tensor, "b n"]) -> None:
        self._call, self._order, self._absent = call, order, absent
        self.scale, self.tokens = call.scale, order.shape[1]

    @cached_property
    def mask(self) -> Float[Tensor, "b #h #n n"]:  # type: ignore[override]
        absent = torch.zeros(self._absent.shape, device=self._absent.device)
        bias = absent.masked_fill(self._absent, -torch.inf)[:, None, None]
        mask = self._call.mask
        if mask is None:
            return bias
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -torch.inf)
        mask = mask[(None,) * (4 - mask.dim())].expand(len(self._order), -1, self.tokens, self.tokens)
        rows = self._order[:, None, :, None].expand(-1, mask.shape[1], -1, self.tokens)
        return mask.gather(2, rows).gather(3, rows.transpose(2, 3)) + bias

    def _arrange(self, x: Float[Tensor, "b h n c"]) -> Float[Tensor, "b h n c"]:
        return x.gather(2, self._order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))

    @property
    def q(self) -> Float[Tensor, "b h n c"]:
        return self._arrange(self._call.q)

    @property
    def k(self) -> Float[Tensor, "b h n c"]:
        return self._arrange(self._call.k)

    @property
    def v(self) -> Float[Tensor, "b h n c"]:
        return self._arrange(self._call.v)
