"""k nearest neighbours of frozen features: how well classes keep together.

print(evaluate(vit, "imagenette/"))
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from vitreg.data.datasets.classes import splits
from vitreg.errors import DataError
from vitreg.evals.result import Metric, Result, concluded
from vitreg.features.config import Config
from vitreg.features.pooling import OF_ONE_LAYER, pooled, poolings_of
from vitreg.models.backbone import Backbone

_AT_ONCE = 2**26  # similarities held at a time


@dataclass(frozen=True)
class KnnConfig(Config):
    """`k`: how many neighbours vote, one number or several; `temperature` of their votes.

    `poolings`: some of cls, mean, cls+mean, 4cls, 4cls+mean, registers, test_registers; () for those of one
    layer that the model has.
    """

    k: int | tuple[int, ...] = (10, 20, 100, 200)
    temperature: float = 0.07
    poolings: str | tuple[str, ...] = ()


def evaluate(vit: Backbone, data: str | Path, config: KnnConfig | None = None) -> Result:
    """Top-1 accuracy on val/ by the nearest training photos, as in DINO and DINOv2, for each pooling and k.

    Neighbours are by cosine, and each votes for its class with weight exp(cosine / temperature). `data` holds
    train/CLASS/... and val/CLASS/... A k larger than the training set is left out, with a note. Raises
    DataError if no k is left, UnsupportedModelError for a pooling that the model does not have.
    """
    config = config or KnnConfig()
    if not config.temperature > 0:
        raise DataError(f"temperature={config.temperature:g}: expected a number above 0, such as 0.07.")
    names = poolings_of(vit, config.poolings, OF_ONE_LAYER)
    sides = splits(data)
    train, val = (pooled(vit, photos, names, config) for photos in sides)
    sizes, notes = _possible(config.k, len(train.labels))
    metrics = {}
    for name in names:
        keys, queries = train.vectors(name).to(vit.device), val.vectors(name).to(vit.device)
        guesses = vote(queries, keys, train.labels.to(vit.device), sizes, config.temperature)
        for k, guess in guesses.items():
            metrics[f"{name} k={k}"] = Metric.mean(guess.cpu() == val.labels, ".2%")
    return concluded(
        "knn",
        vit,
        str(data),
        metrics,
        config,
        notes=(*train.notes, *val.notes, *notes),
        photos=sides[1].paths,
    )


def _possible(k: int | tuple[int, ...], photos: int) -> tuple[list[int], list[str]]:
    """The numbers of neighbours that so many training photos allow, and what is to be said of the others."""
    asked = sorted({k} if isinstance(k, int) else set(k))
    if not asked or asked[0] < 1:
        raise DataError(f"k={k}: expected numbers of neighbours from 1 on.")
    sizes = [size for size in asked if size <= photos]
    if not sizes:
        raise DataError(f"there are {photos} training photos, fewer than k={asked[0]}. Use --set k={photos}.")
    left_out = ", ".join(str(size) for size in asked[len(sizes) :])
    return sizes, [f"k={left_out} left out: there are only {photos} training photos"] if left_out else []


def vote(
    queries: Float[Tensor, "m d"],
    keys: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    sizes: Sequence[int],
    temperature: float = 0.07,
) -> dict[int, Int[Tensor, " m"]]:
    """The class of each query for each number of neighbours.

    One search serves all numbers, on whatever device the features are; scikit-learn's classifier, which
    gives the same classes, would search again for each.
    """
    queries, keys = F.normalize(queries, dim=1), F.normalize(keys, dim=1)
    classes = int(labels.max()) + 1
    guesses: dict[int, list[Tensor]] = {size: [] for size in sizes}
    for chunk in queries.split(max(_AT_ONCE // len(keys), 1)):
        cosines, nearest = (chunk @ keys.T).topk(max(sizes), dim=1)
        for size in sizes:
            weights = (cosines[:, :size] / temperature).softmax(1)  # scaled per query: it overflows nowhere
            votes = weights.new_zeros(len(chunk), classes)
            votes.scatter_add_(1, labels[nearest[:, :size]], weights)
            guesses[size].append(votes.argmax(1))
    return {size: torch.cat(parts) for size, parts in guesses.items()}
