"""From a photo to model pixels with the geometry known, for tasks whose answer lies in the image plane.

    prepare = Framing(normalisation_of(vit), side=448)
    pixels = prepare(photo)                          # (3, h, w), normalised as the model expects

The whole photo is kept: no crop hides what is to be segmented or found.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from vitreg.data.images import Preprocess
from vitreg.errors import ImageError
from vitreg.models.backbone import Backbone


@dataclass(frozen=True)
class Normalisation:
    """Pixels in 0..1 times `scale` plus `shift`, per channel."""

    scale: tuple[float, float, float]
    shift: tuple[float, float, float]

    def __call__(self, image: Image.Image) -> Float[Tensor, "3 h w"]:
        pixels = torch.from_numpy(np.array(image.convert("RGB"), dtype=np.float32)).permute(2, 0, 1) / 255
        return pixels * torch.tensor(self.scale)[:, None, None] + torch.tensor(self.shift)[:, None, None]


def normalisation_of(vit: Backbone) -> Normalisation:
    """What a backbone's preprocess does to colours, measured on a black and a white picture."""
    if vit.preprocess is None:
        raise ImageError(f"{vit.name} was wrapped without a preprocess. Pass one to vitreg.wrap.")
    black, white = (_colour(vit.preprocess, level) for level in (0, 255))
    scale, shift = (white - black).tolist(), black.tolist()
    return Normalisation(tuple(scale), tuple(shift))


def _colour(preprocess: Preprocess, level: int) -> Float[Tensor, "3"]:
    return preprocess(Image.new("RGB", (256, 256), (level,) * 3)).float().mean((1, 2))


@dataclass(frozen=True)
class Framing:
    """A preprocess that keeps the whole photo.

    `size` (height, width) squeezes it to that; `side` makes its shorter side so long and keeps the ratio;
    neither leaves it as it is. `patch` (height, width) then pads with zeros at the right and the bottom to
    multiples of it, of which there are at most `most`: a photo with more is made smaller, its ratio kept.
    """

    normalise: Normalisation
    size: tuple[int, int] | None = None
    side: int | None = None
    patch: tuple[int, int] | None = None
    most: int | None = None

    def scaled_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of a photo of this size, before padding."""
        if self.size:
            return self.size
        if self.side:
            ratio = self.side / min(height, width)
            height, width = max(self.side, round(height * ratio)), max(self.side, round(width * ratio))
        return self._bounded(height, width)

    def _bounded(self, height: int, width: int) -> tuple[int, int]:
        if self.patch is None or self.most is None:
            return height, width
        patches = -(-height // self.patch[0]) * -(-width // self.patch[1])
        if patches <= self.most:
            return height, width
        shrink = math.sqrt(self.most / patches)
        rows, columns = (
            max(1, math.floor(length * shrink / patch))
            for length, patch in zip((height, width), self.patch, strict=True)
        )
        rows, columns = min(rows, self.most // columns or 1), min(columns, self.most // rows or 1)
        return rows * self.patch[0], columns * self.patch[1]

    def __call__(self, image: Image.Image) -> Float[Tensor, "3 h w"]:
        height, width = self.scaled_size(image.height, image.width)
        if (width, height) != image.size:
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        pixels = self.normalise(image)
        if self.patch:
            pixels = F.pad(pixels, (0, -width % self.patch[1], 0, -height % self.patch[0]))
        return pixels


@dataclass(frozen=True)
class Windows:
    """Windows of `size` (height, width), `stride` pixels apart; the last of each row ends at the border."""

    size: tuple[int, int]
    stride: tuple[int, int]

    def corners(self, height: int, width: int) -> list[tuple[int, int]]:
        """(top, left) of each window, row by row."""
        tops, lefts = (
            _starts(length, size, stride)
            for length, size, stride in zip((height, width), self.size, self.stride, strict=True)
        )
        return [(top, left) for top in tops for left in lefts]

    def __call__(self, pixels: Float[Tensor, "3 _ _"]) -> Float[Tensor, "w 3 wh ww"]:
        h, w = self.size
        return torch.stack(
            [pixels[:, t : t + h, left : left + w] for t, left in self.corners(*pixels.shape[1:])]
        )


def _starts(length: int, size: int, stride: int) -> list[int]:
    if length < size:
        raise ValueError(f"found {length} pixels, but a window takes {size}.")
    return [*range(0, length - size, stride), length - size]
