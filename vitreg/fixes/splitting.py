"""Token splitting: a cure that leaves every other token as it was.

    fix = TokenSplitting.calibrate(vit, photos, neurons)
    with fix.applied_to(vit):
        vit(images)

A test-time register changes what every token reads. Splitting does not: where register neurons mark a
patch, the token is forked. The original goes on exactly as before, as key and value for everyone, and is
handed out as a register. Its copy, with the register neurons at zero, asks like any token, is attended to
by nobody, and takes the patch's place in the grid. So CLS and all unmarked patches stay what they were,
up to rounding, and with them the predictions; only the corrupted patches change.

The fork costs nothing where it happens: in that block the grid's token becomes the copy (its register
neurons are zeroed), and the original is the copy plus what those neurons would have written.
"""

from collections.abc import Iterable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from math import ceil, isnan
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vitreg.data.batches import Batch
from vitreg.errors import FixError, UnsupportedModelError
from vitreg.fixes.base import Fix, first_patch
from vitreg.fixes.calibration import calibrate_thresholds
from vitreg.fixes.neurons import NeuronTensors, RegisterNeurons
from vitreg.hooks.attention import AttentionCall
from vitreg.hooks.block_edit import BlockEdit, Inner, without_edits
from vitreg.hooks.carry import CarriedTokens
from vitreg.hooks.inside_block import BlockInterceptor, within
from vitreg.hooks.neuron_edit import edited
from vitreg.hooks.stream import Stream
from vitreg.hooks.token_order import ReorderedAttention, arranged, observed_as
from vitreg.hooks.weights import is_affine, weight_columns
from vitreg.models.backbone import Backbone
from vitreg.models.probe import evaluating, one_line
from vitreg.models.room import TOLERANCE, all_alike, attention_of, trying
from vitreg.models.write_gain import write_gains

# Room for more marked patches than any image of the calibration had.
ROOM = 1.5
TRIED = 3  # patches whose copies are tried where blocks make positions


@dataclass(frozen=True)
class TokenSplitting(Fix):
    """Fork the patches that register neurons mark; per image at most the share `capacity` of all patches.

    A neuron marks a patch if its activation is beyond the neuron's threshold. Of more marked patches than
    there is room for, those with the highest activations, in units of the threshold, are forked. Thresholds
    and capacity come from `calibrate`.
    """

    type: ClassVar[str] = "splitting"
    does_not_cure: ClassVar[str] = (
        "outliers that no neuron makes, such as those of an outlying position embedding; and every token"
        " still attends to the original outliers, which go on as keys and values."
    )
    inside_splitting: ClassVar[str] = "would add tokens between"
    capacity: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.capacity <= 1:
            raise ValueError(
                f"capacity={self.capacity}: expected a share of the patches, over 0 and up to 1."
            )
        if any(isnan(neuron.threshold) for neuron in self.neurons.chosen):
            raise FixError(
                "some of these neurons have no threshold beyond which they mark a token. Make the fix with"
                " TokenSplitting.calibrate(vit, images, neurons)."
            )

    @classmethod
    def calibrate(
        cls,
        vit: Backbone,
        images: Iterable[Batch] | Iterable[Tensor],
        neurons: RegisterNeurons,
        *,
        feeders: bool = True,
    ) -> "TokenSplitting":
        """Learn from images (no labels) when a neuron marks a token, and how much room to leave for copies.

        `feeders` adds the neurons that lead up to the outliers (see marks.py), so that copies are clean of
        what went before, too.
        """
        marked, most = calibrate_thresholds(vit, images, neurons, feeders=feeders)
        return cls(marked, capacity=min(ROOM * most, 1.0))

    def check(self, vit: Backbone) -> None:
        super().check(vit)
        if vit.anatomy.stream.row_axes:
            raise UnsupportedModelError(
                f"{vit.name} packs its images into one row of tokens, in which copies have no place. Use"
                " test-time registers."
            )
        if vit.anatomy.position_tables or vit.anatomy.no_registers:
            _refuse_misplaced_copies(vit)

    def edits(self, vit: Backbone) -> dict[int, BlockEdit]:
        carry: CarriedTokens[Fork] = CarriedTokens()
        layers = range(min(self.neurons.by_layer, default=vit.anatomy.depth), vit.anatomy.depth)
        _refuse_other_than_linear(vit, self.neurons)
        gains = write_gains(vit, list(self.neurons.by_layer))
        return {layer: _SplitEdit(self, vit, layer, carry, gains.get(layer)) for layer in layers}


