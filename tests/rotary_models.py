"""Attention with positions that each block makes for its own number of tokens, as authors write it.

Written after the patterns of public repositories, none copied.
"""

import math

import torch
from authors_models import GRID, HEADS, TOKENS, WIDTH, Attention
from torch import Tensor, nn

CHANNELS = WIDTH // HEADS


def places() -> Tensor:
    """(patches, 2): row and column of each patch."""
    rows, columns = torch.meshgrid(torch.arange(GRID[0]), torch.arange(GRID[1]), indexing="ij")
    return torch.stack([rows, columns], -1).flatten(0, 1).float()


def angles(coordinates: Tensor, base: float = 100.0) -> Tensor:
    """(patches, channels / 2): half of them turn with the row, half with the column."""
    frequencies = base ** -torch.linspace(0, 1, CHANNELS // 4)
    return (coordinates[..., None] * frequencies).flatten(-2)


def turned_by_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    one, other = x.chunk(2, -1)
    return x * cos + torch.cat([-other, one], -1) * sin


class Halves(Attention):
    """cos x + sin rotate_half(x) over all tokens, CLS at angle 0; tables are buffers."""

    def __init__(self) -> None:
        super().__init__()
        turned = torch.cat([torch.zeros(1, CHANNELS // 2), angles(places() + 1)]).repeat(1, 2)
        self.register_buffer("cos", turned.cos())
        self.register_buffer("sin", turned.sin())

    def rotate(self, x: Tensor) -> Tensor:
        return turned_by_halves(x, self.cos, self.sin)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().mix(self.rotate(q), self.rotate(k), v)


class Centred(Halves):
    """Coordinates from -1 to 1, no token at 0; CLS is left out by its index, tables made in each pass."""

    def rotate(self, x: Tensor) -> Tensor:
        turned = (angles(2 * (places() + 0.5) / torch.tensor(GRID) - 1) * math.pi).repeat(1, 2)
        return torch.cat([x[:, :, :1], turned_by_halves(x[:, :, 1:], turned.cos(), turned.sin())], 2)


class Interleaved(Halves):
    """Even and odd channels, each multiplied by both tables."""

    def rotate(self, x: Tensor) -> Tensor:
        cos, sin = (table[:, : CHANNELS // 2] for table in (self.cos, self.sin))
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


class Complex(Halves):
    """Pairs of channels as complex numbers, tokens before heads."""

    def rotate(self, x: Tensor) -> Tensor:
        half = slice(CHANNELS // 2)
        turned = torch.complex(self.cos[:, half], self.sin[:, half])
        pairs = torch.view_as_complex(x.transpose(1, 2).unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turned[:, None]).flatten(-2).transpose(1, 2)


class Added(Attention):
    """Positions that are added to the keys of each block, for a fixed number of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(TOKENS, CHANNELS))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().mix(q, self.rotate(k), v)

    def rotate(self, k: Tensor) -> Tensor:
        return k + self.positions


class Counting(Halves):
    """Angles by the number of tokens that come in: a register in front would turn all that follow."""

    def rotate(self, x: Tensor) -> Tensor:
        turned = (torch.arange(x.shape[2])[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03])).repeat(1, 2)
        return turned_by_halves(x, turned.cos(), turned.sin())


class Asserting(Complex):
    """A table that says how many tokens it is for."""

    def rotate(self, x: Tensor) -> Tensor:
        assert x.shape[2] == TOKENS, "rotary positions are for another number of tokens"
        return super().rotate(x)
