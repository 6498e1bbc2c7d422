"""Where in the image a patch is, read from its token by a linear probe.

    print(evaluate(vit, "photos/"))

[R] finds position lost in outliers (top-1 41.7% of normal patches against 22.8%). That holds for outliers
anywhere. Where outliers keep to a few places, to be one says where one is, and the figure says nothing about
what tokens hold. So each measure comes with two controls: normal patches of the same places, and what a
guess from the outliers' places alone would get.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from vitreg.evals.probes import (
    PatchConfig,
    Patches,
    by_photo,
    drawn_patches,
    fitted,
    logistic,
    read_by_own_probe,
)
from vitreg.evals.result import Metric, Result, concluded
from vitreg.models.backbone import Backbone

BOUND = 5  # times an even spread: outliers at the commonest place, beyond which they are bound to places
_PROBES = logistic(1e-3, 1e-2, 1e-1)


@dataclass(frozen=True)
class PositionConfig(PatchConfig):
    """See PatchConfig."""


def evaluate(vit: Backbone, data: str | Path, config: PositionConfig | None = None) -> Result:
    """Top-1 accuracy and mean distance (in patches) of the place that softmax regression reads off a token.

    One probe is trained on the patches of three quarters of the photos, normal and outlier, and tested on
    those of the others, apart. Rows: normal patches; outliers; normal patches weighted to lie where outliers
    lie; outliers, guessed from nothing but where outliers usually lie; outliers, read by a probe trained
    on outliers alone. Raises DataError for too few photos.
    """
    config = config or PositionConfig()
    train, test, notes = drawn_patches(vit, data, config)
    metrics, more = measured(train, test)
    return concluded(
        "position", vit, str(data), metrics, config, n=len(test.paths), notes=notes + more, photos=test.paths
    )


def measured(train: Patches, test: Patches) -> tuple[dict[str, Metric], tuple[str, ...]]:
    """The metrics, and what a reader must know of them."""
    read = fitted(_PROBES, train.tokens, train.place, by_photo(train.photo)).predict(test.tokens)
    rows = {"normal patches": (read, read, ~test.outlier)}
    if test.outlier.any():
        rows["outliers"] = (read, read, test.outlier)
        rows["normal, same places"] = (read, read, where_outliers_are(test))
    if test.outlier.any() and train.outlier.any():
        commonest, middle = (np.full_like(read, guess) for guess in _guesses(train))
        rows["outliers, by usual place"] = (commonest, middle, test.outlier)
        own = read_by_own_probe(_PROBES, train, test, train.place)
        if own is not None:
            rows["outliers, own probe"] = (own, own, test.outlier)
    top1 = {
        f"top-1: {row}": test.mean(guess == test.place, weights, ".2%")
        for row, (guess, _, weights) in rows.items()
    }
    distance = {
        f"distance: {row}": test.mean(_distances(test.grid)[guess, test.place], weights, ".2f", False)
        for row, (_, guess, weights) in rows.items()
    }
    return top1 | distance, _notes(test, top1.get("top-1: outliers, by usual place"))


def where_outliers_are(test: Patches) -> Float[np.ndarray, " t"]:
    """Weights of normal patches that make them as frequent at each place as outliers are there."""
    patches = test.grid[0] * test.grid[1]
    outliers, normal = (np.bincount(test.place[x], minlength=patches) for x in (test.outlier, ~test.outlier))
    return np.where(test.outlier, 0.0, (outliers / np.maximum(normal, 1))[test.place])


def _guesses(train: Patches) -> tuple[int, int]:
    """The outliers' commonest place, and the place with the least mean distance to them."""
    frequency = np.bincount(train.place[train.outlier], minlength=train.grid[0] * train.grid[1])
    return int(frequency.argmax()), int((_distances(train.grid) @ frequency).argmin())


def _distances(grid: tuple[int, int]) -> Float[np.ndarray, "p p"]:
    """Between places, in patches."""
    row, column = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    return np.hypot(row[:, None] - row, column[:, None] - column)


def _notes(test: Patches, by_place: Metric | None) -> tuple[str, ...]:
    if by_place is None:
        return ()
    even = 1 / (test.grid[0] * test.grid[1])
    holds = f"the commonest place holds {by_place.value:.1%} of them (an even spread: {even:.1%})"
    alone = set(test.place[test.outlier]) - set(test.place[~test.outlier])
    lonely = np.isin(test.place, list(alone))[test.outlier].mean()
    where = f" {lonely:.0%} of them lie where no normal test patch does." if alone else ""
    low = by_place.estimate().low
    if low is None or low <= BOUND * even:
        return (f"Outliers are not bound to places: {holds}.{where}",)
    return (
        f"CONFOUNDED: outliers are bound to places: {holds}.{where} That a token is an outlier already says"
        " where it is, so its top-1 is no measure of what it holds. Compare it with that of normal patches of"
        " the same places, and see the reconstruction task.",
    )
