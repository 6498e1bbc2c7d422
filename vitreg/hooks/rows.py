"""Images in one row: streams without an axis of images, (b*n, d) or (1, b*n, d), seen as (b, n, d).

    with row(Row(images=2, patches=20)):     # whoever knows what the model was given
        x = unpacked(stream)                 # (2, 20, d), patches in row-major order
        stream = packed(x, stream.dim() - 1)

Vision towers of language models pack the patches of a batch like this, and many keep them in an order of
their own (squares of 2 x 2 that are merged later, windows). How many images a pass has, and in which order
their patches are, is known for each thread while the pass runs. Tokens that a fix adds stand before the
patches of each image.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from vitreg.errors import UnsupportedModelError

HIDES = -1e4  # what is added to a logit, or less, leaves nothing of its weight


@dataclass(frozen=True)
class Row:
    """The images of one pass: so many, each of so many patches. `order` says where in its image's part of
    the row each patch is (None: in row-major order). `refused`: why nothing of this is known."""

    images: int = 0
    patches: int = 0
    order: Int[Tensor, " p"] | None = None
    refused: str = ""

    def added(self, rows: int) -> int:
        """How many tokens stand before the patches of each image in a row of so many."""
        if self.refused:
            raise UnsupportedModelError(self.refused)
        tokens, rest = divmod(rows, self.images)
        if rest or tokens < self.patches:
            raise UnsupportedModelError(
                f"found a row of {rows} tokens, expected {self.images} images of {self.patches} patches:"
                " images of other sizes, token dropping or merging. Pass images of each size by themselves."
            )
        return tokens - self.patches

    def places(self, added: int, back: bool = False) -> Int[Tensor, " n"] | None:
        """Where each token of an image is in its part of the row (`back`: the other way round)."""
        order = self._back if back else self.order
        if order is None or not added:
            return order
        return torch.cat([torch.arange(added, device=order.device), order + added])

    @cached_property
    def _back(self) -> Tensor | None:
        return None if self.order is None else self.order.argsort()


NOTHING = Row(
    refused="the model packs the tokens of all images into one row, and nothing that it was given says how"
    " many images there are. Call the vision tower itself, with images or with their grids."
)


class _Pass(threading.local):
    def __init__(self) -> None:
        self.row = NOTHING
        self.outer: list[Row] = []  # of the passes around this one, the innermost last
        self.tokens = 0  # of all images, in the block that runs


_pass = _Pass()


@contextmanager
def row(known: Row) -> Iterator[None]:
    """While entered, this thread's passes have such a row."""
    before = know(known)
    try:
        yield
    finally:
        know(before)


def know(known: Row) -> Row:
    """The pass that this thread runs has such a row; what was known before is returned."""
    before, _pass.row = _pass.row, known
    return before


def begin_pass(known: Row) -> None:
    """A pass begins, perhaps inside of another."""
    _pass.outer.append(know(known))


def end_of_pass(*_: Any) -> None:
    """A forward hook of a model that packs: what was known before the pass is known again."""
    know(_pass.outer.pop() if _pass.outer else NOTHING)


def current() -> Row | None:
    """The row of the pass that this thread runs; None where it runs none of a model that packs."""
    return None if _pass.row is NOTHING else _pass.row


def enter_block(tokens: int) -> None:
    """The block that this thread runs now has so many tokens of all images."""
    _pass.tokens = tokens


def tokens_inside() -> int:
    """The tokens of all images in the block that this thread runs."""
    return _pass.tokens


def unpacked(x: Shaped[Tensor, "..."], entering: bool = False) -> Float[Tensor, "b n d"]:
    """A row of tokens by image, patches in row-major order. `entering`: it is what a block is given."""
    rows, known = x.shape[-2], _pass.row
    added = known.added(rows)
    if entering:
        enter_block(rows)
    x = x.reshape(known.images, -1, x.shape[-1])
    return reordered(x, known.places(added), 1)


