"""What the blocks of a model are called with in one pass over noise images, and which of it is the stream.

The residual stream is what a block changes and hands on to the next: the one tensor of tokens that enters
block i + 1 as it left block i. No position and no name is asked for.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitreg.hooks.stream import Argument, Path, Stream, arguments_of, tensors_in

Shape = tuple[int, ...]


class Pair(NamedTuple):
    """A tensor that a block is given, and one that it gives back."""

    argument: Argument
    returned: Path

    def __str__(self) -> str:
        name = self.argument.name or f"argument {self.argument.position}"
        return name + "".join(f"[{key!r}]" for key in self.argument.path)


class BlockCalls:
    """Watches the blocks of one pass, in order. `images` are so many that they can be told from tokens."""

    def __init__(self, images: int) -> None:
        self._images = images
        self.inputs: list[Shape | None] = []  # of the first tensor that each block was given
        self.outputs: list[Shape | None] = []  # ... and gave back
        self.entered: dict[Argument, Tensor] = {}  # tokens that block 0 was given, as they were then
        self._given: dict[Argument, Tensor] = {}  # the latest block's
        self._returned: dict[Path, Tensor] = {}
        self._pairs: list[Pair] = []  # with the shape that entered block 0, in every block so far
        self._changed: set[Pair] = set()  # by block 0
        self._linked: set[Pair] | None = None  # given as the block before gave it back, each time
        self._shapes: list[tuple[dict[Argument, Shape], dict[Path, Shape]]] = []  # of all tensors, per block
        self._called: dict[Argument, Shape] = {}
        self.in_a_row = False  # whether nothing that block 0 was given has an axis of images
        self.not_finite: int | None = None  # the first block that gave tokens with NaN or infinity

    def enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        every = list(arguments_of(block, args, kwargs))
        if not self.inputs:
            self.in_a_row = not any(self._may_be_stream(tensor) for _, tensor in every)
        self._called = {argument: tuple(tensor.shape) for argument, tensor in every}
        self._given = {argument: tensor for argument, tensor in every if self._may_be_stream(tensor)}
        if not self.inputs:
            self.entered = {argument: tensor.clone() for argument, tensor in self._given.items()}
        else:
            linked = {
                Pair(argument, path)
                for argument, tensor in self._given.items()
                for path, left in self._returned.items()
                if tensor.shape == left.shape and torch.equal(tensor, left)
            }
            self._linked = linked if self._linked is None else self._linked & linked
        self.inputs.append(tuple(every[0][1].shape) if every else None)

    def leave(self, output: Any) -> None:
        every = list(tensors_in(output))
        self._returned = {path: tensor for path, tensor in every if self._may_be_stream(tensor)}
        if self.not_finite is None and not all(x.isfinite().all() for x in self._returned.values()):
            self.not_finite = len(self.outputs)
        pairs = [
            Pair(argument, path)
            for argument in self._given
            for path, tensor in self._returned.items()
            if argument in self.entered and tensor.shape == self.entered[argument].shape
        ]
        if not self.outputs:
            self._pairs = pairs
            self._changed = {
                pair
                for pair in pairs
                if not torch.equal(self._returned[pair.returned], self.entered[pair.argument])
            }
        self._pairs = [pair for pair in self._pairs if pair in pairs]
        self._shapes.append((self._called, {path: tuple(tensor.shape) for path, tensor in every}))
        self.outputs.append(tuple(every[0][1].shape) if every else None)

    def rivals(self) -> list[Pair]:
        """What may be the residual stream: nothing, one tensor, or several between which nothing decides."""
        found = self._pairs
        for kept in (
            [pair for pair in found if pair in self._changed],
            [pair for pair in found if self._linked is None or pair in self._linked],
            [pair for pair in found if self._depends_on_the_image(pair)],
        ):
            found = [pair for pair in found if pair in kept] or found
        return found

    @property
    def row_length(self) -> int:
        """The tokens of all images that the latest block was given in a row, 0 where there are none."""
        return max((tensor.shape[-2] for tensor in self._given.values()), default=0) if self.in_a_row else 0

    def linked(self) -> bool:
        """Whether every block is given the stream as the block before gave it back."""
        return self._linked is None or self.rivals()[0] in self._linked

    def stream(self) -> Stream | None:
        """Where the residual stream is, or None where no tensor of tokens passes through all blocks."""
        rivals = self.rivals()
        if not rivals:
            return None
        argument, returned = rivals[0]
        entered = self.entered[argument]
        if self.in_a_row:
            return Stream(argument, returned, row_axes=entered.dim() - 1)
        width = entered.shape[-1]
        alike = {
            (
                sum(_same_argument(argument, other) and _is(shape, width) for other, shape in given.items()),
                sum(_is(shape, width) for shape in left.values()),
            )
            for given, left in self._shapes
        }
        tokens_first = entered.shape[0] != self._images
        if len(alike) > 1:  # a list that grows from block to block, say: a count would mean nothing
            return Stream(argument, returned, tokens_first=tokens_first)
        return Stream(argument, returned, tokens_first=tokens_first, width=width, alike=alike.pop())

    def _may_be_stream(self, tensor: Tensor) -> bool:
        if self.in_a_row:
            return tensor.is_floating_point() and self._is_row(tensor.shape)
        return tensor.dim() == 3 and tensor.is_floating_point() and self._images in tensor.shape[:2]

    def _is_row(self, shape: Shape) -> bool:
        """Of tokens of all images, one behind the other: (b*n, d), or (1, b*n, d)."""
        rows = shape[0] if len(shape) == 2 else shape[1] if len(shape) == 3 and shape[0] == 1 else 0
        return rows > self._images and rows % self._images == 0

    def by_image(self, argument: Argument) -> Tensor:
        """What entered block 0, (b, n, d)."""
        entered = self.entered[argument]
        if self.in_a_row:
            return entered.reshape(self._images, -1, entered.shape[-1])
        return entered if entered.shape[0] == self._images else entered.transpose(0, 1)

    def _depends_on_the_image(self, pair: Pair) -> bool:
        images = self.by_image(pair.argument)
        return not torch.equal(images[0], images[1])


def _same_argument(one: Argument, other: Argument) -> bool:
    return (one.position, one.name) == (other.position, other.name)


def _is(shape: Shape, width: int) -> bool:
    return len(shape) == 3 and shape[-1] == width
