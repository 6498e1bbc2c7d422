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
from vitreg.hooks.block_edit import BlockEdit, Inner, install, uninstall
from vitreg.hooks.hooked import hooked
from vitreg.hooks.inside_block import BlockInterceptor, given_mask, within
from vitreg.hooks.stream import Stream
from vitreg.models.probe import Forward, Probe, evaluating, one_line

REGISTERS = 2  # enough to see whether they differ
TOLERANCE = 1e-3


def room_for_registers(probe: Probe, stream: Stream, start: int, forward: Forward) -> tuple[bool, str]:
    """Whether a block makes positions for a fixed number of tokens, and why none can be added ("": they can).

    `start` is the index at which registers would stand.
    """
    tried = [_Tried(index, stream, start, probe.masked) for index in range(probe.depth)]

    def attempt(index: int, block: nn.Module, args: Any, kwargs: Any) -> None:
        tried[index].run(block, args, kwargs)

    with evaluating(probe.model), each_block(probe.blocks, attempt):
        try:
            forward(probe.noise()[:1])
        except Exception:
            if not probe.head_error:
                raise
    return any(attempt.counts for attempt in tried), next((x.refused for x in tried if x.refused), "")


@contextmanager
def each_block(
    blocks: Sequence[nn.Module], attempt: Callable[[int, nn.Module, Any, Any], None]
) -> Iterator[None]:
    """While entered, each block is handed to `attempt` with its arguments before it runs for itself."""
    trying = False

    def before(index: int, block: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal trying
        if trying:  # the attempt runs the block
            return
        trying = True
        try:
            attempt(index, block, args, kwargs)
        finally:
            trying = False

    hooks = [
        block.register_forward_pre_hook(partial(before, index), with_kwargs=True)
        for index, block in enumerate(blocks)
    ]
    with hooked(hooks):
        yield


def attention_with(
    edit: BlockEdit | None, block: nn.Module, stream: Stream, args: Any, kwargs: Any
) -> AttentionCall:
    """The attention of a block whose tokens have all the same content, with an edit or without."""
    calls: list[AttentionCall] = []
    x = stream.of_call(args, kwargs)
    args, kwargs = stream.in_call(x.mean(1, keepdim=True).repeat(1, x.shape[1], 1), args, kwargs)
    if edit is not None:
        install(block, edit)
    try:
        with intercept(calls.append, x.shape[0]):
            block(*args, **kwargs)
    finally:
        if edit is not None:
            uninstall(block, edit)
    return calls[-1]


class _Tried:
    """One block, run with registers in it."""

    def __init__(self, index: int, stream: Stream, start: int, masked: bool) -> None:
        self.counts, self.refused = False, ""
        self._index, self._stream, self._start, self._masked = index, stream, start, masked

    def run(self, block: nn.Module, args: Any, kwargs: Any) -> None:
        def attention(edit: BlockEdit | None) -> AttentionCall:
            return attention_with(edit, block, self._stream, args, kwargs)

        plain = attention(None)
        for counts in (False, True):
            edit = _Inert(self._start, self._masked, counts, self._stream)
            self.counts, differs = counts, self._differs(plain, partial(attention, edit))
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


class _Inert(BlockEdit):
    """Registers that stand in a block and do nothing."""

    inserted = REGISTERS

    def __init__(self, start: int, masked: bool, counts: bool, stream: Stream) -> None:
        self._start, self._masked, self._counts, self.stream = start, masked, counts, stream

    def run(self, block: nn.Module, inner: Inner, x: Tensor, args: Any, kwargs: Any) -> Tensor:
        start, tokens = self._start, x.shape[1]
        wide = torch.cat([x[:, :start], x[:, :1].expand(-1, REGISTERS, -1), x[:, start:]], 1)
        run = partial(inner, wide, args, kwargs)
        if self._masked or self._counts or given_mask(tokens, args, kwargs):
            run = partial(within, BlockInterceptor(x.shape[0], start, REGISTERS, tokens), run)
        y = run()
        return torch.cat([y[:, :start], y[:, start + REGISTERS :]], 1)
