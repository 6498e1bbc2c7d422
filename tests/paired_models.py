"""Vision Transformers whose blocks are pairs [attention, MLP] in a list, called one by one by a loop.

Written after the pattern of public repositories, none copied.
"""

import copy
from typing import Any

import torch
from authors_models import DEPTH, GRID, NEURONS, TOKENS, WIDTH, Attention
from torch import Tensor, nn


class Before(nn.Module):
    """A part behind its own norm."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.norm, self.part = nn.LayerNorm(WIDTH), part

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.part(self.norm(x))
        return y


class Feeding(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, NEURONS), nn.GELU(), nn.Dropout(0.1),
            nn.Linear(NEURONS, WIDTH),
        )  # fmt: skip


class Joined(nn.ModuleList):
    def forward(self, x: Tensor) -> Tensor:
        for part in self:
            x = x + part(x)
        return x


class Paired(nn.Module):
    """`how` is what the loop does with a pair."""

    def __init__(self, attention: Any = Attention, how: str = "added") -> None:
        super().__init__()
        self.how, self.image_size = how, (GRID[0] * 8, GRID[1] * 8)
        self.patch = nn.Conv2d(3, WIDTH, 8, 8)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.zeros(1, TOKENS, WIDTH))
        pairs = (nn.ModuleList([Before(attention()), Feeding()]) for _ in range(DEPTH))
        self.layers = nn.ModuleList(pairs)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def joined(self) -> "Paired":
        """The same model with blocks that are called as such."""
        twin = copy.deepcopy(self)
        twin.how = "joined"
        twin.layers = nn.ModuleList(Joined(pair._modules.values()) for pair in twin.layers._modules.values())
        return twin

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], 1) + self.positions
        if self.how == "joined":
            for block in self.layers:
                x = block(x)
        elif self.how == "by number":
            for i in range(len(self.layers)):
                x = x + self.layers[i][0](x)
                x = x + self.layers[i][1](x)
        else:
            for attention, mlp in self.layers:
                x = attention(x) + x if self.how == "added" else attention(x) * 0.5 + x
                x = mlp(x) + x
        logits: Tensor = self.head(self.norm(x)[:, 0])
        return logits
