"""What a model returns while a fix has more tokens inside its blocks: maps (..., n, n) of its own tokens.

Blocks return the model's own tokens. But some models also give back their attention, from a block's output or
by hooks of the library within the blocks. Rows and columns of the tokens that a fix added are left out there,
so that rows no longer sum to 1: the rest goes to those.
"""

import threading
from typing import Any

import torch
from torch import Tensor, nn

from vitreg.hooks.torch_internals import tree_map_only


class _Pass(threading.local):
    def __init__(self) -> None:
        self.own: dict[int, list[int]] = {}  # by how many tokens a block had, the model's own among them


_pass = _Pass()


def saw_tokens(inner: int, tokens: int, start: int, inserted: int) -> None:
    """A block had `inner` tokens of which `tokens` are the model's: `inserted` at index `start` are not, and
    neither are those behind them, which are copies."""
    if not torch.compiler.is_compiling():
        _pass.own[inner] = [*range(start), *range(start + inserted, tokens + inserted)]


def of_own_tokens(output: Any) -> Any:
    """An output without the tokens that fixes added in this thread's latest pass."""
    return tree_map_only(Tensor, _narrowed, output) if _pass.own else output


def _narrowed(value: Tensor) -> Tensor:
    own = _pass.own.get(value.shape[-1]) if value.dim() >= 3 else None
    if own is None or value.shape[-2] != value.shape[-1]:
        return value
    index = torch.tensor(own, device=value.device)
    return value.index_select(-2, index).index_select(-1, index)


def narrow_output(module: nn.Module, args: Any, output: Any) -> Any:
    """A forward hook of a model."""
    if torch.compiler.is_compiling() or not _pass.own:
        return None
    narrowed = of_own_tokens(output)
    _pass.own = {}
    return narrowed
