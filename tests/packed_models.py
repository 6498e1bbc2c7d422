"""Small vision towers that pack the images of a batch into one row, and where their patches lie in it.

    tower = PACKED["qwen2.5-vl"]
    tower.backbone()                  # random weights, without a download
    tower.places(grid)                # of each patch, row by row, its place among the tokens of an image

Two are written by us, after patterns of public repositories; the others are classes of transformers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from catalog import DEPTH, randomise
from torch import Tensor, nn

import vitreg

WIDTH, HEADS, PATCH = 32, 4, 8


@dataclass(frozen=True)
class Tower:
    """`square` patches by `square` are merged later, and lie together; so do `window` by `window` patches,
    which attend to each other alone in all blocks but those of `whole`."""

    build: Callable[[], nn.Module]
    neurons: int = 128
    square: int = 1
    window: int = 0
    whole: tuple[int, ...] = ()
    size: tuple[int, int] = (48, 80)
    forward: Any = None

    def backbone(self, seed: int = 0) -> vitreg.Backbone:
        return vitreg.wrap(self.module(seed), image_size=self.size, forward=self.forward)

    def module(self, seed: int = 0) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return randomise(self.build()).eval()

    def places(self, grid: tuple[int, int]) -> Tensor:
        """(p,): where each patch is, patches in row-major order."""
        s, w = self.square, self.window or 10**6

        def key(patch: int) -> tuple[int, ...]:
            row, column = divmod(patch, grid[1])
            return row // w, column // w, row // s, column // s, row, column

        return torch.tensor(sorted(range(grid[0] * grid[1]), key=key)).argsort()

    def together(self, grid: tuple[int, int], layer: int) -> Tensor:
        """(p, p): which patches attend to which in a block."""
        if not self.window or layer in self.whole:
            return torch.ones(grid[0] * grid[1], grid[0] * grid[1], dtype=torch.bool)
        rows, columns = torch.meshgrid(*map(torch.arange, grid), indexing="ij")
        windows = ((rows // self.window) * 100 + columns // self.window).flatten()
        return windows[:, None] == windows

    def lengths(self, grid: tuple[int, int], layer: int) -> list[int]:
        """How many tokens each part of an image has that attends to itself, in the order of the row."""
        together = self.together(grid, layer)[self.places(grid).argsort()]
        counts = together.sum(1).tolist()
        lengths: list[int] = []
        while sum(lengths) < len(counts):
            lengths.append(counts[sum(lengths)])
        return lengths


# -- written by us --------------------------------------------------------------------------------


class Attention(nn.Module):
    """Over a row (N, d) of tokens with bounds of images or windows: parts of equal length in one call, others
    one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, bounds: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).unbind(1)  # (N, h, c)
        lengths = bounds.diff().tolist()
        if len(set(lengths)) == 1:
            parts = [y.unflatten(0, (len(lengths), -1)).transpose(1, 2) for y in (q, k, v)]
            mixed = F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(0, 1)
        else:
            each = zip(*(y.transpose(0, 1).split(lengths, 1) for y in (q, k, v)), strict=True)
            mixed = torch.cat([self.step_by_step(*part) for part in each])
        return self.proj(mixed.flatten(1))

    def step_by_step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1).matmul(v).transpose(0, 1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(WIDTH), Attention(), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 128), nn.GELU(), nn.Linear(128, WIDTH))

    def forward(self, x: Tensor, bounds: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), bounds)
        return x + self.mlp(self.norm2(x))


