"""While a block runs: edit what enters the MLP's down-projection, and make room in attention's masks."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitreg.errors import UnsupportedModelError

NeuronEdit = Callable[[Float[Tensor, "b n f"]], Float[Tensor, "b n f"]]


class Inside(TorchFunctionMode):
    """Entered around a block's own forward, in one thread, gone with it whatever happens.

    `edit` maps the activations of the block's neurons to others, out of place. Where `inserted` tokens
    stand at `start` that the model does not know of (those of fixes further out included), positional biases
    and masks are widened for them: a bias of 0, and masked for them is what is masked for every other token.
    """

    def __init__(
        self, block: nn.Module, down: str, edit: NeuronEdit | None, start: int = 0, inserted: int = 0
    ) -> None:
        super().__init__()
        self._weight = block.get_submodule(down).weight
        self._edit, self._start, self._inserted = edit, start, inserted
        self._pending = edit is not None

    def __torch_function__(  # type: ignore[no-untyped-def]
        self, func, types, args=(), kwargs=None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and self._edit is not None:
            return self._project(func, *args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._attend(func, *args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self._attend_multihead(func, args, kwargs)
        if self._inserted and func is F.interpolate:
            return self._interpolate(func, *args, **kwargs)
        return func(*args, **kwargs)

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        super().__exit__(kind, value, trace)  # type: ignore[no-untyped-call]
        if kind is None and self._pending:
            raise UnsupportedModelError(
                "the MLP's down-projection does not run through torch.nn.functional.linear (a quantised layer"
                " of its own kind, perhaps), so that its neurons cannot be edited. Apply the fix before the"
                " layer is replaced."
            )

    # Parameters have the names that callers may use.

    def _project(self, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        if weight is self._weight and self._edit is not None:
            self._pending = False
            input = self._edit(input)
        return func(input, weight, bias)

    def _attend(
        self,
        func: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any = None,
        *rest: Any,
        **kwargs: Any,
    ) -> Any:
        if attn_mask is not None:
            attn_mask = self._widened(attn_mask, key.shape[-2])
        return func(query, key, value, attn_mask, *rest, **kwargs)

    def _attend_multihead(self, func: Any, args: Any, kwargs: Any) -> Any:
        """nn.MultiheadAttention, whose tokens are the first axis."""
        mask, keys = kwargs.get("attn_mask"), args[1].shape[0]
        if mask is not None and mask.dtype == torch.bool:  # here it says what to ignore, not what to keep
            kwargs = kwargs | {"attn_mask": ~self._widened(~mask, keys)}
        elif mask is not None:
            kwargs = kwargs | {"attn_mask": self._widened(mask, keys)}
        return func(*args, **kwargs)

    def _widened(self, mask: Tensor, keys: int) -> Tensor:
        """A mask or bias (..., n, n), or (..., 1, n), with columns and rows for the inserted tokens."""
        if mask.shape[-1] + self._inserted != keys:
            return mask
        keep = mask.dtype == torch.bool
        columns = mask.new_full((*mask.shape[:-1], self._inserted), keep)
        mask = torch.cat([mask[..., : self._start], columns, mask[..., self._start :]], -1)
        if mask.shape[-2] == 1:
            return mask
        # Keys that every token ignores (padding) are ignored by the inserted ones too.
        ignored = ~mask.any(-2, keepdim=True) if keep else mask.amax(-2, keepdim=True) == -torch.inf
        row = ~ignored if keep else mask.new_zeros(()).masked_fill(ignored, -torch.inf)
        rows = row.expand(*mask.shape[:-2], self._inserted, mask.shape[-1])
        return torch.cat([mask[..., : self._start, :], rows, mask[..., self._start :, :]], -2)

    def _interpolate(self, func: Any, input: Tensor, size: Any = None, *rest: Any, **kwargs: Any) -> Any:
        """Biases (h, 1, n, n) that are resampled to (tokens, tokens) stay those of the model's own tokens."""
        known = isinstance(size, tuple | list) and tuple(input.shape[-2:]) == (size[0] - self._inserted,) * 2
        return input if known and input.shape[1] == 1 else func(input, size, *rest, **kwargs)


def given_mask(tokens: int, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a block is handed something that may be an attention mask (..., n) for so many tokens.

    transformers hands out none in an ordinary pass, and one of nothing but True while a graph is traced.
    """
    beside = (*args, *kwargs.values())
    return any(isinstance(value, Tensor) and value.shape[-1:] == (tokens,) for value in beside)
