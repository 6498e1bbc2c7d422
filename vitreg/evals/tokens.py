"""What single tokens know of the image's class: the papers' probe of one random token per image.

    print(evaluate(vit, "imagenette/"))

[R] and [T] find that an outlier patch knows nearly as much of the class as CLS does, a normal patch less:
outliers hold global information. After a fix, what was an outlier should know no more than its neighbours,
and what the fix carries beside the stream (test-time registers) as much as the outlier did.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from vitreg.data.datasets.classes import Labelled, splits
from vitreg.data.evenly_spaced import evenly_spaced
from vitreg.diagnosis.result import Diagnosis
from vitreg.errors import DataError, UnsupportedModelError
from vitreg.evals.outlier_masks import outlier_masks, outlier_notes, unfixed_diagnosis
from vitreg.evals.probes import Held, at_layer, fitted, logistic
from vitreg.evals.result import Metric, Result, concluded
from vitreg.features.config import Config
from vitreg.features.extraction import extract_features
from vitreg.features.observer import Observer
from vitreg.models.backbone import Backbone

FOLDS = 5  # of the training images one fold chooses the regularisation
_PROBES = logistic(1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True)
class TokensConfig(Config):
    """`layer` (0-based): tokens after that block; by default after the last."""

    layer: int | None = None


@dataclass(frozen=True, eq=False)
class _Tokens:
    """One token of each kind and image; a row of NaN where an image has none."""

    labels: Int[np.ndarray, " b"]
    kinds: dict[str, Float[np.ndarray, "b d"]]
    notes: tuple[str, ...]


def evaluate(vit: Backbone, data: str | Path, config: TokensConfig | None = None) -> Result:
    """Accuracy on val/ of logistic regressions on one token per image, trained on train/, one for each kind.

    Kinds: a random normal patch; a random outlier (of the unfixed model); the patch at the centre; CLS; a
    random trained register; a random test-time register, if the applied fix carries some. Images without an
    outlier are left out of its row, and the normal patches of the others get a row of their own, trained and
    tested on the same images. Raises DataError for too few data, or not in train/CLASS/ and val/CLASS/.
    """
    config = config or TokensConfig()
    sides = splits(data)
    if reason := _too_few(np.array(sides[0].labels)[evenly_spaced(len(sides[0].labels), config.limit)]):
        raise DataError(f"train/ of {data} has {reason}. A fifth of the photos chooses the regularisation.")
    report = unfixed_diagnosis(vit, sides[0].paths, config)
    train, val = (_tokens(vit, report, side, config) for side in sides)
    _add_fair_comparison(train, val)
    metrics, notes = {}, [*outlier_notes(report), *train.notes, *val.notes]
    for kind in train.kinds:
        known, asked = (~np.isnan(side.kinds[kind][:, 0]) for side in (train, val))
        if not known.any() or not asked.any():
            continue
        if reason := _too_few(train.labels[known]):
            notes.append(f"No row for {kind}: of photos with one, train/ has {reason}.")
            continue
        if not (known.all() and asked.all()):
            notes.append(
                f"{kind}: {(~known).sum()} of {len(known)} training photos and {(~asked).sum()} of"
                f" {len(asked)} val photos have none and are left out."
            )
        right = np.full(len(asked), np.nan)
        right[asked] = _right(train, val, kind, known, asked)
        metrics[kind] = Metric.mean(right, ".2%")
    return concluded(
        "tokens",
        vit,
        str(data),
        metrics,
        config,
        n=len(val.labels),
        notes=tuple(notes),
        photos=sides[1].paths,
    )


def _right(
    train: _Tokens, val: _Tokens, kind: str, known: Bool[np.ndarray, " b"], asked: Bool[np.ndarray, " v"]
) -> Bool[np.ndarray, " k"]:
    """Which of the val images that are asked about get their class."""
    labels = train.labels[known]
    probe = fitted(_PROBES, train.kinds[kind][known], labels, _one_fold(labels))
    right: np.ndarray = probe.predict(val.kinds[kind][asked]) == val.labels[asked]
    return right


def _one_fold(labels: Int[np.ndarray, " b"]) -> Held:
    """Rows to fit to and rows to score on, with all classes in both as far as there are enough."""
    rank = np.zeros(len(labels), dtype=int)  # of an image in its class
    for label in np.unique(labels):
        rank[labels == label] = np.random.default_rng(label).permutation((labels == label).sum())
    held = rank % FOLDS == FOLDS - 1
    return np.flatnonzero(~held), np.flatnonzero(held)


def _too_few(labels: Int[np.ndarray, " b"]) -> str | None:
    """Why no probe can be fitted."""
    counts = np.unique(labels, return_counts=True)[1]
    if len(counts) < 2:
        return f"{len(counts)} of the classes only"
    if counts.max() < FOLDS:
        return f"at most {counts.max()} photos of a class, but at least {FOLDS} are needed"
    return None


def _tokens(vit: Backbone, report: Diagnosis, photos: Labelled, config: TokensConfig) -> _Tokens:
    """One token of each kind of each photo: the same ones for the same seed, whatever fix is applied."""
    masks = outlier_masks(vit, report, photos.paths, config)
    wanted = {part: at_layer(vit, part, config.layer) for part in _parts(vit, config.layer)}
    found = extract_features(vit, photos.paths, list(wanted.values()), config)
    rows, columns = report.grid
    centre = rows // 2 * columns + columns // 2
    drawn = []
    for i, mask in enumerate(masks):
        parts = {part: found.of(name, i).numpy() for part, name in wanted.items()}
        patches, random = parts["patches"], np.random.default_rng((config.seed, i))
        kinds = {
            "normal patch": _one_of(patches, ~mask, random),
            "outlier": _one_of(patches, mask, random),
            "central patch": patches[centre],
        }
        if "cls" in parts:
            kinds["CLS"] = parts["cls"]
        for part, kind in (("registers", "trained register"), ("test_registers", "test-time register")):
            if part in parts:  # under splitting, NaN in places that no token took
                kinds[kind] = _one_of(parts[part], ~np.isnan(parts[part][:, 0]), random)
        drawn.append(kinds)
    labels, notes = np.array(photos.labels)[list(found.index)], (*photos.notes, *found.notes())
    return _Tokens(labels, {kind: np.stack([x[kind] for x in drawn]) for kind in drawn[0]}, notes)


def _one_of(
    tokens: Float[np.ndarray, "n d"], among: Bool[np.ndarray, " n"], random: np.random.Generator
) -> Float[np.ndarray, " d"]:
    """A random one of some tokens; NaN if there are none."""
    places = np.flatnonzero(among)
    return tokens[random.choice(places)] if len(places) else np.full_like(tokens[0], np.nan)


def _add_fair_comparison(*sides: _Tokens) -> None:
    """Where some images have no outlier, a row for the normal patches of those that have one."""
    without = [np.isnan(side.kinds["outlier"][:, :1]) for side in sides]
    if any(x.any() for x in without) and not all(x.all() for x in without):
        for side, missing in zip(sides, without, strict=True):
            side.kinds["normal patch, same photos"] = np.where(missing, np.nan, side.kinds["normal patch"])


def _parts(vit: Backbone, layer: int | None) -> list[str]:
    """The features that hold these tokens, as far as the model and the fixes on it have them."""
    parts = ["patches"]
    parts += ["cls"] if vit.layout.prefix else []
    parts += ["registers"] if vit.layout.registers else []
    if layer in (None, vit.anatomy.depth - 1) and _carries_registers(vit):  # known after the last block only
        parts.append("test_registers")
    return parts


def _carries_registers(vit: Backbone) -> bool:
    try:
        Observer(vit, ["test_registers"])(torch.zeros(1, 3, *vit.image_size))
    except UnsupportedModelError:
        return False
    return True
