"""What a model returns while a fix has more tokens inside its blocks: maps (..., n, n) of its own tokens.

Blocks return the model's own tokens. But some models also give back their attention, from a block's output or
by hooks of the library within the blocks. Rows and columns of the tokens that a fix added are left out there,
so that rows no longer sum to 1: the rest goes to those.
"""

import threading
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitreg.hooks.torch_internals import tree_map_only


class _Pass(threading.local):
    def __init__(self) -> None:
        self.own: dict[int, tuple[int, int, int, int]] = {}  # by how many tokens a block had: `saw_tokens`


_pass = _Pass()


def saw_tokens(inner: int, tokens: int, start: int, inserted: int, images: int = 1) -> None:
    """A block had `inner` tokens of which `tokens` are the model's: `inserted` at index `start` are not, and
    neither are those behind them, which are copies. So it is in each of `images` that lie in one row."""
    if not torch.compiler.is_compiling():
        _pass.own[inner * images] = (tokens, start, inserted, images)


def narrow_output(heads: int, module: nn.Module, args: Any, output: Any) -> Any:
    """A forward hook of a model with so many heads: its attention without the tokens that fixes added."""
    if torch.compiler.is_compiling() or not _pass.own:
        return None
    narrowed = tree_map_only(Tensor, partial(_narrowed, heads), output)
    _pass.own = {}
    return narrowed


def _narrowed(heads: int, value: Tensor) -> Tensor:
    """An attention (b, h, n, n), or its mean over heads (b, n, n), of the model's own tokens."""
    own = _pass.own.get(value.shape[-1]) if value.dim() in (3, 4) else None
    if own is None or value.shape[-2] != value.shape[-1] or (value.dim() == 4 and value.shape[1] != heads):
        return value
    tokens, start, inserted, images = own
    index = torch.arange(tokens, device=value.device)
    index = torch.where(index < start, index, index + inserted)
    first = torch.arange(images, device=value.device) * (value.shape[-1] // images)
    index = (first[:, None] + index).flatten()
    return value.index_select(-2, index).index_select(-1, index)