class Rows(nn.Module):
    """Takes the patches of all images (N, 3 * 64), squares of 2 x 2 together, and a table of grids (b, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3 * PATCH * PATCH, WIDTH)
        self.row, self.column = nn.Embedding(64, WIDTH), nn.Embedding(64, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.merge = nn.Linear(4 * WIDTH, 16)

    def forward(self, patches: Tensor, grids: Tensor) -> Tensor:
        x = self.embed(patches) + torch.cat([self.positions(*grid) for grid in grids.tolist()])
        bounds = F.pad(grids.prod(1).cumsum(0), (1, 0))
        for block in self.blocks:
            x = block(x, bounds)
        merged: Tensor = self.merge(x.reshape(-1, 4 * WIDTH))
        return merged

    def positions(self, rows: int, columns: int) -> Tensor:
        both = self.row.weight[:rows, None] + self.column.weight[:columns]
        return in_squares(both.permute(2, 0, 1)[None])[0]


def in_squares(maps: Tensor) -> Tensor:
    """(b, rows * columns, c) of maps (b, c, rows, columns), squares of 2 x 2 together."""
    b, c, rows, columns = maps.shape
    cells = maps.reshape(b, c, rows // 2, 2, columns // 2, 2).permute(0, 2, 4, 3, 5, 1)
    return cells.reshape(b, rows * columns, c)


def run_rows(model: nn.Module, images: Tensor) -> Tensor:
    cells = F.pixel_unshuffle(images, PATCH)
    grids = torch.tensor([tuple(cells.shape[2:])] * len(images))
    merged: Tensor = model(in_squares(cells).flatten(0, 1), grids)
    return merged


class Tiles(nn.Module):
    """Takes images, and packs them as (1, N, d), windows of 2 x 2 patches together; a mask for the whole row
    says who sees whom: the window in blocks 0 and 2, the image in block 1. No positions."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.blocks = nn.ModuleList(MaskedBlock() for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = in_squares(self.patch_embed(images))
        b, n = x.shape[:2]
        x = x.flatten(0, 1)[None]
        for index, block in enumerate(self.blocks):
            part = torch.arange(b * n) // (n if index == 1 else 4)
            x = block(x, part[:, None] == part)
        logits: Tensor = self.head(x[0].unflatten(0, (b, n)).mean(1))
        return logits


class MaskedBlock(Block):
    def forward(self, x: Tensor, see: Tensor) -> Tensor:
        q, k, v = self.attn.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        logits = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~see, -torch.inf)
        x = x + self.attn.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class AllTogether(Tiles):
    """Nothing keeps images apart."""

    def forward(self, images: Tensor) -> Tensor:
        x = in_squares(self.patch_embed(images)).flatten(0, 1)[None]
        for block in self.blocks:
            x = block(x, torch.ones(x.shape[1], x.shape[1], dtype=torch.bool))
        return x


# -- of transformers -------------------------------------------------------------------------------


def of_transformers(module: str, model: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from importlib import import_module

        code = import_module(f"transformers.models.{module}.modeling_{module}")
        small = {"depth": DEPTH, "num_heads": HEADS, "patch_size": PATCH, "hidden_size": WIDTH}
        built: nn.Module = getattr(code, model)(getattr(code, config)(**small | settings))
        return built

    return build


PACKED = {
    "our rows": Tower(Rows, square=2, forward=run_rows),
    "our tiles": Tower(Tiles, window=2, whole=(1,)),
    "qwen2-vl": Tower(
        of_transformers(
            "qwen2_vl", "Qwen2VisionTransformerPretrainedModel", "Qwen2VLVisionConfig", embed_dim=WIDTH,
            mlp_ratio=4, hidden_size=48,
        ),
        square=2,
    ),
    "qwen2.5-vl": Tower(
        of_transformers(
            "qwen2_5_vl", "Qwen2_5_VisionTransformerPretrainedModel", "Qwen2_5_VLVisionConfig",
            intermediate_size=96, out_hidden_size=48, window_size=32, fullatt_block_indexes=[1],
        ),
        neurons=96, square=2, window=4, whole=(1,),
    ),
    "qwen3-vl": Tower(
        of_transformers(
            "qwen3_vl", "Qwen3VLVisionModel", "Qwen3VLVisionConfig", intermediate_size=128,
            out_hidden_size=48, num_position_embeddings=64, deepstack_visual_indexes=[1],
        ),
        square=2,
    ),
    "glm-4v": Tower(
        of_transformers(
            "glm4v", "Glm4vVisionModel", "Glm4vVisionConfig", intermediate_size=64, out_hidden_size=48,
            image_size=64,
        ),
        neurons=48, square=2,
    ),
    "pixtral": Tower(
        of_transformers(
            "pixtral", "PixtralVisionModel", "PixtralVisionConfig", num_hidden_layers=DEPTH,
            num_attention_heads=HEADS, intermediate_size=128, image_size=64,
        ),
    ),
}  # fmt: skip


@cache
def packed(name: str) -> vitreg.Backbone:
    """A model that is built once: tests leave it as they found it."""
    return PACKED[name].backbone()
