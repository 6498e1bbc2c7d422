"""Small planted models whose outliers are known: one with photos on disk, and a catalog of many.

for member in members(neurons=(1, 4, 16)):
    phantom, photos = member.plant(), member.crops()
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import product
from pathlib import Path

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from catalog import CATALOG
from torch import Tensor

import vitreg
from vitreg.data.images import demo_photos
from vitreg.fixes import TestTimeRegisters, TokenSplitting
from vitreg.phantoms.phantom import Activation
from vitreg.search.register_neurons import find_register_neurons

ARCHITECTURES = [
    "timm vit",
    "timm deit distilled",
    "timm deit3",
    "timm dinov2 registers",
    "timm dinov2 swiglu",
    "timm dinov3",
    "timm eva02",
    "timm siglip",
    "hf dinov2",
    "hf clip",
    "open_clip vit",
    "torchvision vit",
]


@dataclass(frozen=True)
class Member:
    """One phantom of the catalog: a random model of an architecture, and what is planted in it."""

    name: str
    seed: int = 0
    layer: int | tuple[int, ...] = 1
    neurons: int = 4
    activation: Activation = "switch"
    rate: float = 0.02
    norm: float = 15.0
    photos: int = 96

    def __str__(self) -> str:
        return f"{self.name}-{self.seed}-{self.layer}-{self.neurons}-{self.activation}-{self.norm:g}"

    def backbone(self) -> vitreg.Backbone:
        return _backbone(self.name, self.seed)

    def crops(self) -> Tensor:
        """The photos that it is planted with."""
        return _crops(self.name, self.seed, self.photos)

    def plant(self, listens: bool = True) -> vitreg.Phantom:
        return vitreg.plant(
            self.backbone(),
            self.crops(),
            self.layer,
            neurons=self.neurons,
            rate=self.rate,
            norm=self.norm,
            activation=self.activation,
            listens=listens,
            seed=self.seed,
        )


def members(
    *,
    layers: Sequence[int | tuple[int, ...]] = (1, 2, 1),
    neurons: Sequence[int] = (4,),
    activations: Sequence[Activation] = ("switch", "ramp"),
    norms: Sequence[float] = (15.0,),
    rate: float = 0.02,
    photos: int = 96,
) -> list[Member]:
    """12 architectures x 3 seeds x the numbers of neurons; activations, layers and norms take turns."""
    found = []
    for seed, (place, name) in product(range(3), enumerate(ARCHITECTURES)):
        for turn, count in enumerate(neurons, seed):
            layer, norm = layers[seed % len(layers)], norms[turn % len(norms)]
            activation = activations[(place + turn) % len(activations)]
            found.append(Member(name, seed, layer, count, activation, rate, norm, photos))
    return found


@lru_cache(maxsize=4)
def _backbone(name: str, seed: int) -> vitreg.Backbone:
    return CATALOG[name].backbone(seed)


@lru_cache(maxsize=4)
def _crops(name: str, seed: int, count: int) -> Tensor:
    return crops(_backbone(name, seed), count, seed)


@cache
def _photos() -> list[PIL.Image.Image]:
    return [PIL.Image.open(path).convert("RGB") for path in demo_photos()]


def crops(vit: vitreg.Backbone, count: int, seed: int) -> torch.Tensor:
    """Random crops of the bundled photos, (count, 3, h, w) in -1 to 1."""
    rng = np.random.default_rng(seed)
    height, width = vit.image_size
    photos = _photos()
    cut = []
    for index in range(count):
        photo = photos[index % len(photos)]
        scale = rng.uniform(1, min(photo.width / width, photo.height / height))
        w, h = int(width * scale), int(height * scale)
        x, y = rng.integers(0, photo.width - w + 1), rng.integers(0, photo.height - h + 1)
        cut.append(np.asarray(photo.crop((x, y, x + w, y + h)).resize((width, height))))
    return torch.from_numpy(np.stack(cut)).permute(0, 3, 1, 2) / 127.5 - 1


def save_crops(folder: Path, count: int, seed: int = 0) -> Path:
    """Random crops of the bundled photos, 32 x 40 pixels."""
    random = np.random.default_rng(seed)
    photos = _photos()
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        photo = photos[i % len(photos)]
        scale = random.uniform(1, min(photo.width / 40, photo.height / 32))
        width, height = int(40 * scale), int(32 * scale)
        x = random.integers(0, photo.width - width + 1)
        y = random.integers(0, photo.height - height + 1)
        photo.crop((x, y, x + width, y + height)).resize((40, 32)).save(folder / f"{i:03}.png")
    return folder


class Planted:
    """A phantom of a small random model (4 x 5 patches), and its fixes."""

    def __init__(self, folder: Path, name: str = "timm vit", rate: float = 0.05) -> None:
        self.clean = CATALOG[name].backbone()
        self.images: list[Tensor] = [batch.pixels for batch in vitreg.read_images(folder, self.clean)]
        self.phantom = vitreg.plant(self.clean, self.images, 1, rate=rate)
        self.vit = self.phantom.vit
        found = find_register_neurons(self.vit, self.images, vitreg.diagnose(self.vit, self.images))
        self.register = TestTimeRegisters(found)
        self.splitting = TokenSplitting.calibrate(self.vit, self.images, found)


def massive_vector(width: int, generator: torch.Generator) -> Tensor:
    """A unit vector in one of 32 dimensions: what a row of a random table held there cannot be told."""
    few = width // 32
    vector = torch.zeros(width)
    vector[torch.randperm(width, generator=generator)[:few]] = torch.randn(few, generator=generator)
    return F.normalize(vector, dim=0)
