"""Small Vision Transformers as their authors write them: attention step by step, other orders of tokens.

    Authors(attention=Einsum)          # DINO's shape, with another attention in it

Written after the patterns of public repositories, none copied.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DEPTH, WIDTH, HEADS, NEURONS = 3, 32, 4, 128
GRID = (4, 5)
TOKENS = 1 + GRID[0] * GRID[1]


class Attention(nn.Module):
    """(b, n, d) -> (b, n, d); `mix` is what differs."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(0.1)
        self.scale = (WIDTH // HEADS) ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(self.mix(q, k, v).transpose(1, 2).flatten(2))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(b, h, n, c) each."""
        attention = (q @ k.transpose(-2, -1)) * self.scale
        return self.drop(attention.softmax(dim=-1)) @ v


class InPlace(Attention):
    """A bias of positions added in place, the largest logit taken off, another dtype for the softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(HEADS, TOKENS, TOKENS))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attention = torch.matmul(q / 2, k.transpose(-2, -1))
        attention /= 2**0.5
        attention += self.bias
        attention = attention - attention.amax(-1, keepdim=True)
        attention = F.softmax(attention, dim=-1, dtype=torch.float32).to(q.dtype)
        return torch.matmul(self.drop(attention), v)


class Einsum(Attention):
    """Tokens before heads, and the scale per head."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(HEADS, 1, 1))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        logits = torch.einsum("bihd,bjhd->bhij", q, k) * self.temperature
        return torch.einsum("bhij,bjhd->bihd", torch.softmax(logits, -1), v).transpose(1, 2)


class Folded(Attention):
    """Heads in the axis of the images, a bias inside the product, a mask that hides one patch from all."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(HEADS, TOKENS, TOKENS))
        self.register_buffer("hidden", torch.arange(TOKENS) == TOKENS - 1)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b = len(q)
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        bias = self.bias.repeat(b, 1, 1)
        logits = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=self.scale)
        logits = logits.view(b, HEADS, *logits.shape[1:]).masked_fill(self.hidden[None, None, None], -3e4)
        weights = self.drop(logits.flatten(0, 1).softmax(2))
        return torch.bmm(weights, v).unflatten(0, (b, HEADS))


class Where(Attention):
    """A mask of who may see whom, by torch.where."""

    def __init__(self) -> None:
        super().__init__()
        near = torch.rand(TOKENS, TOKENS, generator=torch.Generator().manual_seed(0)) < 0.8
        near[:, 0] = near[0] = True
        self.register_buffer("near", near)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = self.scale * (q @ k.mT)
        logits = torch.where(self.near, logits, torch.tensor(-torch.inf))
        return torch.softmax(logits, dim=3) @ v


class TalkingHeads(Attention):
    """Heads that are mixed: no attention that can be followed."""

    def __init__(self) -> None:
        super().__init__()
        self.talk = nn.Linear(HEADS, HEADS)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = self.talk((q @ k.mT).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return logits.softmax(-1) @ v


class MixedAfterwards(TalkingHeads):
    """Heads that are mixed between the softmax and the values."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.mT).softmax(-1)
        return torch.einsum("bhij,hg->bgij", weights, self.talk.weight) @ v


class UsedTwice(Attention):
    """Weights that mix values, and something else again."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.mT * self.scale).softmax(-1)
        return weights @ v + weights @ q


class OverChannels(Attention):
    """Cross-covariance: channels attend to channels."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.mT for x in (q, k, v))
        return ((q @ k.mT).softmax(-1) @ v).mT


class Block(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(WIDTH), attention, nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, NEURONS), nn.GELU(), nn.Linear(NEURONS, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SequenceFirst(nn.Module):
    """nn.MultiheadAttention on tokens before images, which gives its weights back, too."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.attn(x, x, x)[0]
        return mixed


class Chunk(nn.ModuleList):
    """Some of a model's blocks, with nothing in the places of those before."""

    def __init__(self, blocks: nn.ModuleList, chosen: range) -> None:
        super().__init__([*(nn.Identity() for _ in range(chosen.start)), *(blocks[i] for i in chosen)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = block(x)
        return x


class Authors(nn.Module):
    """A plain ViT of `DEPTH` blocks with a CLS token, around an attention; `first`: tokens before images."""

    def __init__(
        self,
        attention: Any = Attention,
        first: bool = False,
        block: Any = Block,
        grid: Any = GRID,
        chunks: Any = (),
    ) -> None:
        super().__init__()
        self.first = first
        self.patch_embed = nn.Conv2d(3, WIDTH, 8, 8)
        self.image_size = (grid[0] * 8, grid[1] * 8)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid[0] * grid[1], WIDTH))
        self.blocks = nn.ModuleList(block(attention()) for _ in range(DEPTH))
        if chunks:
            self.blocks = nn.ModuleList(Chunk(self.blocks, chosen) for chosen in chunks)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], 1) + self.pos_embed
        x = x.transpose(0, 1) if self.first else x
        for block in self.blocks:
            x = block(x)
        x = x.transpose(0, 1) if self.first else x
        logits: Tensor = self.head(self.norm(x)[:, 0])
        return logits


class Films(Authors):
    """Tubelets of two frames, which are blocks' tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv3d(3, WIDTH, (2, 8, 8), (2, 8, 8))

    def forward(self, films: Tensor) -> Tensor:
        x = self.patch_embed(films.transpose(1, 2)).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return x
