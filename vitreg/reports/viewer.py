"""The part of a report that one can handle: photos, norms and attention by layer, a threshold to drag.

    view([("as it is", report), ("with the fix", after)])      # HTML, which viewer.js brings to life
    page(title, parts, versions, script_for(parts))

Maps travel as numbers: 16 bits each on the scale that they are shown on, so that counts in the page are
those in Python. Colours and scales are those of the figures (plot_photos.py, plot_versions.py).
"""

import base64
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float

from vitreg.diagnosis.result import Diagnosis
from vitreg.diagnosis.wording import name_of_queries
from vitreg.plots.style import NORM_COLOURS, SHARE_COLOURS, number_ticks, percent_ticks, short_name
from vitreg.reports.html import data_block, photo_source, source, text

Versions = Sequence[tuple[str, Diagnosis]]

_VIEW = '<div id="view"'
_STEPS = 65535  # of 16 bits
_SMALLEST = 1e-6  # a norm of 0 has no logarithm
_NORMS = (
    "Drag the threshold: patches whose norm reaches it are outlined. Histogram, threshold and colours share "
    "one logarithmic axis. A tick below the slider is a layer with outliers."
)
_ATTENTION = (
    "How the attention from {source} is spread over the patches of the photo: the mean over heads, 100% in "
    "all. Outlined are the diagnosis' outliers{before}; once the threshold is moved, the patches it marks."
)


def script_for(parts: Iterable[str]) -> str:
    """The script that a page of these parts needs: none where no part is a view."""
    return source("viewer.js") if any(_VIEW in part for part in parts) else ""


def view(versions: Versions) -> str:
    """The photos of one model, in one version or before and after. Hidden until the script runs.

    Raises ValueError unless all versions were diagnosed on the same photos, with examples kept.
    """
    reports = [report for _, report in versions]
    names = {tuple(example.name for example in report.examples) for report in reports}
    if len(names) != 1 or names == {()}:
        raise ValueError("expected diagnoses of the same photos, each with examples, but found others.")
    return f"""{_VIEW} hidden>
{_thumbnails(reports[0])}
{_norms(versions)}
{_attention(versions)}
{data_block("view-data", _data(versions))}
</div>"""


# -- what is seen ----------------------------------------------------------------------------------


def _thumbnails(report: Diagnosis) -> str:
    shown = "".join(
        f'<label><input type="radio" name="photo" value="{i}">'
        f'<img src="{photo_source(example.photo)}" alt="{text(short_name(example.name))}"></label>\n'
        for i, example in enumerate(report.examples)
    )
    return f'<fieldset class="thumbs"><legend>Photo</legend>\n{shown}</fieldset>'


def _norms(versions: Versions) -> str:
    plots = "".join(_histogram(name if len(versions) > 1 else "") for name, _ in versions)
    plot = f"""<div class="plot">
<p class="row"><label for="threshold">Threshold</label>{_value("threshold")}
<button type="button" id="automatic">Set automatically</button></p>
<div class="histograms">{plots}<div class="mark"></div></div>
<input type="range" id="threshold">
{_SCALE}
<p class="axis">L2 norm</p>
<p class="note" id="automatic-note"></p>
</div>"""
    slider = _slider("layer", "After block", versions[0][1])
    return _stage("norms", "Norms of patch tokens", _NORMS, slider, plot, versions)


def _attention(versions: Versions) -> str:
    report = versions[0][1]
    source = name_of_queries(report.attention_queries)
    words = _ATTENTION.format(source=source, before=" in the model as it is" if len(versions) > 1 else "")
    slider = _slider("block", "Inside block", report)
    words_below = '<p class="axis">share of the attention</p><p class="note" id="even"></p>'
    scale = f'<div class="plot">{_SCALE}{words_below}</div>'
    return _stage("attention", "Attention", words, slider, scale, versions)


def _stage(kind: str, title: str, words: str, slider: str, plot: str, versions: Versions) -> str:
    """A slider of layers, the photo and a map of each version beside it, and `plot` below or beside."""
    many = len(versions) > 1
    panes = "".join(
        _pane(kind, i, name[:1].upper() + name[1:] if many else kind.capitalize())
        for i, (name, _) in enumerate(versions)
    )
    planted = any(report.planted for _, report in versions)
    label = " <strong>A phantom: its artifacts were planted.</strong>" if planted else ""
    return f"""<section class="stage {"many" if many else "one"}" data-kind="{kind}">
<h3>{text(title)}</h3>
<p class="note">{text(words)}{label}</p>
{slider}
<div class="panes">{_PHOTO}{panes}</div>
{plot}
</section>"""


def _histogram(name: str) -> str:
    label = f'<span class="name">{text(name[:1].upper() + name[1:])}</span>' if name else ""
    return f'<div>{label}<svg class="histogram" role="img"></svg></div>'


def _slider(name: str, label: str, report: Diagnosis) -> str:
    """A slider of layers, with a tick at each that has outliers."""
    ticks = "".join(f'<option value="{x.layer}"></option>' for x in report.layers if x.threshold is not None)
    last = len(report.layers) - 1
    return (
        f'<p class="row"><label for="{name}">{label}</label>'
        f'<input type="range" id="{name}" min="0" max="{last}" step="1" list="{name}-ticks">'
        f'{_value(name)}<datalist id="{name}-ticks">{ticks}</datalist></p>'
    )


def _value(name: str) -> str:
    """A slider's value in words; not read aloud, for the slider itself says its value."""
    return f'<output id="{name}-value" for="{name}" aria-live="off"></output>'


_SCALE = '<div class="scale"><canvas aria-hidden="true"></canvas><div class="ticks"></div></div>'
_PHOTO = (
    '<figure class="pane" data-kind="photo"><div class="frame"><svg aria-hidden="true"></svg>'
    "</div><figcaption><b></b> <output></output></figcaption></figure>"
)


def _pane(kind: str, version: int, name: str) -> str:
    return (
        f'<figure class="pane" data-kind="{kind}" data-version="{version}"><div class="frame">'
        '<canvas role="img"></canvas><svg aria-hidden="true"></svg></div>'
        f"<figcaption><b>{text(name)}</b> <output></output></figcaption></figure>"
    )


# -- what it shows ---------------------------------------------------------------------------------


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
    report = versions[0][1]
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
