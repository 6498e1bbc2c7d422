"""Blocks that are never called: pairs of an attention and an MLP in a list, which a loop calls one by one.

    for attention, mlp in self.layers:
        x = attention(x) + x
        x = mlp(x) + x

Such a pair gets a subclass of its own class whose `forward` does this, and hands the loop two functions in
place of its parts: the first runs the whole pair as a block, and each returns what the loop is to add. So the
block can be watched and edited as any other. Without an edit the loop adds what the parts gave, to the bit.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from vitreg.errors import UnsupportedModelError
from vitreg.hooks.block_edit import MADE_BY
from vitreg.models.block_stack import count_linears

_BASE = "_vitreg_pair_base"
_CHECKED = "_vitreg_adds_its_parts"  # while a probe runs: whether it has done so by now


class _Running(threading.local):
    """What each pair gave for one stream, until its second part is called.

    The stream `between` its parts, what the loop is to add `first` and `second`, and the `whole` block's
    output before anybody edits it.
    """

    def __init__(self) -> None:
        self.pairs: dict[nn.Module, dict[str, Tensor | None]] = {}


_running = _Running()


@cache
def _callable(base: Any) -> Any:
    """The subclass of a list's class that is a block."""

    def forward(self: nn.ModuleList, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The residual stream (b, n, d) after both parts; the first gets what else the loop passes it."""
        first, second = self._modules.values()
        assert first is not None
        assert second is not None
        one = first(x, *args, **kwargs)
        between = one + x
        other = second(between)
        whole: Tensor = other + between
        _running.pairs[self] = {"between": between, "first": one, "second": other, "whole": whole}
        return whole

    def parts(self: nn.ModuleList) -> Iterator[Callable[..., Tensor]]:
        yield partial(_first, self)
        yield partial(_second, self)

    def part(self: nn.ModuleList, index: Any) -> Any:
        return list(parts(self))[index]

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        return _restore, (base,), self.__dict__

    body = {
        "forward": forward,
        "__iter__": parts,
        "__getitem__": part,
        "__repr__": nn.Module.__repr__,  # a list's own goes over the parts
        "__reduce_ex__": reduce,
        "__module__": base.__module__,
        "__doc__": base.__doc__,
        _BASE: base,
        MADE_BY: (_callable, base),
    }
    return type(base.__name__, (base,), body)


def _restore(base: Any) -> Any:
    return base.__new__(_callable(base))


def _first(pair: nn.ModuleList, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Run the pair as a block, and return what the loop adds first."""
    y: Tensor = pair(x, *args, **kwargs)
    run = _running.pairs[pair]
    if y is not run["whole"]:  # edited, by a fix or a hook
        run["first"], run["second"], run["between"] = y - x, torch.zeros_like(y), None
    assert run["first"] is not None
    return run["first"]


def _second(pair: nn.ModuleList, x: Tensor) -> Tensor:
    """What the loop adds behind the first."""
    run = _running.pairs.pop(pair, None)
    if run is None:
        raise UnsupportedModelError(
            "the second part of a pair of attention and MLP runs without its first: the loop that calls them"
            " is another than when the model was wrapped. Wrap the model again."
        )
    between, second = run["between"], run["second"]
    if _CHECKED in pair.__dict__ and between is not None:
        right = x.shape == between.shape and torch.equal(x, between)
        pair.__dict__[_CHECKED] = pair.__dict__[_CHECKED] and right
    assert second is not None
    return second


@contextmanager
def pairs_as_blocks(model: nn.Module) -> Iterator[None]:
    """Make blocks of a model's pairs, while a probe runs, which says whether they are.

    They stay blocks, unless the probe raises. Raises UnsupportedModelError where the loop does something else
    than to add what the parts give.
    """
    pairs = make_blocks(model)
    for pair in pairs:
        pair.__dict__[_CHECKED] = True
    try:
        yield
        _refuse_other_loops(model, pairs)
    except BaseException:
        for pair in pairs:
            pair.__class__ = getattr(type(pair), _BASE)
        _refuse_other_loops(model, pairs)  # which explains whatever was raised
        raise
    finally:
        for pair in pairs:
            pair.__dict__.pop(_CHECKED, None)


def _refuse_other_loops(model: nn.Module, pairs: Sequence[nn.ModuleList]) -> None:
    if not all(pair.__dict__[_CHECKED] for pair in pairs):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a Vision Transformer that vitreg can read: its blocks are pairs"
            " of an attention and an MLP, and what the second is given is not what the first was given plus"
            " what it gave."
        )


def make_blocks(model: nn.Module) -> list[nn.ModuleList]:
    """Make blocks of a model's pairs, which are returned."""
    pairs = list(_pairs(model))
    for pair in pairs:
        pair.__class__ = _callable(type(pair))  # type: ignore[arg-type]  # mypy: no hash
    return pairs


def _pairs(model: nn.Module) -> Iterator[nn.ModuleList]:
    """Lists of two parts with linear layers, in a list of such lists."""
    for stack in model.modules():
        children = list(stack.children()) if isinstance(stack, nn.ModuleList) else []
        if children and all(map(_is_pair, children)):
            yield from (child for child in children if isinstance(child, nn.ModuleList))


def _is_pair(module: nn.Module) -> bool:
    parts = list(module.children())
    if type(module) is not nn.ModuleList or len(parts) != 2 or type(parts[0]) is type(parts[1]):
        return False
    return all(count_linears(part) >= 2 for part in parts)
