"""Positions that a block adds, or rotates by, for a fixed number of tokens, made to fit more of them.

Such a table meets the tokens in an elementwise function, where one axis is then too short. The tokens that
the model does not know of get no position: nothing is added to them, and they are rotated by no angle.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from vitreg.hooks.products import ADDS, MULTIPLIES

ELEMENTWISE = MULTIPLIES | ADDS | {"addcmul"}

Fit = Callable[[str, Tensor, int, Tensor], Tensor]  # (function, table, axis, what it meets) -> table


def fitted(name: str, args: Any, more: int, fit: Fit) -> Any:
    """A function's arguments, with `fit` of each table that has `more` tokens less than what it meets.

    `fit` is given axes counted from the last, as they are aligned: -1, -2, ...
    """
    tensors = [value for value in args if isinstance(value, Tensor)]
    if len(tensors) < 2:
        return args
    largest = tensors[0]
    for x in tensors[1:]:  # no max(): Dynamo breaks its graph there
        if (x.dim(), x.numel()) > (largest.dim(), largest.numel()):
            largest = x
    return [_fitted(name, value, largest, more, fit) for value in args]


def _fitted(name: str, value: Any, like: Tensor, more: int, fit: Fit) -> Any:
    if not isinstance(value, Tensor) or value is like:
        return value
    for axis in range(-1, -value.dim() - 1, -1):
        if value.shape[axis] not in (1, like.shape[axis]):
            short = value.shape[axis] == like.shape[axis] - more
            return fit(name, value, axis, like) if short else value
    return value


def neutral(name: str, table: Tensor, axis: int) -> float:
    """What leaves a token as it is where the function meets it."""
    if "mul" not in name:
        return 0.0
    return 1.0 if table.is_complex() or _is_cosine(table, axis) else 0.0


def _is_cosine(table: Shaped[Tensor, "..."], axis: int) -> bool:
    """Whether a table of rotary positions holds cosines, rather than sines.

    The slowest channel tells, which hardly turns from token to token: its cosines stay near 1, its sines near
    0. (So does a token at position 0, whose row is one of ones or of zeros.)
    """
    rows = table.movedim(axis, 0).flatten(1) if table.dim() > 1 else table[:, None]
    from_one, from_zero = (rows - 1).abs().float(), rows.abs().float()
    if min(from_one.amax(1).min(), from_zero.amax(1).min()) < 1e-4:
        return bool(from_one.amax(1).min() < from_zero.amax(1).min())
    return bool(from_one.amax(0).min() < from_zero.amax(0).min())


def with_rows(table: Tensor, axis: int, at: int, count: int, value: float) -> Tensor:
    """A table with `count` rows of a value at index `at` of an axis."""
    before, after = table.tensor_split([at], axis)
    shape = list(table.shape)
    shape[axis] = count
    return torch.cat([before, table.new_full(shape, value), after], axis)