def _refuse_misplaced_copies(vit: Backbone) -> None:
    """Where all tokens have the same content, a copy must ask what the token asks that it is a copy of."""
    start, heads = vit.anatomy.prefix + vit.anatomy.registers, vit.anatomy.heads
    blocks = vit.anatomy.block_modules(vit.model)
    failed: list[str] = []

    def attempt(index: int, block: nn.Module, inner: Inner, x: Tensor, args: Any, kwargs: Any) -> None:
        x, n = all_alike(x), x.shape[1]
        position = torch.arange(TRIED, device=x.device).expand(x.shape[0], -1) + start
        fork = Fork(position, torch.ones_like(position, dtype=torch.bool), _at(x, position))
        args, kwargs = _with_rows_for_copies((args, kwargs), fork, n, start, heads)
        run = partial(inner, torch.cat([x, fork.original], 1), args, kwargs)
        try:
            q = attention_of(partial(within, _Forked(fork, start, n), run), x.shape[0]).q.float()
        except Exception as error:
            raised = f"{type(error).__name__}: {one_line(error)}"
            failed.append(f"block {index} fails with copies in it ({raised})")
            return
        off = (q[..., start : start + TRIED, :] - q[..., n:, :]).abs().max()
        if off > TOLERANCE * (1 + q.abs().max()):
            failed.append(f"block {index} gives copies the positions of other tokens")

    attempts = [partial(attempt, index) for index in range(len(blocks))]
    with evaluating(vit.model), without_edits(vit.model), trying(blocks, vit.anatomy.stream, attempts):
        vit(torch.zeros(1, 3, *vit.image_size))
    if failed:
        raise UnsupportedModelError(
            f"{vit.name} cannot have its tokens split: {failed[0]}. Use test-time registers with registers=0,"
            " which zeroes the neurons."
        )


def _refuse_other_than_linear(vit: Backbone, neurons: RegisterNeurons) -> None:
    """The original is the copy plus what the neurons write, which must not depend on the other neurons."""
    downs = vit.anatomy.down_projections(vit.model)
    with evaluating(vit.model):
        like = torch.empty(0, dtype=vit.dtype, device=vit.device)
        for layer in neurons.by_layer:
            if not is_affine(downs[layer], vit.anatomy.neurons, like):
                raise UnsupportedModelError(
                    f"beside the down-projection of block {layer} is an adapter that is not linear, so that a"
                    " token cannot be split there. Use test-time registers."
                )


class Fork(NamedTuple):
    """The forked tokens of a batch: c places for each image, of which `valid` ones are taken.

    `position` is the index among the model's own tokens, `original` the stream of the token as it would be
    without the fix; its copy stands in the stream itself.
    """

    position: Int[Tensor, "b c"]
    valid: Bool[Tensor, "b c"]
    original: Float[Tensor, "b c d"]

    def order(self, start: int, n: int) -> tuple[Int[Tensor, "b m"], Bool[Tensor, "b m"]]:
        """[prefix | registers | originals | patches, copies in place] out of [n tokens | copies].

        Also which of these are absent: places that no token took.
        """
        b, room = self.position.shape
        copies = n + torch.arange(room, device=self.position.device).expand(b, -1)
        grid = torch.arange(n, device=self.position.device).expand(b, -1)
        grid = grid.scatter(1, self.position, torch.where(self.valid, copies, self.position))
        order = torch.cat([grid[:, :start], self.position, grid[:, start:]], 1)
        absent = torch.zeros_like(order, dtype=torch.bool)
        absent[:, start : start + room] = ~self.valid
        return order, absent


