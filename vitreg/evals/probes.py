"""Linear probes of single patches: which patches of which photos, how probes are fitted, means over patches.

train, test = drawn_patches(vit, "photos/", config)
probe = fitted(logistic(1e-2, 1e-1), train.tokens, train.place, by_photo(train.photo))
hits = probe.predict(test.tokens) == test.place
test.mean(hits, test.outlier)          # top-1 on outlier patches, as a Metric over photos
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupShuffleSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from vitreg.data.listing import photos_in
from vitreg.errors import DataError
from vitreg.evals.outlier_masks import outlier_masks, outlier_notes, unfixed_diagnosis
from vitreg.evals.result import Metric, ratio
from vitreg.features.config import Config
from vitreg.features.extraction import extract_features
from vitreg.models.backbone import Backbone

Held = tuple[Int[np.ndarray, " fit"], Int[np.ndarray, " held"]]  # rows to fit to, rows to score on
FEWEST = 20  # photos to make anything of
TESTED = 4  # of so many photos one is tested on


# -- fitting ---------------------------------------------------------------------------------------


def fitted(
    estimators: Sequence[Any], x: Float[np.ndarray, "t d"], y: Shaped[np.ndarray, "t *y"], held: Held
) -> Any:
    """The scikit-learn estimator that scores best on the held-out rows, fitted to all rows.

    Features are standardised. Of equals the first is taken.
    """
    fit, score = held
    probes = [make_pipeline(StandardScaler(), estimator) for estimator in estimators]
    with warnings.catch_warnings():
        # A probe that stopped before it converged is a probe all the same, and is chosen by its score.
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", "The number of unique classes")  # places are many
        scores = [clone(probe).fit(x[fit], y[fit]).score(x[score], y[score]) for probe in probes]
        return probes[int(np.argmax(scores))].fit(x, y)


def logistic(*inverse_strengths: float) -> list[LogisticRegression]:
    """Softmax regressions fitted by L-BFGS, the most regularised first."""
    return [LogisticRegression(C=c, max_iter=300) for c in sorted(inverse_strengths)]


def by_photo(photo: Int[np.ndarray, " t"], seed: int = 0) -> Held:
    """Rows of four fifths of the photos, and those of the others."""
    splitter = GroupShuffleSplit(1, test_size=0.2, random_state=seed)
    fit, score = next(splitter.split(photo, groups=photo))
    return fit, score


# -- patches ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PatchConfig(Config):
    """`patches` drawn of each photo to train on, four times as many to test on (of a quarter as many photos),
    beside all outliers. `layer` (0-based): tokens after that block; by default after the last."""

    patches: int = 64
    layer: int | None = None


@dataclass(frozen=True, eq=False)
class Patches:
    """Tokens of t patches: their places in the grid (row-major), and which of the photos they are of."""

    tokens: Float[np.ndarray, "t d"]
    place: Int[np.ndarray, " t"]
    photo: Int[np.ndarray, " t"]
    outlier: Bool[np.ndarray, " t"]
    paths: tuple[Path, ...]
    grid: tuple[int, int]

    def mean(
        self,
        values: Shaped[np.ndarray, " t"],
        weights: Shaped[np.ndarray, " t"],
        form: str = ".4g",
        higher_is_better: bool = True,
        per: Float[np.ndarray, " t"] | None = None,
    ) -> Metric:
        """A weighted mean over all patches (not of photos' means), divided by that of `per`."""
        below = weights if per is None else weights * per
        sums = [np.bincount(self.photo, column, len(self.paths)) for column in (weights * values, below)]
        return Metric(np.stack(sums, 1), form, higher_is_better, ratio)


def drawn_patches(
    vit: Backbone, data: str | Path, config: PatchConfig, marking: Backbone | None = None
) -> tuple[Patches, Patches, tuple[str, ...]]:
    """Patches of a folder's photos to train on and, of others, to test on; and what to know of them.

    The training patches are drawn evenly, so that outliers are as rare as they are; of the test photos all
    outliers are taken. The draw depends on the seed and on no fix. Outliers are those of `marking` without
    its fixes (default: of `vit`). Raises DataError for too few photos or a layer that is not there.
    """
    paths = photos_in(Path(data))
    if (count := min(len(paths), config.limit or len(paths))) < FEWEST:
        raise DataError(
            f"found {count} photos in {data}, expected at least {FEWEST}: a quarter of them is tested on."
        )
    name = at_layer(vit, "patches", config.layer)
    report = unfixed_diagnosis(marking or vit, paths, config)
    masks = outlier_masks(marking or vit, report, paths, config)
    found = extract_features(vit, paths, [name], config)
    order = np.random.default_rng(config.seed).permutation(len(found))
    tested, trained = (side.tolist() for side in np.split(order, [len(found) // TESTED]))
    taken = {i: _taken(masks[i], config.patches, i, config.seed) for i in trained}
    taken |= {i: _taken(masks[i], TESTED * config.patches, i, config.seed) | masks[i] for i in tested}
    train, test = (
        Patches(
            tokens=np.concatenate([found.of(name, i).numpy()[taken[i]] for i in side]),
            place=np.concatenate([np.flatnonzero(taken[i]) for i in side]),
            photo=np.concatenate([np.full(taken[i].sum(), row) for row, i in enumerate(side)]),
            outlier=np.concatenate([masks[i][taken[i]] for i in side]),
            paths=tuple(paths[found.index[i]] for i in side),
            grid=report.grid,
        )
        for side in (trained, tested)
    )
    drawn = (
        f"Trained on {len(train.place)} patches of {len(trained)} photos ({train.outlier.sum()} outliers),"
        f" tested on {len(test.place)} of {len(tested)} others ({test.outlier.sum()} outliers)."
    )
    return train, test, (drawn, *outlier_notes(report), *found.notes())


def _taken(mask: Bool[np.ndarray, " p"], count: int, photo: int, seed: int) -> Bool[np.ndarray, " p"]:
    """So many patches of one photo, whatever their kind."""
    taken = np.zeros_like(mask)
    taken[np.random.default_rng((seed, photo)).permutation(len(mask))[:count]] = True
    return taken


def at_layer(vit: Backbone, feature: str, layer: int | None) -> str:
    """The name of a feature after a block, by default the last. Raises DataError for none such."""
    if layer is None:
        return feature
    if not 0 <= layer < vit.anatomy.depth:
        raise DataError(f"layer={layer}: the blocks of {vit.name} are 0 to {vit.anatomy.depth - 1}.")
    return f"{feature}@{layer}"


def read_by_own_probe(
    estimators: Sequence[Any], train: Patches, test: Patches, y: Shaped[np.ndarray, "t *y"]
) -> Shaped[np.ndarray, "s *y"] | None:
    """What a probe fitted to outliers alone reads from all test tokens; None where too few are known.

    A probe of all patches is one of normal patches, for outliers are few: that it fails on outliers may mean
    that they do not hold what it reads, or that they hold it in another form. This tells the two apart.
    """
    rows = train.outlier
    if len(np.unique(train.photo[rows])) < FEWEST:
        return None
    held = by_photo(train.photo[rows])
    if len(np.unique(y[rows][held[0]], axis=0)) < 2:
        return None
    return fitted(estimators, train.tokens[rows], y[rows], held).predict(test.tokens)
