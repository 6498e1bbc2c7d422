"""The attention of a block whose images lie in one row, as one call over (b, h, n, c).

Such a block computes it image by image, window by window, or for the whole row with a mask between images. A
window is seen as what it is: tokens that no other token of the image attends to.
"""

from collections.abc import Callable
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitreg.errors import UnsupportedModelError
from vitreg.hooks.attention import AttentionCall
from vitreg.hooks.rows import Row, blocks_of_images, current, hidden, reordered, tokens_inside


class RowAttention(AttentionCall):
    """What a block computes for each image, or each window of it, put together."""

    causal = False

    def __init__(self, calls: list[AttentionCall], known: Row) -> None:
        self._calls, self._row = calls, known
        self.kind, self.scale, self.dropout = calls[0].kind, calls[0].scale, calls[0].dropout
        self._lengths = lengths_of(calls)
        self.tokens = sum(self._lengths) // known.images
        self._places = known.places(self.tokens - known.patches)

    def _by_image(self, parts: list[Tensor]) -> Float[Tensor, "b h n c"]:
        whole = torch.cat([part.movedim(-3, 0).flatten(1, -2) for part in parts], 1)  # (h, b*n, c)
        b, n = self._row.images, self.tokens
        return reordered(whole.unflatten(1, (b, n)).transpose(0, 1), self._places, 2)

    @cached_property
    def q(self) -> Float[Tensor, "b h n c"]:
        return self._by_image([call.q for call in self._calls])

    @cached_property
    def k(self) -> Float[Tensor, "b h n c"]:
        return self._by_image([call.k for call in self._calls])

    @cached_property
    def v(self) -> Float[Tensor, "b h n c"]:
        return self._by_image([call.v for call in self._calls])

    @cached_property
    def mask(self) -> Tensor | None:  # type: ignore[override]
        if any(call.causal for call in self._calls):
            raise UnsupportedModelError("attention over a row of images is causal, which is not supported.")
        if len(self._lengths) == 1:
            return self._mask_of_row(self._calls[0].mask)
        if any(call.mask is not None for call in self._calls):
            raise UnsupportedModelError(
                "attention over images in a row goes part by part, each with a mask of its own, which is not"
                " supported."
            )
        windows = self._windows
        return None if windows is None else (windows[:, None] == windows)[None, None]

    def _bias(self, index: Tensor | slice, keys: int, logits: Tensor) -> Tensor | float:
        windows = self._windows
        if windows is None or len(self._lengths) == 1:
            return super()._bias(index, keys, logits)
        return logits.new_zeros(()).masked_fill(windows[index][:, None] != windows, -torch.inf)

    @cached_property
    def _windows(self) -> Int[Tensor, " n"] | None:
        """The number of each token's window; None where they are whole images."""
        if len(self._lengths) == self._row.images:
            return None
        lengths = torch.tensor(self._lengths, device=self._calls[0].q.device)
        numbers = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
        return reordered(numbers[: self.tokens], self._places, 0)

    def _mask_of_row(self, mask: Tensor | None) -> Tensor | None:
        """What a mask of the whole row does within images; None where it only keeps them apart."""
        b, n = self._row.images, self.tokens
        if b == 1 and mask is None:
            return None
        blocks = None if mask is None else blocks_of_images(mask, b)
        apart = ~torch.eye(b, dtype=torch.bool)
        if blocks is None or not bool(hidden(blocks)[..., apart.to(blocks.device), :, :].all()):
            raise UnsupportedModelError(
                "the tokens of all images lie in one row, and nothing keeps images from attending to each"
                " other."
            )
        own = blocks[..., range(b), range(b), :, :].movedim(-3, 0)  # (b, ..., n, n)
        own = reordered(reordered(own, self._places, -1), self._places, -2)
        changes = ~own if own.dtype == torch.bool else own != 0
        return own.reshape(b, -1, n, n) if bool(changes.any()) else None


def lengths_of(calls: list[AttentionCall]) -> list[int]:
    """How many tokens each of the attentions is over; a call may be over several of equal length."""
    return [call.tokens for call in calls for _ in range(call.q.shape[:-3].numel())]


class joined:  # noqa: N801 - used as a function that remembers
    """Hands on each attention of a block as one, those of images in a row once all of them are there."""

    def __init__(self, seen: Callable[[AttentionCall], None]) -> None:
        self._seen = seen
        self._calls: list[AttentionCall] = []

    def __call__(self, call: AttentionCall) -> None:
        known = current()
        if known is None:
            self._seen(call)
            return
        self._calls.append(call)
        tokens = sum(lengths_of(self._calls))
        if tokens >= tokens_inside():
            calls, self._calls = self._calls, []
            self._seen(RowAttention(calls, known) if tokens == tokens_inside() else call)

    def forget(self) -> None:
        """Hold no tensor any longer."""
        self._calls = []
