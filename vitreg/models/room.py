"""Whether a model's blocks have room for tokens that it does not know of: tried block by block, in one pass.

Every token of a block, and two registers more, get the same content. What tells them apart then are positions
alone: the model's own tokens must have the queries, keys and values that they have without registers, and the
registers must have none.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitreg.hooks.attention import AttentionCall
from vitreg.hooks.attention_mode import intercept
from vitreg.hooks.block_edit import BlockEdit, Inner, install, leave_unrotated, uninstall
from vitreg.hooks.inside_block import BlockInterceptor, given_mask, within
from vitreg.hooks.stream import Stream
from vitreg.models.probe import Forward, Probe, evaluating, one_line

REGISTERS = 2  # enough to see whether they differ
TOLERANCE = 1e-3


Attempt = Callable[[nn.Module, Inner, Tensor, Any, Any], None]


def room_for_registers(
    probe: Probe, stream: Stream, start: int, forward: Forward
) -> tuple[tuple[tuple[float, ...], ...], str]:
    """Of the tables of positions that each block makes, what stands there for tokens without a position.

    And why no tokens can be added ("": they can).

    `start` is the index at which registers would stand. Without any table in any block: ().
    """
    tried = [_Tried(index, start, probe.masked) for index in range(probe.depth)]
    with evaluating(probe.model), trying(probe.blocks, stream, [attempt.run for attempt in tried]):
        try:
            forward(probe.noise()[:1])
        except Exception:
            if not probe.head_error:
                raise
    counts = any(attempt.counts or attempt.neutral_values for attempt in tried)
    tables = tuple(tuple(attempt.neutral_values) for attempt in tried) if counts else ()
    return tables, next((x.refused for x in tried if x.refused), "")


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
    with intercept(calls.append, images):
        run()
    return calls[-1]


class _Tried:
    """One block, run with registers in it."""

    def __init__(self, index: int, start: int, masked: bool) -> None:
        self.counts, self.refused = False, ""
        self.neutral_values: list[float] = []
        self._index, self._start, self._masked = index, start, masked

    def run(self, block: nn.Module, inner: Inner, x: Tensor, args: Any, kwargs: Any) -> None:
        b, n, start = *x.shape[:2], self._start
        plain = attention_of(partial(inner, all_alike(x), args, kwargs), b)

        def registers(fitting: bool) -> AttentionCall:
            wide = all_alike(x)[:, :1].repeat(1, n + REGISTERS, 1)
            run = partial(inner, wide, args, kwargs)
            if fitting:
                mode = BlockInterceptor(b, start, REGISTERS, n)
                self.neutral_values = mode.neutral_values
                run = partial(within, mode, run)
            leave_unrotated(block, REGISTERS)
            try:
                return attention_of(run, b)
            finally:
                leave_unrotated(block, -REGISTERS)

        differs = ""
        for self.counts in (False, True):
            fitting = self.counts or self._masked or given_mask(n, args, kwargs)
            differs = self._differs(plain, partial(registers, fitting))
            if not differs:
                return
        self.refused = f"with {REGISTERS} tokens more, block {self._index} {differs}"

    def _differs(self, plain: AttentionCall, run: Callable[[], AttentionCall]) -> str:
        """What is wrong with a block's attention with registers in it; "" where nothing is."""
        try:
            wide = run()
        except Exception as error:
            return f"fails ({type(error).__name__}: {one_line(error)})"
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
