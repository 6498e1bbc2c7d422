"""While a block runs: make room in masks and positions for tokens that the model does not know of.

The mode costs Python time in every call that the block makes, so it is entered only where attention is
rewritten. Neurons are edited without it (neuron_edit.py).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from vitreg.hooks.attention_mode import AttentionMode
from vitreg.hooks.position_tables import ELEMENTWISE, fitted, neutral, with_rows
from vitreg.hooks.rows import current, hidden, with_rows_of_images


class BlockInterceptor(AttentionMode):
    """Entered around a block's own forward, in one thread, gone with it whatever happens.

    Where `inserted` tokens stand at `start` that the model does not know of (those of fixes further out
    included), positional biases and masks are widened for them: a bias of 0, and masked for them is what is
    masked for every other token. Tables of positions that the block makes for its own `tokens` leave them
    where they are: `neutral_values` are what stands there for them, in the order in which the block meets its
    tables; without it, the tables are looked at.
    """

    def __init__(
        self,
        images: int,
        start: int = 0,
        inserted: int = 0,
        tokens: int = 0,
        neutral_values: Sequence[float] | None = None,
    ) -> None:
        super().__init__(images)
        self._start, self._inserted, self._tokens = start, inserted, tokens
        self._known = neutral_values
        self._in_a_row = current() is not None
        self._row = images if self._in_a_row else 1  # how many images lie behind one another in a table
        self.neutral_values: list[float] = []  # of the tables so far

    def _other(self, func: Any, args: Any, kwargs: Any) -> Any:
        if self._inserted and func is F.interpolate:
            return self._interpolate(func, *args, **kwargs)
        return super()._other(func, args, kwargs)

    def beside(self, func: Any, args: Any) -> Any:
        name = getattr(func, "__name__", "")
        fits = self._inserted and name in ELEMENTWISE
        return fitted(name, args, self._inserted * self._row, self.fit) if fits else args

    def fit(self, name: str, table: Tensor, axis: int, like: Tensor) -> Tensor:
        """A table of positions for all tokens, or for those from some index on, with rows for the others."""
        at = self._start - (self._tokens - table.shape[axis] // self._row)
        if at < 0:
            return table
        order = len(self.neutral_values)
        # Looking at the table would break a compiled graph.
        known = self._known is not None and order < len(self._known)
        value = self._known[order] if known else neutral(name, table, axis)  # type: ignore[index]
        self.neutral_values.append(value)
        by_image = table.unflatten(axis, (self._row, -1))
        return with_rows(by_image, axis, at, self._inserted, value).flatten(axis - 1, axis)

    def mask(self, mask: Tensor, keys: int) -> Tensor:
        """A mask or bias (..., n, n), or (..., 1, n), with columns and rows for the inserted tokens."""
        if mask.shape[-1] + self._inserted * self._row != keys:
            return mask
        if self._in_a_row:
            return with_rows_of_images(mask, self._row, self._inserted)
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


def within(mode: AttentionMode, run: Callable[[], Float[Tensor, "b n d"]]) -> Float[Tensor, "b n d"]:
    """What `run` returns with a mode entered."""
    with mode:
        return run()


def padding_in(tokens: int, args: Any, kwargs: dict[str, Any]) -> Bool[Tensor, "b n"] | None:
    """The tokens of each image that a mask (b, 1, n or 1, n) hides from all: padding. None without a mask."""
    masks = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim() == 4]
    masks = [mask for mask in masks if mask.shape[1] == 1 and mask.shape[-1] == tokens]
    return hidden(masks[0]).all(-2)[:, 0] if masks else None


def given_mask(tokens: int, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a block is handed something that may be an attention mask (..., n) for so many tokens, or for
    those of all images that lie in one row.

    transformers hands out none in an ordinary pass, and one of nothing but True while a graph is traced.
    """
    tokens *= known.images if (known := current()) else 1
    beside = (*args, *kwargs.values())
    return any(isinstance(value, Tensor) and value.shape[-1:] == (tokens,) for value in beside)