class _SplitEdit(BlockEdit):
    def __init__(
        self, fix: TokenSplitting, vit: Backbone, layer: int, carry: CarriedTokens[Fork], gain: Tensor | None
    ) -> None:
        self.share, self.layer, self.carry, self.gain = fix.capacity, layer, carry, gain
        self.start = first_patch(vit, layer)
        self.first = layer == min(fix.neurons.by_layer)
        self.down, self.heads = vit.anatomy.down_projection, vit.anatomy.heads
        self.neurons = fix.neurons.tensors(layer)
        self.hooked = None if self.neurons is None else self.down
        self.stream: Stream = vit.anatomy.stream

    def run(self, block: nn.Module, inner: Inner, x: Tensor, args: Any, kwargs: Any) -> Tensor:
        fork = None if self.first else self.carry.take_from_before(self.layer, x)
        n = x.shape[1]
        marker = self._marker(fork, n)
        if fork is not None:
            args, kwargs = _with_rows_for_copies((args, kwargs), fork, n, self.start, self.heads)
            x = torch.cat([_place(x, fork, fork.original), _at(x, fork.position)], 1)
        elif marker is None:
            return inner(x, args, kwargs)
        run = partial(inner, x, args, kwargs)
        if fork is not None:
            run = partial(within, _Forked(fork, self.start, n), run)
        if marker is not None:
            run = partial(edited, block, self.down, self.stream.on_neurons(marker), run)
        y = run()
        tokens, copies = y.tensor_split([n], 1)
        grid = tokens if fork is None else _place(tokens, fork, copies)
        self.carry.leave(self.layer, self._next(block, tokens, marker, fork))
        return grid

    def _next(
        self, block: nn.Module, tokens: Tensor, marker: "_Marker | None", fork: "Fork | None"
    ) -> "Fork":
        """The fork that the next block takes on."""
        if marker is None:
            assert fork is not None
            return fork._replace(original=_at(tokens, fork.position))
        # What stands in the grid where a token was forked just now is the copy already.
        position, valid, _ = marker.fork
        write = F.linear(marker.removed, self._write(block, marker.removed))
        return Fork(position, valid, _at(tokens, position) + write)

    def _marker(self, fork: "Fork | None", n: int) -> "_Marker | None":
        if self.neurons is None:
            return None
        return _Marker(self.neurons, fork, self.start, ceil(self.share * (n - self.start)))

    def _write(self, block: nn.Module, like: Tensor) -> Float[Tensor, "d k"]:
        """What the neurons of this block add to the stream, per unit of activation."""
        assert self.neurons is not None
        assert self.gain is not None
        columns = weight_columns(block.get_submodule(self.down), self.neurons.index, like)
        return columns * self.gain.to(like)[:, None]


def _with_rows_for_copies(given: Any, fork: Fork, tokens: int, start: int, heads: int) -> Any:
    """Positional tables (rotary, say) that the model hands to a block, with rows for the copies."""
    if isinstance(given, tuple | list):
        return type(given)(_with_rows_for_copies(item, fork, tokens, start, heads) for item in given)
    if isinstance(given, dict):
        return {name: _with_rows_for_copies(item, fork, tokens, start, heads) for name, item in given.items()}
    if not (isinstance(given, Tensor) and given.dim() >= 2 and given.shape[-2] in (tokens, tokens - start)):
        return given
    per_head = given.dim() == 3 and given.shape[0] == heads and given.is_floating_point()
    of_all_images = given.dim() == 2 or per_head
    table = given.unsqueeze(0) if of_all_images else given
    position = fork.position - (tokens - given.shape[-2])
    if table.dim() == 3 and table.shape[0] == fork.position.shape[0] and not of_all_images:
        return torch.cat([table, _rows_at(table, 1, position)], 1)  # of each image
    if table.dim() == 3:
        table = table.unsqueeze(1)
    table = table.expand(fork.position.shape[0], -1, -1, -1)  # (b, 1 or h, tokens or patches, e)
    return torch.cat([table, _rows_at(table, 2, position)], 2)


def _rows_at(table: Tensor, axis: int, position: Int[Tensor, "b c"]) -> Tensor:
    """What stands at some positions of an axis of (b, ...)."""
    shape = [1] * table.dim()
    shape[0], shape[axis] = position.shape
    wanted = list(table.shape)
    wanted[axis] = position.shape[1]
    return table.gather(axis, position.clamp(min=0).reshape(shape).expand(wanted))


