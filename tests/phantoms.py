"""A small planted model and photos on disk, for evaluations whose outliers must be known."""

from pathlib import Path

import numpy as np
import PIL.Image
from catalog import CATALOG
from torch import Tensor

import vitreg
from vitreg.fixes import TestTimeRegisters, TokenSplitting
from vitreg.images import demo_photos
from vitreg.neurons import find_register_neurons


def save_crops(folder: Path, count: int, seed: int = 0) -> Path:
    """Random crops of the bundled photos, 32 x 40 pixels."""
    random = np.random.default_rng(seed)
    photos = [PIL.Image.open(path).convert("RGB") for path in demo_photos()]
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
