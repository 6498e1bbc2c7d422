"""What the layers before block 0 make of an image: maps, or patches in a row."""

from typing import NamedTuple

from torch import nn

MAKES_FEATURES = (nn.Conv2d, nn.Linear, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)


class Feature(NamedTuple):
    """What a layer made before block 0: the shape of its output, and the sides of the map that entered it."""

    name: str
    module: nn.Module
    shape: tuple[int, ...]
    entering: tuple[int, ...]  # (height, width), or (0, 0) where no map entered

    @property
    def grid(self) -> tuple[int, int]:
        """Of a map (b, c, rows, columns), or (b, rows, columns, c) of a linear layer."""
        rows = 1 if isinstance(self.module, nn.Linear) else 2
        return self.shape[rows], self.shape[rows + 1]
