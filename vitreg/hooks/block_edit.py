"""Change what blocks compute, and carry extra tokens from block to block, with nothing visible outside.

A block is changed by giving the instance a subclass of its own class (as PyTorch's parametrizations and
FSDP do): state-dict keys and shapes stay, `torch.compile` notices, and each replica of nn.DataParallel
runs its own weights, which a `forward` replaced on the instance would not. What a fix carries beside the
residual stream (registers, say) goes in at the start of a block and comes out at its end.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial, wraps
from types import MethodType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitreg.hooks.carry import handing_on
from vitreg.hooks.neuron_edit import listen, stop_listening
from vitreg.hooks.own_tokens import saw_tokens
from vitreg.hooks.stream import Stream, as_given, first_argument

Inner = Callable[[Tensor, tuple[Any, ...], dict[str, Any]], Tensor]


class BlockEdit(ABC):
    """What a fix does to one block. Threads share it, so it holds nothing of any one pass.

    `inserted` counts the tokens that it puts before the patches while the block runs, at index `own` among
    the model's; `hooked` is the path within the block of the module whose input, the neurons, it edits.
    `stream` says where the block's calls and outputs hold the residual stream; without it, it is the first
    tensor of both.
    """

    inserted: int = 0
    own: int = 0
    hooked: str | None = None
    stream: Stream | None = None

    @abstractmethod
    def run(
        self, block: nn.Module, inner: Inner, x: Float[Tensor, "b n d"], args: Any, kwargs: Any
    ) -> Float[Tensor, "b n d"]:
        """The residual stream (b, n, d) after the block, given the one before it.

        `inner(x, args, kwargs)` runs the block as it was without this edit; `args` and `kwargs` are what
        the model passes, with None in the place of the stream.
        """


_EDITS = "_vitreg_edits"
MADE_BY = "_vitreg_made_by"  # of a class that is made while the program runs: the function, and its argument


_BASE = "_vitreg_base"  # of an editable class: the class that the block had


def edits_of(block: nn.Module) -> list[BlockEdit]:
    """The edits of a block, the outermost first."""
    edits: list[BlockEdit] = block.__dict__.get(_EDITS, [])
    return edits


def inserted_tokens(block: nn.Module) -> int:
    """How many tokens the edits of a block put before the patches while it runs."""
    return _inserted(edits_of(block))


def _inserted(edits: list[BlockEdit]) -> int:
    return sum(edit.inserted for edit in edits)


def install(block: nn.Module, edit: BlockEdit) -> None:
    """Put an edit inside those that the block already has."""
    _set(block, [*edits_of(block), edit])


def uninstall(block: nn.Module, edit: BlockEdit) -> None:
    """Take the innermost edit out again; with the last one the block is what it was."""
    *rest, innermost = edits_of(block)
    assert innermost is edit, "edits leave in reverse order"
    _set(block, rest)


@contextmanager
def without_edits(model: nn.Module) -> Iterator[None]:
    """The model without its edits, for as long as one looks at it."""
    installed = {module: edits for module in model.modules() if (edits := edits_of(module))}
    try:
        for block in installed:
            _set(block, [])
        yield
    finally:
        for block, edits in installed.items():
            _set(block, edits)


def _set(block: nn.Module, edits: list[BlockEdit]) -> None:
    before = edits_of(block)
    if edits and not any(_BASE in vars(cls) for cls in type(block).__mro__):
        block.__class__ = _editable(type(block), "forward" in block.__dict__)  # type: ignore[arg-type]  # mypy: no hash
    elif not edits and _BASE in vars(type(block)):
        # Elsewhere another library has put a class on top (FSDP does); ours does nothing without edits.
        block.__class__ = getattr(type(block), _BASE)
    more = _inserted(edits) - _inserted(before)
    leave_unrotated(block, more)
    if edits:
        block.__dict__[_EDITS] = edits  # a new list: a shallow replica keeps the one that it was made with
    else:
        block.__dict__.pop(_EDITS, None)
        stop_listening(block)
    for path in {edit.hooked for edit in edits if edit.hooked is not None}:
        listen(block, path)


def leave_unrotated(block: nn.Module, more: int) -> None:
    """Rotary attention leaves the first tokens unrotated, as many as an integer of timm's says."""
    for module in block.modules():
        if isinstance(module.__dict__.get("num_prefix_tokens"), int):
            module.__dict__["num_prefix_tokens"] += more