def packed(x: Float[Tensor, "b n d"], axes: int, entering: bool = False) -> Shaped[Tensor, "..."]:
    """The other way round; `axes` is how many there are before the width."""
    known = _pass.row
    added = known.added(x.shape[0] * x.shape[1])
    if entering:
        enter_block(x.shape[0] * x.shape[1])
    x = reordered(x, known.places(added, back=True), 1).flatten(0, 1)
    return x if axes == 1 else x[None]


def reordered(x: Tensor, places: Tensor | None, axis: int) -> Tensor:
    """A tensor with its tokens at other places of an axis."""
    return x if places is None else x.index_select(axis, places.to(x.device))


def with_bounds(value: Any, tokens: int) -> Any:
    """A block's arguments, with room for added tokens in the bounds of images or windows among them.

    `tokens` are those of all images, with the added ones. Bounds are integers that rise from 0 to the end of
    the row. An image that is cut into windows gets one window more, of the added tokens alone: a token that
    many windows see would carry one's content to the others, which the model never does in these blocks.
    """
    added = _pass.row.added(tokens)
    if not added:
        return value
    if isinstance(value, tuple | list):
        items = [with_bounds(item, tokens) for item in value]
        return type(value)(items) if type(value) in (tuple, list) else value
    if isinstance(value, dict):
        return {name: with_bounds(item, tokens) for name, item in value.items()}
    return _widened(value, _pass.row, added) if _are_bounds(value, _pass.row) else value


def _are_bounds(value: Any, known: Row) -> bool:
    if not isinstance(value, Tensor) or value.dim() != 1 or value.is_floating_point() or len(value) < 2:
        return False
    return bool(value[0] == 0 and value[-1] == known.images * known.patches and (value.diff() > 0).all())


def _widened(bounds: Int[Tensor, " w"], known: Row, added: int) -> Int[Tensor, " v"]:
    moved = bounds + added * -(-bounds // known.patches)
    if len(bounds) == known.images + 1:
        return moved
    starts = moved[:-1][bounds[:-1] % known.patches == 0]
    return torch.cat([moved, starts + added]).sort().values.to(bounds.dtype)


# -- masks over a whole row -------------------------------------------------------------------------


def hidden(mask: Tensor) -> Tensor:
    """Where a mask (True: kept) or a bias keeps a token from attending to another."""
    return ~mask if mask.dtype == torch.bool else mask < HIDES


def blocks_of_images(mask: Shaped[Tensor, "..."], images: int) -> Shaped[Tensor, "..."]:
    """A mask (..., 1 or N, N) of a row as (..., b, b, n, n)."""
    mask = mask.expand(*mask.shape[:-2], mask.shape[-1], -1)
    return mask.unflatten(-1, (images, -1)).unflatten(-3, (images, -1)).transpose(-3, -2)


def with_rows_of_images(mask: Shaped[Tensor, "..."], images: int, added: int) -> Shaped[Tensor, "..."]:
    """A mask of a row, with so many tokens more before each image's. Its own tokens and they see each other;
    where the image is cut into windows, the added tokens are a window of their own."""
    keep = mask.dtype == torch.bool
    own = blocks_of_images(mask, images)[..., range(images), range(images), :, :]
    windows = bool(hidden(own).any())
    places = torch.arange(mask.shape[-1], device=mask.device).unflatten(0, (images, -1))
    places = torch.cat([places[:, :1].expand(-1, added), places], 1)
    mask = mask.expand(*mask.shape[:-2], mask.shape[-1], -1)
    wide = mask.index_select(-1, places.flatten()).index_select(-2, places.flatten())
    image = torch.arange(images, device=mask.device).repeat_interleave(places.shape[1])
    new = (torch.arange(places.shape[1], device=mask.device) < added).repeat(images)
    of_one = image[:, None] == image
    wide = wide.masked_fill(of_one & (new[:, None] | new), keep)
    return wide.masked_fill(of_one & (new[:, None] ^ new), False if keep else mask.min()) if windows else wide
