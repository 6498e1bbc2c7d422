"""Where the residual stream is in what a block is given, and in what it gives back.

    stream = vit.anatomy.stream
    x = stream.of_call(args, kwargs)                    # (b, n, d), whatever the block's signature
    args, kwargs = stream.in_call(x, args, kwargs)      # the same call with another stream
    y = stream.of_output(output)
    output = stream.in_output(y, output)

Blocks take and return the stream as a tensor, by position or by keyword, or inside lists, tuples and dicts;
some keep tokens before images (n, b, d), or images in one row (rows.py). The probe finds out once. All who
read a stream or edit it ask here, so that a reader and an editor cannot mean different tensors.
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitreg.errors import UnsupportedModelError
from vitreg.hooks.rows import packed, unpacked, with_bounds

_VIEWED = "_vitreg_viewed"

Path = tuple[Any, ...]  # keys and indices, from a container to a tensor within


@dataclass(frozen=True)
class Argument:
    """A parameter of a block, by position and by name (None where it has only one of them), and the path from
    what is passed for it to a tensor."""

    position: int | None = 0
    name: str | None = None
    path: Path = ()


@dataclass(frozen=True)
class Stream:
    """The residual stream of a model's blocks.

    `argument` says where a call holds it, `returned` the path to it in an output. `tokens_first`: the stream
    is (n, b, d) there; `neurons_tokens_first`: the neurons' activations are (n, b, f). `row_axes`: images lie
    in one row, which has so many axes before the width: 1 for (b*n, d), 2 for (1, b*n, d); 0 where images
    have an axis of their own. `width` and `alike` (how many tensors of that width with three axes the
    argument and the output hold) tell a call with several crops from the one that was probed; a width of 0
    checks nothing.
    """

    argument: Argument = Argument()
    returned: Path = ()
    tokens_first: bool = False
    neurons_tokens_first: bool = False
    row_axes: int = 0
    width: int = 0
    alike: tuple[int, int] = (1, 1)

    def of_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Float[Tensor, "b n d"]:
        """The stream (b, n, d) that a block is given.

        Raises UnsupportedModelError where there is none, or where there are several (crops of other sizes).
        """
        key = self._key(args, kwargs)
        value = args[key] if isinstance(key, int) else kwargs.get(key)
        return self._read(value, self.argument.path, self.alike[0], "is given", entering=True)

    def in_call(
        self, x: Float[Tensor, "b n d"] | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A block's arguments with another stream (b, n, d), or with None in its place."""
        key = self._key(args, kwargs)
        if self.row_axes and x is not None:
            args, kwargs = with_bounds((args, kwargs), x.shape[0] * x.shape[1])
        stream = self._in_model_order(x, entering=True)
        if isinstance(key, int):
            return (*args[:key], _put(args[key], self.argument.path, stream), *args[key + 1 :]), kwargs
        return args, {**kwargs, key: _put(kwargs[key], self.argument.path, stream)}

    def of_output(self, output: Any) -> Float[Tensor, "b n d"]:
        """The stream (b, n, d) that a block gives back. Raises as `of_call` does."""
        return self._read(output, self.returned, self.alike[1], "gives back")

    def in_output(self, y: Float[Tensor, "b n d"], output: Any) -> Any:
        """A block's output with another stream (b, n, d)."""
        return _put(output, self.returned, self._in_model_order(y))

    @property
    def reorders(self) -> bool:
        """Whether the blocks' own tensor is another than the (b, n, d) that is read of it."""
        return self.tokens_first or self.row_axes > 0

    def neurons(self, activation: Float[Tensor, "... f"]) -> Float[Tensor, "b n f"]:
        """What enters or leaves a layer of the MLP, as (b, n, f)."""
        if self.row_axes:
            return unpacked(activation)
        return activation.transpose(0, 1) if self.neurons_tokens_first else activation

    def on_neurons(self, edit: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """An edit of activations (b, n, f) as one of activations in the order that the MLP has them in."""
        if self.row_axes:
            return lambda activation: packed(edit(unpacked(activation)), activation.dim() - 1)
        if not self.neurons_tokens_first:
            return edit
        return lambda activation: edit(activation.transpose(0, 1)).transpose(0, 1)

    def _key(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str:
        position, name = self.argument.position, self.argument.name
        if position is not None and position < len(args):
            return position
        if name is not None and name in kwargs:
            return name
        raise UnsupportedModelError(
            f"a block is called without the argument {name or position!r}, which held the residual stream"
            " when the model was wrapped. Wrap the model again, with a `forward` that calls it as you do."
        )

    def _read(self, value: Any, path: Path, alike: int, does: str, entering: bool = False) -> Tensor:
        if isinstance(value, Tensor):
            return self._batch_first(value, entering)
        x = _get(value, path)
        if not isinstance(x, Tensor):
            raise UnsupportedModelError(
                f"a block {does} a {type(x).__name__} where the residual stream was when the model was"
                " wrapped. Wrap the model again, with a `forward` that calls it as you do."
            )
        if self.width and (count := _count(value, self.width)) != alike:
            raise UnsupportedModelError(
                f"a block {does} {count} tensors of tokens, and it was {alike} when the model was wrapped:"
                " several crops or views in one pass. Run the model on images of one size at a time while"
                " vitreg watches it or a fix is applied."
            )
        return self._batch_first(x, entering)

    def _batch_first(self, x: Tensor, entering: bool) -> Tensor:
        if not self.reorders:
            return x
        view = unpacked(x, entering) if self.row_axes else x.transpose(0, 1)
        if not torch.compiler.is_compiling():
            view.__dict__[_VIEWED] = x
        return view

    def _in_model_order(self, x: Tensor | None, entering: bool = False) -> Tensor | None:
        if self.row_axes and x is not None:
            return packed(x, self.row_axes, entering)
        return x.transpose(0, 1) if self.tokens_first and x is not None else x


def first_argument(kind: Any) -> Stream:
    """The stream of modules of a class that nobody has probed: the first tensor that they take and return."""
    names = [name for name in inspect.signature(kind.forward).parameters if name != "self"]
    return Stream(Argument(0, names[0] if names else None))


def as_given(x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
    """The tensor that a block was given, which `Stream.of_call` may have put into another order."""
    found: Tensor = x.__dict__.get(_VIEWED, x)
    return found


def tensors_in(value: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Every tensor in nested lists, tuples and dicts, with its path."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from tensors_in(item, (*path, key))
    elif isinstance(value, tuple | list):
        for index, item in enumerate(value):
            yield from tensors_in(item, (*path, index))


def arguments_of(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[tuple[Argument, Tensor]]:
    """Every tensor that a module is called with; the same argument by position and by keyword is one."""
    positions = _positional(module)
    for position, value in enumerate(args):
        name = positions[position] if position < len(positions) else None
        for path, tensor in tensors_in(value):
            yield Argument(position, name, path), tensor
    for name, value in kwargs.items():
        for path, tensor in tensors_in(value):
            yield Argument(positions.index(name) if name in positions else None, name, path), tensor


def _positional(module: nn.Module) -> list[str]:
    """The names of a module's parameters that can be passed by position, as its class has them.

    A `forward` of the instance's own may take anything.
    """
    forwards = (vars(cls).get("forward") for cls in type(module).__mro__)
    forward = next(filter(inspect.isfunction, forwards), module.forward)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in inspect.signature(forward).parameters.values() if p.kind in kinds]
    return names[1:] if inspect.isfunction(forward) and names[:1] == ["self"] else names


def is_tokens(tensor: Tensor, width: int) -> bool:
    """Whether a tensor may be a residual stream of this width: (b, n, d), or (n, b, d)."""
    return tensor.dim() == 3 and tensor.shape[-1] == width


def _count(value: Any, width: int) -> int:
    return sum(is_tokens(tensor, width) for _, tensor in tensors_in(value))


def _first(value: Any) -> Any:
    """Where a container holds the stream if nobody has seen it before: first, by every library's habit."""
    return next(iter(value)) if isinstance(value, dict) else 0


def _get(value: Any, path: Path) -> Any:
    """What is at a path. One that is too long ends at a tensor, one that is too short goes on to what is
    first in each container."""
    while isinstance(value, tuple | list | dict) and value:
        key, path = (path[0], path[1:]) if path else (_first(value), ())
        value = value.get(key) if isinstance(value, dict) else value[key] if key < len(value) else None
    return value


def _put(value: Any, path: Path, x: Tensor | None) -> Any:
    """A copy of nested containers with something else at the place that `_get` reads."""
    if not isinstance(value, tuple | list | dict) or not value:
        return x
    key, path = (path[0], path[1:]) if path else (_first(value), ())
    item = _put(value[key], path, x)
    if type(value) is dict:
        return {**value, key: item}
    if isinstance(value, dict):  # an output class of transformers, say
        changed = copy.copy(value)
        changed[key] = item
        return changed
    items = [*value[:key], item, *value[key + 1 :]]
    if isinstance(value, list):
        return items
    kind: Any = type(value)
    return tuple(items) if kind is tuple else kind._make(items)