class _Marker:
    """Zeroes register neurons in copies and in the tokens that they mark, and says which those are."""

    def __init__(self, neurons: NeuronTensors, fork: Fork | None, start: int, room: int) -> None:
        self._neurons, self._old, self._start, self._room = neurons, fork, start, room

    def __call__(self, activation: Float[Tensor, "b n f"]) -> Float[Tensor, "b n f"]:
        index = self._neurons.index.to(activation.device)
        values = activation.index_select(-1, index)  # (b, n, k)
        copies = 0 if self._old is None else self._room
        tokens, copied = values.tensor_split([values.shape[1] - copies], 1)
        top, position = self._score(tokens).topk(self._room, dim=1)
        valid = top >= 1
        new = valid & (top < torch.inf)
        at = position[..., None].expand(-1, -1, values.shape[-1])
        self.removed = torch.where(new[..., None], tokens.gather(1, at), 0)
        self.fork = Fork(position, valid, self.removed)
        kept = torch.cat([tokens.scatter_add(1, at, -self.removed), torch.zeros_like(copied)], 1)
        return activation.index_copy(-1, index, kept)

    def _score(self, values: Float[Tensor, "b n k"]) -> Float[Tensor, "b n"]:
        """The highest activation of each patch in units of the threshold; what is forked stays forked."""
        score = (values / self._neurons.threshold.to(values)).amax(-1)
        outside = torch.full_like(score[:, : self._start], -torch.inf)
        score = torch.cat([outside, score[:, self._start :]], 1)
        if self._old is None:
            return score
        position, valid, _ = self._old
        return score.scatter(1, position, torch.where(valid, torch.inf, score.gather(1, position)))


class _Forked(BlockInterceptor):
    """Copies ask, and are not asked: keys and values are those of the model's own n tokens."""

    def __init__(self, fork: Fork, start: int, n: int) -> None:
        super().__init__(fork.position.shape[0], start, fork.position.shape[1], n)
        self._fork = fork
        self._shown = ExitStack()

    def __enter__(self) -> Any:
        if not torch.compiler.is_compiling():
            self._order, self._absent = self._fork.order(self._start, self._tokens)
            self._shown.enter_context(arranged(self._order))
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        self._shown.close()
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def mask(self, mask: Tensor, keys: int) -> Tensor:
        """A mask or bias with rows and columns for the copies: those of the tokens they are copies of."""
        n, position = self._tokens, self._fork.position
        if mask.shape[-1] != n:
            return mask
        mask = mask[(None,) * (4 - mask.dim())].expand(position.shape[0], -1, -1, -1)
        if mask.shape[-2] == n:  # neither one row for all, nor one that came widened as positional tables do
            rows = position[:, None, :, None].expand(-1, mask.shape[1], -1, n)
            mask = torch.cat([mask, mask.gather(2, rows)], 2)
        columns = position[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1)
        return torch.cat([mask, mask.gather(3, columns)], 3)

    def fit(self, name: str, table: Tensor, axis: int, like: Tensor) -> Tensor:
        """A copy is where the token is that it is a copy of."""
        table = table[(None,) * (like.dim() - table.dim())]
        table = table.expand(like.shape[0], *[-1] * (table.dim() - 1))
        position = self._fork.position - (self._tokens - table.shape[axis])
        position = position.repeat_interleave(like.shape[0] // position.shape[0], 0)  # of folded heads
        return torch.cat([table, _rows_at(table, axis, position)], axis)

    def attend(self, call: AttentionCall) -> Float[Tensor, "b h n e"]:
        mask = None if call.mask is None else call.mask[..., : self._tokens]
        with self._shown_to_watchers(call):
            return call.compute(mask, keys=self._of_tokens, values=self._of_tokens)

    def weights(self, call: AttentionCall) -> Float[Tensor, "b h n m"]:
        mask = torch.zeros(call.tokens, device=call.q.device)
        mask[self._tokens :] = -torch.inf
        return (call.logits(slice(None)) + mask).softmax(-1)

    def _of_tokens(self, x: Float[Tensor, "b h m c"]) -> Float[Tensor, "b h n c"]:
        """Keys or values without those of the copies."""
        return x[..., : self._tokens, :]

    def _shown_to_watchers(self, call: AttentionCall) -> Any:
        if torch.compiler.is_compiling():
            return nullcontext()
        return observed_as(lambda: ReorderedAttention(call, self._order, self._absent))


def _at(x: Float[Tensor, "b n d"], position: Int[Tensor, "b c"]) -> Float[Tensor, "b c d"]:
    return x.gather(1, position[..., None].expand(-1, -1, x.shape[2]))


def _place(x: Float[Tensor, "b n d"], fork: Fork, value: Float[Tensor, "b c d"]) -> Float[Tensor, "b n d"]:
    """The stream with other tokens where there is a fork."""
    value = torch.where(fork.valid[..., None], value, _at(x, fork.position))
    return x.scatter(1, fork.position[..., None].expand_as(value), value.to(x.dtype))
