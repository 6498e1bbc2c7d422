"""What one block hands to the next beside the residual stream.

It belongs to the stream that leaves the block: where several streams run through a model in lock-step (two
views, pipelined batches), each block gets what came with the tensor that it is called on.
"""

import threading
import weakref
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from vitreg.errors import UnsupportedModelError
from vitreg.hooks.neuron_edit import recomputing
from vitreg.hooks.stream import as_given
from vitreg.hooks.torch_internals import WeakTensorKeyDictionary

T = TypeVar("T")


class _Left:
    """What a block left. A plain object: Dynamo drops what compiled code writes to a thread-local itself."""

    def __init__(self, layer: int = -1, value: Any = None) -> None:
        self.layer, self.value = layer, value
        self.stream: Any = None  # a weak reference to the tensor that left the block, once it is known

    def came_with(self, x: Tensor) -> bool:
        return self.stream is not None and self.stream() is x

    @property
    def awaited(self) -> bool:
        """Whether somebody holds that tensor still."""
        return self.stream is not None and self.stream() is not None


class _Handing(threading.local):
    """The block that runs in this thread: the stream that it was given, and what was left by now."""

    def __init__(self) -> None:
        self.given: Tensor | None = None
        self.left: list[_Left] = []


_handing = _Handing()


class _Latest(threading.local):
    def __init__(self) -> None:
        self.left = _Left()  # the last; compiled code knows no other
        self.waiting: list[_Left] = []


class handing_on:  # noqa: N801 - used as a verb, like torch.no_grad
    """Around a block that is called on `x`: what is left in it belongs to the tensor put into the list.

    Every block of every pass enters one: hence no generator.
    """

    def __init__(self, x: Tensor) -> None:
        self._x = x

    def __enter__(self) -> list[Tensor]:
        self._before = _handing.given, _handing.left
        _handing.given, _handing.left = as_given(self._x), []
        self._leaving: list[Tensor] = []
        return self._leaving

    def __exit__(self, *error: object) -> None:
        left = _handing.left
        _handing.given, _handing.left = self._before
        if self._leaving:
            for each in left:
                each.stream = weakref.ref(self._leaving[0])


class CarriedTokens(Generic[T]):
    """What one block hands to the next beside the residual stream, for one fix on one model.

    Kept per thread. Where gradients are recorded, what a block took is also kept with the tensor that it took
    it for: gradient checkpointing calls the block again on that tensor, in any order. `by_stream=False`: what
    is left comes from elsewhere than the block before, so that only the order of calls can tell.
    """

    def __init__(self, by_stream: bool = True) -> None:
        self._by_stream = by_stream
        self._forward, self._again = _Latest(), _Latest()
        self._of: Any = WeakTensorKeyDictionary()

    @property
    def latest(self) -> T | None:
        """What the last block left in this thread's latest pass."""
        value: T | None = self._forward.left.value
        return value

    def __reduce__(self) -> tuple[Any, ...]:
        return CarriedTokens, (self._by_stream,)  # a copied or saved model starts with empty hands

    def take(self, layer: int, x: Float[Tensor, "b n d"]) -> T | None:
        """What the block before `layer` left for the stream of this block; None if it left nothing.

        Raises UnsupportedModelError where it left something for several streams, and none of them is this.
        """
        if torch.compiler.is_compiling():
            return self._take_last(layer)
        again, x = recomputing(), as_given(x) if _handing.given is None else _handing.given
        if again and x in self._of:
            return self._of[x]
        value = self._take_of(x, layer, self._again if again else self._forward)
        if again and value is None:
            raise UnsupportedModelError(
                "a fixed block is computed again on a tensor that it did not see: reentrant gradient"
                " checkpointing. Use use_reentrant=False."
            )
        if torch.is_grad_enabled():
            self._of[x] = value
        return value

    def _take_last(self, layer: int) -> T | None:
        left = self._forward.left
        value, left.value = (left.value if left.layer == layer - 1 else None), None
        return value

    def _take_of(self, x: Tensor, layer: int, latest: _Latest) -> T | None:
        waiting = [left for left in latest.waiting if left.layer == layer - 1]
        mine = [left for left in waiting if left.came_with(x)]
        if not mine and len(waiting) > 1:
            raise UnsupportedModelError(
                f"{len(waiting)} streams left block {layer - 1}, and block {layer} is called on none of them:"
                " several passes in lock-step, or ones that failed, with a stream that is changed between the"
                " blocks. Run one pass at a time."
            )
        taken = (mine or waiting or [latest.left if latest.left.layer == layer - 1 else _Left()])[0]
        latest.waiting = [left for left in latest.waiting if left is not taken]
        value: T | None = taken.value
        if latest.left is taken:
            latest.left = _Left()
        return value

    def take_from_before(self, layer: int, x: Float[Tensor, "b n d"]) -> T:
        """As `take`, where the block before must have left something."""
        value = self.take(layer, x)
        if value is None:
            raise UnsupportedModelError(
                f"block {layer} runs, and nothing of block {layer - 1} came with its stream: a fix hands its"
                " tokens from block to block. Run the blocks one after the other, in one thread, or undo the"
                " fix."
            )
        return value

    def leave(self, layer: int, value: T) -> None:
        """Hand a value to the block after `layer`, with the stream that leaves this one."""
        if torch.compiler.is_compiling():
            left = self._forward.left
            left.layer, left.value = layer, value
            return
        latest = self._again if recomputing() else self._forward
        latest.left = _Left(layer, value)
        _handing.left.append(latest.left)
        # Nobody asks for what the last block left, or for what is left of a pass that failed.
        waiting = [left for left in latest.waiting if left.layer != layer or left.awaited]
        waiting = waiting if self._by_stream else []
        latest.waiting = [*waiting, latest.left]
