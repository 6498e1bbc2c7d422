"""Masks of patches that show a picture: where a figure moves the sink to."""

from collections.abc import Iterable

import torch
from jaxtyping import Bool
from torch import Tensor

V = ("#.....#", "#.....#", ".#...#.", ".#...#.", "..#.#..", "..#.#..", "...#...")


def drawn(picture: Iterable[str], grid: tuple[int, int]) -> Bool[Tensor, "gh gw"]:
    """A mask with a picture in the middle of the grid (rows, columns): a line per row, "#" marks a patch."""
    lines = list(picture)
    height, width = len(lines), max(map(len, lines), default=0)
    top, left = (grid[0] - height) // 2, (grid[1] - width) // 2
    if top < 0 or left < 0:
        raise ValueError(f"a picture of {height}x{width} does not fit into {grid[0]}x{grid[1]} patches.")
    mask = torch.zeros(grid, dtype=torch.bool)
    for row, line in enumerate(lines):
        for column, mark in enumerate(line):
            mask[top + row, left + column] = mark == "#"
    return mask
