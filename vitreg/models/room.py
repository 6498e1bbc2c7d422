"""Whether a model's blocks have room for tokens that it does not know of: tried block by block, in one pass.

Every token of a block, and two registers more, get the same content. What tells them apart then are positions
alone: the model's own tokens must have the queries, keys and values that they have without registers, and the
registers must have none.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitreg.hooks.attention import AttentionCall
from vitreg.hooks.attention_mode import intercept
from vitreg.hooks.block_edit import BlockEdit, Inner, install, leave_unrotated, uninstall
from vitreg.hooks.inside_block import BlockInterceptor, given_mask, within
from vitreg.hooks.row_attention import joined
from vitreg.hooks.stream import Stream
from vitreg.models.headless import run_without_head
from vitreg.models.probe import Forward, Probe, evaluating, one_line

REGISTERS = 2  # enough to see whether they differ
TOLERANCE = 1e-3

Attempt = Callable[[nn.Module, Inner, Tensor, Any, Any], None]


class Room(NamedTuple):
    """What a model's blocks make of tokens that are added to theirs.

    `tables`: of the tables of positions that each block makes, in order, what stands there for a token
    without a position (() where no block makes any). `refused`: why no token can be added ("": they can).
    """

    tables: tuple[tuple[float, ...], ...]
    refused: str


def room_for_registers(probe: Probe, stream: Stream, start: int, forward: Forward) -> Room:
    """Try every block with registers at index `start`."""
    tried = [_Tried(index, start, probe.masked) for index in range(probe.depth)]
    image = probe.noise()[:1]
    with evaluating(probe.model), trying(probe.blocks, stream, [attempt.run for attempt in tried]):
        if probe.head_error:
            run_without_head(probe.blocks[-1], forward, image)
        else:
            forward(image)
    needed = any(attempt.tables is not None for attempt in tried)
    return Room(
        tuple(attempt.tables or () for attempt in tried) if needed else (),
        next((attempt.refused for attempt in tried if attempt.refused), ""),
    )


@contextmanager
def trying(blocks: Sequence[nn.Module], stream: Stream, attempts: Sequence[Attempt]) -> Iterator[None]:
    """While entered, something is tried with each block before it runs for itself.

    From inside the block's `forward`: what stands around that (sharding, offloading) has done its part then.
    """
    edits = [_Trial(attempt, stream) for attempt in attempts]
    for block, edit in zip(blocks, edits, strict=True):
        install(block, edit)
    try:
        yield
    finally:
        for block, edit in zip(blocks, edits, strict=True):
            uninstall(block, edit)


class _Trial(BlockEdit):
    def __init__(self, attempt: Attempt, stream: Stream) -> None:
        self._attempt, self.stream = attempt, stream

    def run(self, block: nn.Module, inner: Inner, x: Tensor, args: Any, kwargs: Any) -> Tensor:
        self._attempt(block, inner, x, args, kwargs)
        return inner(x, args, kwargs)


def all_alike(x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
    """Tokens of the same content."""
    return x.mean(1, keepdim=True).repeat(1, x.shape[1], 1)


def attention_of(run: Callable[[], Tensor], images: int) -> AttentionCall:
    """The attention that a block computes."""
    calls: list[AttentionCall] = []
    with intercept(joined(calls.append), images):
        run()
    return calls[-1]


class _Tried:
    """One block, run with registers in it. `tables` is None where they need no place in any."""

    def __init__(self, index: int, start: int, masked: bool) -> None:
        self.tables: tuple[float, ...] | None = None
        self.refused = ""
        self._index, self._start, self._masked = index, start, masked

    def run(self, block: nn.Module, inner: Inner, x: Tensor, args: Any, kwargs: Any) -> None:
        b, n = x.shape[:2]
        plain = attention_of(partial(inner, all_alike(x), args, kwargs), b)
        wide = partial(inner, all_alike(x)[:, :1].repeat(1, n + REGISTERS, 1), args, kwargs)
        masked = self._masked or given_mask(n, args, kwargs)
        if not masked and not self._differs(plain, block, wide):
            return
        mode = BlockInterceptor(b, self._start, REGISTERS, n)
        differs = self._differs(plain, block, partial(within, mode, wide))
        if mode.neutral_values or not masked:
            self.tables = tuple(mode.neutral_values)
        if differs:
            self.refused = f"with {REGISTERS} tokens more, block {self._index} {differs}"

    def _differs(self, plain: AttentionCall, block: nn.Module, run: Callable[[], Tensor]) -> str:
        """What is wrong with a block's attention with registers in it; "" where nothing is."""
        leave_unrotated(block, REGISTERS)
        try:
            wide = attention_of(run, plain.q.shape[0])
        except Exception as error:
            return f"fails ({type(error).__name__}: {one_line(error)})"
        finally:
            leave_unrotated(block, -REGISTERS)
        start, stop = self._start, self._start + REGISTERS
        for name in ("q", "k", "v"):
            before, after = getattr(plain, name).float(), getattr(wide, name).float()
            own = torch.cat([after[..., :start, :], after[..., stop:, :]], -2)
            registers = after[..., start:stop, :]
            scale = TOLERANCE * (1 + float(before.abs().max()))
            if own.shape != before.shape or float((own - before).abs().max()) > scale:
                return "gives the tokens other positions"
            if float((registers[..., :1, :] - registers).abs().max()) > scale:
                return "gives registers positions"
            if not _as_long_as_patches(registers, before[..., start:, :]):
                return "turns registers in a way that vitreg does not understand"
        return ""


def _as_long_as_patches(registers: Float[Tensor, "b h r c"], patches: Float[Tensor, "b h p c"]) -> bool:
    """Where a rotation leaves all patches equally long, as their content is, it leaves registers so, too."""
    lengths, length = patches.norm(dim=-1), registers.norm(dim=-1)
    low, high = lengths.amin(-1), lengths.amax(-1)
    rotated = (high - low) < TOLERANCE * high
    off = (length - high[..., None]).abs().amax(-1) > 10 * TOLERANCE * high
    return not bool((rotated & off).any())
