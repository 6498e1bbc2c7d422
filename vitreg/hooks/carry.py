"""What one block hands to the next beside the residual stream."""

import threading
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from vitreg.errors import UnsupportedModelError
from vitreg.hooks.neuron_edit import recomputing
from vitreg.hooks.stream import as_given
from vitreg.hooks.torch_internals import WeakTensorKeyDictionary

T = TypeVar("T")


class CarriedTokens(Generic[T]):
    """What one block hands to the next beside the residual stream, for one fix on one model.

    Kept per thread. Where gradients are recorded, what a block took is also kept with the tensor that it took
    it for: gradient checkpointing calls the block again on that tensor, in any order.
    """

    def __init__(self) -> None:
        self._forward, self._again = _Latest(), _Latest()
        self._of: Any = WeakTensorKeyDictionary()

    @property
    def latest(self) -> T | None:
        """What the last block left in this thread's latest pass."""
        value: T | None = self._forward.left.value
        return value

    def __reduce__(self) -> tuple[Any, ...]:
        return CarriedTokens, ()  # a copied or saved model starts with empty hands

    def take(self, layer: int, x: Float[Tensor, "b n d"]) -> T | None:
        """What the block before `layer` left; None if it left nothing, or did not run."""
        again, x = recomputing(), x if torch.compiler.is_compiling() else as_given(x)
        if again and x in self._of:
            return self._of[x]
        left = (self._again if again else self._forward).left
        value, left.value = (left.value if left.layer == layer - 1 else None), None
        if again and value is None:
            raise UnsupportedModelError(
                "a fixed block is computed again on a tensor that it did not see: reentrant gradient"
                " checkpointing. Use use_reentrant=False."
            )
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._of[x] = value
        return value

    def leave(self, layer: int, value: T) -> None:
        """Hand a value to the block after `layer`, on whatever tensor it will be called."""
        left = (self._again if recomputing() else self._forward).left
        left.layer, left.value = layer, value


class _Left:
    """What a block left. A plain object: Dynamo drops what compiled code writes to a thread-local itself."""

    layer: int = -1
    value: Any = None


class _Latest(threading.local):
    def __init__(self) -> None:
        self.left = _Left()