@cache
def _editable(base: Any, own_forward: bool) -> Any:
    """The subclass of a block's class that runs its edits.

    Where another library has put a `forward` of its own on the instance (accelerate's hooks), the class's
    would never be called. A property comes before what the instance holds, and runs that inside the edits.
    """
    first = first_argument(base)

    @wraps(base.forward)  # with its signature, which others ask for
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self in _running.blocks:  # what is on the instance leads back here
            return base.forward(self, *args, **kwargs)
        own = self.__dict__.get("forward") if own_forward else None
        if own is None:
            return _run(self, partial(base.forward, self), first, args, kwargs)
        _running.blocks.append(self)
        try:
            return _run(self, own, first, args, kwargs)
        finally:
            _running.blocks.pop()

    def get(self: nn.Module) -> Any:
        return MethodType(forward, self)

    def put(self: nn.Module, own: Any) -> None:
        self.__dict__["forward"] = own

    def delete(self: nn.Module) -> None:
        del self.__dict__["forward"]

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        return _restore, (getattr(base, MADE_BY, base), own_forward), self.__dict__

    body = {
        "forward": property(get, put, delete) if own_forward else forward,
        "__reduce_ex__": reduce,
        "__module__": base.__module__,
        "__doc__": base.__doc__,
        _BASE: base,
    }
    made: Any = type(base.__name__, (base,), body)
    if own_forward:  # whatever a class may do to its subclasses (transformers wraps their `forward`)
        made.forward = body["forward"]
    return made


class _Running(threading.local):
    def __init__(self) -> None:
        self.blocks: list[nn.Module] = []  # with a `forward` of their own


_running = _Running()


def _run(block: nn.Module, base: Callable[..., Any], first: Stream, args: Any, kwargs: Any) -> Any:
    """What a block returns with its edits; `base` runs it without. `first`: where nobody knows the stream."""
    edits = edits_of(block)
    if not edits:  # somebody kept this method beyond the undo
        return base(*args, **kwargs)
    stream = edits[0].stream or first
    outputs: list[Any] = []  # of the block itself, with what it returns beside the stream

    def run(depth: int, x: Tensor, args: Any, kwargs: Any) -> Tensor:
        if depth < len(edits):

            def inner(x: Tensor, args: Any, kwargs: Any) -> Tensor:
                return run(depth + 1, x, args, kwargs)

            y: Tensor = edits[depth].run(block, inner, x, args, kwargs)
            return y
        args, kwargs = stream.in_call(x, args, kwargs)
        outputs[:] = [base(*args, **kwargs)]
        return stream.of_output(outputs[0])

    x = stream.of_call(args, kwargs)
    given = stream.in_call(None, args, kwargs)
    if torch.compiler.is_compiling():
        return _output(stream, run(0, x, *given), outputs[0], edits)
    with handing_on(x) as leaving:
        y = run(0, x, *given)
        output = _output(stream, y, outputs[0], edits)
        leaving.append(as_given(stream.of_output(output)) if stream.reorders else y)
    return output


def _output(stream: Stream, y: Tensor, output: Any, edits: list[BlockEdit]) -> Any:
    """What a block returns with another stream, which has the model's own tokens."""
    inner = stream.of_output(output)
    if inner.shape != y.shape:
        images = y.shape[0] if stream.row_axes else 1
        saw_tokens(inner.shape[1], y.shape[1], max(edit.own for edit in edits), _inserted(edits), images)
    return stream.in_output(y, output)


def _restore(base: Any, own_forward: bool) -> Any:
    if isinstance(base, tuple):
        maker, made_of = base
        base = maker(made_of)
    return base.__new__(_editable(base, own_forward))
