"""The probe of single tokens: which token of which photo, fair rows, clear refusals, the papers' claim."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from catalog import CATALOG
from phantoms import Planted, save_crops

import vitreg
from vitreg.errors import DataError
from vitreg.evals import evaluate, tokens
from vitreg.evals.outliers import outlier_masks, unfixed_diagnosis
from vitreg.evals.tokens import TokensConfig
from vitreg.evals.datasets.classes import splits

COLOURS = ("dark", "light")


def save_classes(root: Path, train: int, val: int) -> Path:
    """Crops of the bundled photos, by brightness: dark/ and light/ in train/ and val/."""
    crops = sorted(save_crops(root / "crops", 2 * (train + val)).iterdir(), key=brightness)
    half = len(crops) // 2
    for name, photos in zip(COLOURS, (crops[:half], crops[half:]), strict=True):
        for i, photo in enumerate(photos):
            folder = root / ("train" if i % (train + val) < train else "val") / name
            folder.mkdir(parents=True, exist_ok=True)
            shutil.move(photo, folder / photo.name)
    (root / "crops").rmdir()
    return root


def brightness(path: Path) -> float:
    import PIL.Image

    return float(np.asarray(PIL.Image.open(path).convert("L")).mean())
