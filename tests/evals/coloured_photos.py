"""Photos of classes that differ in colour, and the vectors of them by hand."""

import numpy as np
import PIL.Image
import torch
from catalog import CATALOG
from torch import Tensor

import vitreg

CLASSES = ("blue", "green", "red")


VIT = CATALOG["timm vit"].backbone()


def write_photos(folder, classes=CLASSES, count=6, tint=60.0, seed=0) -> None:
    """Noise that leans to another colour in each class: the less tint, the harder to tell apart."""
    random = np.random.default_rng(seed)
    for i, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for j in range(count):
            pixels = random.uniform(0, 160, (32, 40, 3))
            pixels[..., i % 3] += tint
            PIL.Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{j}.png")


def by_hand(vit: vitreg.Backbone, folder) -> tuple[Tensor, Tensor, Tensor]:
    """CLS (n, d) and mean patch (n, d) after timm's own final norm, and labels."""
    paths = sorted(folder.rglob("*.png"))
    pixels = torch.stack([vit.preprocess(PIL.Image.open(path)) for path in paths])
    with torch.no_grad():
        tokens = vit.model.forward_features(pixels)
    labels = torch.tensor([CLASSES.index(path.parent.name) for path in paths])
    return tokens[:, 0], tokens[:, vit.layout.patch_slice].mean(1), labels
