"""Models that pack the images of a batch into one row: how many there are in a pass, and how they lie.

Such a model says it by what it is given: images, or a table with the grid of each image beside the patches
in a row. A hook reads that before each pass. The order of the patches is proved for each grid once: their
numbers are shown to the model in binary, one digit in each image, as bright patches.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vitreg.errors import UnsupportedModelError
from vitreg.hooks import rows
from vitreg.hooks.rows import Row
from vitreg.hooks.stream import Stream
from vitreg.hooks.torch_internals import forget_hook, forget_pre_hook, pre_hooks
from vitreg.models.given import Given, given_to
from vitreg.models.placement import device_of, dtype_of
from vitreg.models.probe import CONTRAST, Forward, equal_tokens, evaluating
from vitreg.models.sizes import Pair


class _SeenError(Exception):
    """Ends a pass that has shown what it was run for."""


class RowOfEachPass:
    """A hook before a model's passes: what row the images of the pass make."""

    def __init__(self, forward: Forward, first: nn.Module, stream: Stream, patch: Pair) -> None:
        self._forward, self._first, self._stream, self._patch = forward, first, stream, patch
        self._orders: dict[Pair, Tensor | None] = {}
        self._proving: set[int] = set()  # threads

    def __call__(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        proving = get_ident() in self._proving
        known = (rows.current() or rows.NOTHING) if proving else self._row(model, given_to(args, kwargs))
        rows.begin_pass(known)

    def _row(self, model: nn.Module, given: Given) -> Row:
        if not given.images_count:
            return rows.NOTHING
        try:
            grid = given.grid(self._patch)
            if grid not in self._orders:
                self._orders[grid] = self._proved(model, grid)
        except UnsupportedModelError as error:  # raised by whoever wants to know
            return Row(refused=str(error))
        return Row(given.images_count, grid[0] * grid[1], self._orders[grid])

    def _entering(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n d"]:
        """The residual stream that enters block 0. The pass ends there, before anybody watches it."""
        streams: list[Tensor] = []

        def see(module: nn.Module, args: Any, kwargs: Any) -> None:
            streams.append(self._stream.of_call(args, kwargs))
            raise _SeenError

        with self._first.register_forward_pre_hook(see, with_kwargs=True, prepend=True):
            try:
                self._forward(images)
            except _SeenError:
                return streams[0]
        raise UnsupportedModelError("the model's blocks were not called.")

    def _proved(self, model: nn.Module, grid: Pair) -> Int[Tensor, " p"] | None:
        """Where each patch of an image is in its part of the row; None for row-major order."""
        count = grid[0] * grid[1]
        digits = max(1, (count - 1).bit_length())
        images = numbers_as_images(grid, self._patch, digits).to(device_of(model), dtype_of(model))
        self._proving.add(get_ident())
        try:
            with evaluating(model), rows.row(Row(len(images), count)):
                plain, *shown = self._entering(images)
        finally:
            self._proving.discard(get_ident())
        seen = sum((~equal_tokens(plain, x)).long() << digit for digit, x in enumerate(shown))
        assert isinstance(seen, Tensor)
        ordered, order = seen.sort()
        numbers = torch.arange(count, device=seen.device)
        if not torch.equal(ordered, numbers):
            raise UnsupportedModelError(
                f"{type(model).__name__} is not a Vision Transformer that vitreg can read: its {count} tokens"
                f" for an image are not the {grid[0]}x{grid[1]} patches in any order, each in one of them."
            )
        return None if torch.equal(order, numbers) else order


def numbers_as_images(grid: Pair, patch: Pair, digits: int) -> Float[Tensor, "b 3 h w"]:
    """Noise, and for each binary digit the same with all patches brighter whose number has it."""
    size = (grid[0] * patch[0], grid[1] * patch[1])
    noise = torch.rand(3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    numbers = torch.arange(grid[0] * grid[1]).reshape(grid)
    shown = [noise]
    for digit in range(digits):
        bright = ((numbers >> digit) & 1).repeat_interleave(patch[0], 0).repeat_interleave(patch[1], 1)
        shown.append(noise + CONTRAST * bright)
    return torch.stack(shown)


# -- hooks on a model -----------------------------------------------------------------------------------


def read_rows(model: nn.Module, hook: RowOfEachPass) -> None:
    """Let a hook read what the model is given from now on, in the place of any other."""
    stop_reading(model)
    model.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
    model.register_forward_hook(rows.end_of_pass, always_call=True)


def reads_rows(model: nn.Module) -> bool:
    """Whether such a hook is there."""
    return any(isinstance(hook, RowOfEachPass) for hook in pre_hooks(model))


def stop_reading(model: nn.Module) -> RowOfEachPass | None:
    """Take the hook away again; it is returned."""
    found = [hook for hook in pre_hooks(model) if isinstance(hook, RowOfEachPass)]
    for hook in found:
        forget_pre_hook(model, hook)
        forget_hook(model, rows.end_of_pass)
    return found[0] if found else None


@contextmanager
def rows_unread(model: nn.Module) -> Iterator[None]:
    """While entered, nobody reads a model's rows but whoever begins to. If that fails, all is as before."""
    before = stop_reading(model)
    try:
        yield
    except BaseException:
        stop_reading(model)
        if before is not None:
            read_rows(model, before)
        raise
