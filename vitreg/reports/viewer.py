"""The part of a report that one can handle: photos, norms and attention by layer, a threshold to drag.

    view([("as it is", report), ("with the fix", after)])   # data for templates/view.html and viewer.js

Maps travel as numbers: 16 bits each on the scale that they are shown on, so that counts in the page are
those in Python. Colours and scales are those of the figures (diagnosis/photo_figures.py, version_figures.py).
"""

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float

from vitreg.diagnosis.photo_figures import feature_pictures
from vitreg.diagnosis.result import Diagnosis
from vitreg.diagnosis.wording import name_of_queries
from vitreg.plots.style import NORM_COLOURS, SHARE_COLOURS, number_ticks, percent_ticks, short_name
from vitreg.reports.html import photo_source

Versions = Sequence[tuple[str, Diagnosis]]

_STEPS = 65535  # of 16 bits
_SMALLEST = 1e-6  # a norm of 0 has no logarithm


@dataclass(frozen=True)
class View:
    """The photos of one model, in one version or before and after.

    `thumbnails`: each photo as a source of an <img>, and its name. `marked`: layers with outliers, of all
    up to `last`. `queries`: in words, whose attention is shown. `data`: what the script shows.
    """

    names: list[str]
    thumbnails: list[tuple[str, str]]
    last: int
    marked: list[int]
    queries: str
    planted: bool
    data: dict[str, Any]

    @property
    def many(self) -> bool:
        """Whether versions are to be told apart."""
        return len(self.names) > 1


def view(versions: Versions) -> View:
    """What one can handle of these versions of a model.

    Raises ValueError unless all versions were diagnosed on the same photos, with examples kept.
    """
    reports = [report for _, report in versions]
    photos = {tuple(example.name for example in report.examples) for report in reports}
    if len(photos) != 1 or photos == {()}:
        raise ValueError("expected diagnoses of the same photos, each with examples, but found others.")
    first = reports[0]
    return View(
        names=[name for name, _ in versions],
        thumbnails=[(photo_source(example.photo), short_name(example.name)) for example in first.examples],
        last=len(first.layers) - 1,
        marked=[x.layer for x in first.layers if x.threshold is not None],
        queries=name_of_queries(first.attention_queries),
        planted=any(report.planted for report in reports),
        data=_data(versions),
    )


@dataclass(frozen=True)
class _Maps:
    """One quantity of all versions, (v, e, l, gh, gw), with versions v and example photos e."""

    values: Float[np.ndarray, "v e l gh gw"]

    @staticmethod
    def of(versions: Versions, quantity: str) -> "_Maps":
        reports = [report for _, report in versions]
        return _Maps(np.array([[getattr(x, quantity) for x in report.examples] for report in reports]))

    def ranges(self) -> list[tuple[float, float]]:
        """Per layer the smallest and the largest value, over all photos and versions: one scale for all."""
        by_layer = np.moveaxis(self.values, 2, 0).reshape(self.values.shape[2], -1)
        return list(zip(by_layer.min(1).tolist(), by_layer.max(1).tolist(), strict=True))


def _data(versions: Versions) -> dict[str, Any]:
    """All numbers and colours that the script shows."""
    report = versions[0][1]
    features = feature_pictures([version for _, version in versions])
    norms, attention = _Maps.of(versions, "norms"), _Maps.of(versions, "attention")
    logs = np.log(np.maximum(norms.values, _SMALLEST))
    low, high = float(logs.min()), float(max(logs.max(), logs.min() + 0.01))
    top = float(attention.values.max()) or 1.0
    axis = (math.exp(low - 0.02 * (high - low)), math.exp(high + 0.02 * (high - low)))
    return {
        "grid": report.grid,
        "depth": len(report.layers),
        "detect": report.detect_layer,
        "detectWords": " (where outliers stand out most)" if report.has_artifacts else " (what came closest)",
        "axis": axis,
        "axisTicks": number_ticks(*axis),
        "normRange": (low, high),
        "shareTop": top,
        "layers": [
            _layer(scales, share[1]) for scales, share in zip(norms.ranges(), attention.ranges(), strict=True)
        ],
        "colours": {"norms": _colours(NORM_COLOURS), "attention": _colours(SHARE_COLOURS)},
        "versions": [
            {
                "name": name,
                "thresholds": [layer.threshold for layer in x.layers],
                "norms": _packed((logs[i] - low) / (high - low)),
                "attention": _packed(np.sqrt(attention.values[i] / top)),
                "features": base64.b64encode(np.stack(features[i]).tobytes()).decode(),
            }
            for i, (name, x) in enumerate(versions)
        ],
    }


def _layer(norms: tuple[float, float], share: float) -> dict[str, Any]:
    """The colour scales of one layer, as the figures have them: logarithmic, and the square root."""
    low = max(norms[0], _SMALLEST)
    top = share or 1.0
    return {"norms": (low, max(norms[1], low * 1.01)), "top": top, "topTicks": percent_ticks(0, top)}


def _packed(unit: Float[np.ndarray, "*shape"]) -> str:
    """Numbers from 0 to 1 in 16 bits each, little-endian."""
    return base64.b64encode(np.rint(unit * _STEPS).astype("<u2").tobytes()).decode()


def _colours(name: str) -> str:
    """A colour map as 256 colours of red, green and blue."""
    table = matplotlib.colormaps[name](np.arange(256), bytes=True)[:, :3]
    return base64.b64encode(np.ascontiguousarray(table).tobytes()).decode()
