"""Depth with a linear head on patch tokens: RMSE, delta1 and the scale-invariant log error.

print(evaluate(vit, "nyu/", DepthConfig(layers=4)))

The protocol is DINOv2's (Oquab et al. 2023): each patch token with the CLS token after it, a linear head with
256 outputs for as many uniform bins of depth, and as the prediction the mean of the bins under the outputs,
normalised linearly (AdaBins, Bhat et al. 2021). Here without augmentation and without a loss on gradients.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vitreg.data.datasets.depth_pairs import DepthPairs, train_and_val
from vitreg.errors import DataError
from vitreg.evals.dense_head import (
    EXAMPLES,
    DenseConfig,
    Frame,
    Tokens,
    former_outliers,
    predictions,
    readable,
    split_notes,
    splits_of,
)
from vitreg.evals.result import Metric, Result, concluded, ratio
from vitreg.models.backbone import Backbone
from vitreg.plots.dense import depth_figure

Unit = Literal["mm", "m", "unknown"]
_UNKNOWN = (
    "The unit of depth is unknown: each map is divided by its median, and a prediction scaled to the photo's"
    " median, so RMSE has no meaning and is left out."
)


@dataclass(frozen=True)
class DepthConfig(DenseConfig):
    """`unit` of the stored depths (default: "mm" for NYUd, else "unknown"); `depth_scale`: stored values in a
    metre, if it is neither. `only`: photos with this text in their names. `layers` are evenly spaced.

    `bins` are uniform between `min_depth` and `max_depth`; depths beyond them are left out. In metres, or in
    medians of the photo. Default: 0.001 and 10 for NYUd, else the range of the training photos.
    """

    batch: int = 4
    unit: Unit | None = None
    depth_scale: float | None = None
    only: str = ""
    bins: int = 256
    min_depth: float | None = None
    max_depth: float | None = None


def evaluate(vit: Backbone, data: str | Path, config: DepthConfig | None = None) -> Result:
    """Train a head on the training photos and measure it on the others, in their own size.

    Metrics are means over photos. Data without a split are cross-validated, whole scenes at a time. Where the
    model without its fix has outlier patches, the last metric is delta1 of these patches' own depths, before
    overlapping windows are averaged. Raises DataError for depth maps that do not fit.
    """
    config = config or DepthConfig()
    train, val = train_and_val(data, config.only, config.limit)
    pairs = val.after(train)
    splits = splits_of(len(train or ()), pairs.scenes, config.folds)
    maps, frame = Maps.of(pairs, config), Frame.of(vit, config.side)
    tokens = Tokens.of(vit, pairs.paths, frame, spaced_layers(vit, config.layers), config, cls=True)
    logs = {i: log_depths(frame.cut(maps[i])) for i in tokens.row}
    splits = readable(splits, tokens)
    tested = [i for _, test in splits for i in test]
    outliers = former_outliers(vit, pairs.paths, tested, frame, config)
    examples = tested[:: -(-len(tested) // EXAMPLES)]
    errors, of_constant, at_outliers, shown = [], [], [], []
    for split in splits:
        bins, constant = maps.bins(split[0], config.bins), mean_depth([logs[i] for i in split[0]])
        loss = partial(scale_invariant_loss, bins=bins)
        for i, outputs in predictions(tokens, logs, [split], loss, config.bins, config):
            truth, patches = maps[i], depth_of(outputs, bins)
            guess = frame.join(patches[..., None], *truth.shape)[0].numpy()
            scale = 1.0 if maps.per_metre else median_ratio(guess, truth)
            errors.append(photo_errors(scale * guess, truth))
            flat = np.full_like(truth, constant if maps.per_metre else np.median(truth[truth > 0]))
            of_constant.append(photo_errors(flat, truth))
            if outliers:
                near = within(scale * patches[..., None], frame.cut(truth))[outliers[i]]
                at_outliers.append(near.sum(0))
            if i in examples:
                shown.append((pairs.paths[i], truth, scale * guess))
    known = maps.per_metre is not None
    metrics = depth_metrics(np.array(errors), known)
    if outliers:
        metrics["delta1, former outliers"] = Metric(torch.stack(at_outliers).numpy(), ".2%", reduce=ratio)
    baseline = constant_note(depth_metrics(np.array(of_constant), known))
    notes = (
        *pairs.notes,
        *tokens.found.notes(),
        *split_notes(splits, pairs.scenes),
        baseline,
        *[_UNKNOWN][: not known],
    )
    picture = partial(depth_figure, shown, "m" if known else "medians")
    return concluded(
        "depth", vit, pairs.root, metrics, config, notes=notes, picture=picture, photos=pairs.paths
    )


def spaced_layers(vit: Backbone, count: int) -> list[int]:
    """So many layers, evenly spaced, the last of them the model's: 2, 5, 8, 11 of 12."""
    return [vit.anatomy.depth * (k + 1) // count - 1 for k in range(count)]


@dataclass(frozen=True)
class Maps:
    """Depth maps in the unit in which they are learned: metres, or the photo's own median (None)."""

    pairs: DepthPairs
    per_metre: float | None
    low: float
    high: float

    @staticmethod
    def of(pairs: DepthPairs, config: DepthConfig) -> "Maps":
        is_nyu = pairs.layout == "nyu"
        unit = config.unit or ("mm" if is_nyu else "unknown")
        per_metre = config.depth_scale or {"mm": 1000.0, "m": 1.0, "unknown": None}[unit]
        low, high = (1e-3, 10.0) if is_nyu else (0.0, np.inf)
        low, high = (
            default if given is None else given
            for given, default in ((config.min_depth, low), (config.max_depth, high))
        )
        return Maps(pairs, per_metre, low, high)

    def __getitem__(self, i: int) -> Float[np.ndarray, "h w"]:
        """0 where there is no value. Raises DataError if there is none in range."""
        stored = self.pairs.depth(i)
        values = stored / (self.per_metre or np.median(stored[stored > 0]))
        values = np.where((values >= self.low) & (values <= self.high), values, 0).astype(np.float32)
        if not values.any():
            raise DataError(
                f"{self.pairs.depths[i]} has no valid pixel between {self.low:g} and {self.high:g}"
                f" {'m' if self.per_metre else 'medians'}. Set unit, min_depth or max_depth."
            )
        return values

    def bins(self, chosen: list[int], count: int) -> Float[Tensor, " bins"]:
        """Uniform from the least depth to the greatest: as set, or in the chosen photos."""
        low, high = self.low, self.high
        if low == 0 or high == np.inf:
            values = [values[values > 0] for values in map(self.__getitem__, chosen)]
            low = low or float(min(x.min() for x in values))
            high = min(high, float(max(x.max() for x in values)))
        return torch.linspace(low, high, count)


# -- the head's outputs ------------------------------------------------------------------------------


def depth_of(outputs: Float[Tensor, "*p bins"], bins: Float[Tensor, " bins"]) -> Float[Tensor, "*p"]:
    """The mean of the bins, weighted with the positive part of the outputs, and a little more."""
    weights = outputs.relu() + 0.1
    return (weights @ bins.to(weights)) / weights.sum(-1)


def log_depths(cells: Float[Tensor, "w p pixels"]) -> Float[Tensor, "w p 2"]:
    """Of each patch: how many of its pixels have a depth, and the mean of their logarithms."""
    known = cells > 0
    count = known.sum(2)
    logs = torch.where(known, cells, 1).log().sum(2)
    return torch.stack([count, logs / count.clamp(min=1)], 2)


def mean_depth(logs: Sequence[Float[Tensor, "_ _ 2"]]) -> float:
    """The geometric mean over the pixels of some photos."""
    counts, means = torch.cat([log.flatten(0, 1) for log in logs]).T
    return float(((counts * means).sum() / counts.sum()).exp())


def scale_invariant_loss(
    outputs: Float[Tensor, "t bins"], logs: Float[Tensor, "t 2"], bins: Float[Tensor, " bins"]
) -> Float[Tensor, ""]:
    """Eigen et al. 2014, over all pixels with the weight 0.85: mean(e^2) - 0.85 mean(e)^2, e = the error of
    log depth. Left out is what no output changes: the variance of log depth inside patches."""
    counts, means = logs.T
    error = depth_of(outputs, bins).log() - means
    share = counts / counts.sum().clamp(min=1)
    return (share * error**2).sum() - 0.85 * (share * error).sum() ** 2


# -- metrics -----------------------------------------------------------------------------------------


def median_ratio(guess: Float[np.ndarray, "h w"], truth: Float[np.ndarray, "h w"]) -> float:
    """What to multiply a prediction with, so that it has the photo's median (Zhou et al. 2017)."""
    known = truth > 0
    return float(np.median(truth[known]) / np.median(guess[known]))


def photo_errors(
    guess: Float[np.ndarray, "h w"], truth: Float[np.ndarray, "h w"]
) -> tuple[float, float, float]:
    """RMSE, delta1 (the share of pixels within a factor of 1.25) and SILog (the deviation of the error of log
    depth, times 100, which no scaling changes) of one photo, where the truth is known."""
    guess, truth = guess[truth > 0].astype(float), truth[truth > 0].astype(float)
    error = np.log(guess / truth)
    near = float((np.abs(error) < np.log(1.25)).mean())
    return float(np.sqrt(((guess - truth) ** 2).mean())), near, 100 * float(error.std())


def within(patches: Float[Tensor, "w p 1"], cells: Float[Tensor, "w p pixels"]) -> Float[Tensor, "w p 2"]:
    """Of each patch: its pixels within a factor of 1.25 of the patch's depth, and those with a depth."""
    known = cells > 0
    error = (patches / torch.where(known, cells, 1)).log().abs()
    near = (error < np.log(1.25)) & known
    return torch.stack([near.sum(2), known.sum(2)], 2).double()


def depth_metrics(errors: Float[np.ndarray, "b 3"], unit_is_known: bool) -> dict[str, Metric]:
    """The mean of each over photos; without RMSE where the unit is unknown."""
    rmse, near, silog = errors.T
    scaled = {} if unit_is_known else {"delta1, scaled to the median": Metric.mean(near, ".2%")}
    known = {"RMSE, m": Metric.mean(rmse, ".3f", False), "delta1": Metric.mean(near, ".2%")}
    return (known if unit_is_known else scaled) | {"SILog": Metric.mean(silog, ".2f", False)}


def constant_note(metrics: dict[str, Metric]) -> str:
    """What a head must beat to have learnt anything."""
    figures = ", ".join(f"{name} {metric.value:{metric.format}}" for name, metric in metrics.items())
    return f"For comparison, one constant depth: {figures}."
