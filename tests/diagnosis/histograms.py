"""Norms as they are drawn in tests, and their histogram."""

import numpy as np
import torch
from torch import Tensor

from vitreg.diagnosis.bins import NORMS
from vitreg.diagnosis.statistics import BINS


def histogram(norms: np.ndarray) -> Tensor:
    return torch.bincount(NORMS.index(torch.from_numpy(norms).flatten()), minlength=BINS)


def two_populations(
    ratio: float, share: float, median: float, seed: int, count: int = 20000, spread: float = 0.12
) -> tuple[np.ndarray, np.ndarray]:
    """Norms, and which of them are of the second population."""
    rng = np.random.default_rng(seed)
    high = np.arange(count) < int(share * count)
    return median * np.where(high, ratio, 1.0) * np.exp(rng.normal(0, spread, count)), high


def f1(mask: np.ndarray, truth: np.ndarray) -> float:
    return float(2 * (mask & truth).sum() / max(mask.sum() + truth.sum(), 1))


def best_f1(norms: np.ndarray, truth: np.ndarray) -> float:
    """Of the best possible threshold."""
    right = truth[np.argsort(-norms)].cumsum()
    return float((2 * right / (np.arange(1, len(right) + 1) + right[-1])).max())
