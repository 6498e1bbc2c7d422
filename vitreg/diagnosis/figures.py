"""A Diagnosis in pictures: functions from reports to matplotlib Figures, which neither show nor save them.

    from vitreg import plots
    plots.overview(report).savefig("overview.pdf")
    Path("overview.png").write_bytes(plots.png(plots.overview(report)))

Layers are 0-based: layer i is the residual stream after block i, before any final norm. Outlined patches
are the outliers by the diagnosis' own layer and threshold, in every map.
"""

import textwrap
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from vitreg.diagnosis.kinds import Finding
from vitreg.diagnosis.photo_figures import (
    draw_photo_rows,
    patch_maps,
    photo_grid,
    photo_rows_height,
    photo_strip,
)
from vitreg.diagnosis.result import Diagnosis
from vitreg.diagnosis.wording import name_of_queries
from vitreg.plots.style import (
    INK,
    NORMAL,
    OUTLIER,
    PALE,
    QUIET,
    house_style,
    label_bar,
    log_axis,
    mark_phantom,
    number,
    number_ticks,
    on_white,
    percent_ticks,
    png,
    safe,
    short_name,
    titled,
    whole_ticks,
)

__all__ = [
    "emergence",
    "headline",
    "layer_curves",
    "norm_histograms",
    "overview",
    "photo_grid",
    "photo_strip",
    "png",
    "position_map",
]

NORM_LABEL = "L2 norm of patch tokens"
LAYER_LABEL = "layer (0-based)"


def headline(report: Diagnosis, most: int = 88) -> str:
    """Model and verdict in a line of at most that many letters. A phantom, whose artifacts were planted,
    is called one."""
    verdict = report.verdict + (" (a phantom: they were planted)" if report.planted else "")
    return f"{safe(short_name(report.model), most - len(verdict) - 2)}: {verdict}"


# -- norms -----------------------------------------------------------------------------------------


@house_style
def norm_histograms(report: Diagnosis) -> Figure:
    """All layers' norm histograms as rows of a heat map, and the detect layer's histogram below it."""
    height = 1.0 + 0.13 * min(max(len(report.layers), 10), 40)
    figure = Figure(figsize=(5.4, height + 2.3), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=[height, 2.0])
    _draw_norms_by_layer(above, report)
    _draw_histogram(below, report)
    mark_phantom(figure, report.planted)
    return figure


def _draw_norms_by_layer(ax: Axes, report: Diagnosis) -> None:
    counts, edges = report.histograms
    first, last = _occupied(counts)
    shown = np.ma.masked_equal(counts[:, first:last], 0)
    rows = np.arange(len(counts) + 1) - 0.5
    scale = LogNorm(1, max(float(counts.max()), 2))
    mesh = ax.pcolormesh(
        edges[first : last + 1], rows, shown, norm=scale, cmap=on_white("viridis"), rasterized=True
    )
    bar = ax.figure.colorbar(mesh, ax=ax, pad=0.02, aspect=30)
    label_bar(bar, number_ticks(1, scale.vmax or 2.0), "patch tokens")
    log_axis(ax.xaxis, *norm_range(report))
    _mark_rows(ax, report)
    titled(ax, "Norms in every layer", columns=2)
    ax.set(xlabel=NORM_LABEL, ylabel=LAYER_LABEL, ylim=(len(counts) - 0.5, -0.5))
    whole_ticks(ax.yaxis)


def _mark_rows(ax: Axes, report: Diagnosis) -> None:
    """In each layer's row a bar at the median and, where there is one, at the threshold."""
    medians = [layer.median_norm for layer in report.layers]
    rows = np.arange(len(medians))
    casing = [withStroke(linewidth=3, foreground="white")]
    ax.vlines(medians, rows - 0.36, rows + 0.36, color=INK, lw=1.4, label="median", path_effects=casing)
    split = [layer for layer in report.layers if layer.threshold is not None]
    if split:
        where, at = [x.threshold or 0.0 for x in split], np.array([x.layer for x in split])
        ax.vlines(where, at - 0.5, at + 0.5, color=OUTLIER, lw=1.8, label="threshold")


def _draw_histogram(ax: Axes, report: Diagnosis) -> None:
    """The detect layer's histogram; both axes logarithmic."""
    counts, edges = report.histograms
    first, last = _occupied(counts)
    row, edges = counts[report.detect_layer, first:last], edges[first : last + 1]
    beyond = edges[:-1] >= (report.threshold if report.threshold is not None else np.inf)
    for part, colour, name in ((~beyond, NORMAL, "normal"), (beyond, OUTLIER, "outliers")):
        if part.any():
            ax.stairs(np.where(part, row, 0), edges, fill=True, color=colour, label=name)
    median = report.layers[report.detect_layer].median_norm
    ax.axvline(median, color=INK, lw=1.2, ls=":", label=f"median {number(median)}")
    sigma = report.mean_plus_3_sigma
    ax.axvline(sigma, color=QUIET, lw=1.2, ls="--", label=f"mean + 3 sigma {number(sigma)}")
    if report.threshold is not None:
        ax.axvline(report.threshold, color=OUTLIER, lw=1.4, label=f"threshold {number(report.threshold)}")
    log_axis(ax.xaxis, *norm_range(report))
    log_axis(ax.yaxis, 0.6, max(row.max(), 10) * 1.5)
    note = "" if report.has_artifacts else ": no second population"
    ax.set(xlabel=NORM_LABEL, ylabel="patch tokens")
    titled(ax, f"Norms after block {report.detect_layer}{note}", columns=3)


def norm_range(report: Diagnosis) -> tuple[float, float]:
    """From the smallest norm to the largest, or to the papers' threshold where that lies beyond."""
    counts, edges = report.histograms
    first, last = _occupied(counts)
    return float(edges[first]), max(float(edges[last]), 1.05 * report.mean_plus_3_sigma)


def _occupied(counts: Float[np.ndarray, "l k"]) -> tuple[int, int]:
    """The range of bins that hold a token, one more on each side."""
    (bins,) = counts.sum(0).nonzero()
    return max(int(bins[0]) - 1, 0), min(int(bins[-1]) + 2, counts.shape[1])


# -- curves over layers ----------------------------------------------------------------------------


@house_style
def layer_curves(report: Diagnosis) -> Figure:
    """By layer: median, 99th percentile and largest norm; share of outliers; attention on them."""
    figure = Figure(figsize=(5.4, 6.4), layout="constrained")
    norms, fraction, attention = figure.subplots(3, 1, sharex=True, height_ratios=[1.5, 1, 1])
    _draw_norm_curves(norms, report, named=True)
    _draw_fraction(fraction, report)
    _draw_attention(attention, report)
    attention.set_xlabel(LAYER_LABEL)
    mark_phantom(figure, report.planted)
    return figure


def _draw_norm_curves(ax: Axes, report: Diagnosis, named: bool) -> None:
    curves = {
        "max": ([x.max_norm for x in report.layers], OUTLIER, "-"),
        "p99": ([x.p99_norm for x in report.layers], QUIET, "-"),
        "median": ([x.median_norm for x in report.layers], NORMAL, "-"),
    }
    for name, (values, colour, line) in curves.items():
        ax.plot(values, line, marker="o", color=colour, label=name)
    low, high = min(curves["median"][0]), max(curves["max"][0])
    log_axis(ax.yaxis, low / 1.1, high * (high / low) ** 0.2 * 1.1)
    titled(ax, "Norms by layer", columns=3)
    _mark_layers(ax, report, named)
    ax.set_ylabel(NORM_LABEL)


def _draw_fraction(ax: Axes, report: Diagnosis) -> None:
    fractions = [x.outlier_fraction for x in report.layers]
    ax.plot(fractions, "o-", color=OUTLIER)
    _share_axis(ax, max(fractions), "no outliers in any layer")
    _mark_layers(ax, report)
    ax.set_ylabel("outliers among\npatch tokens")
    titled(ax, "Share of outliers")


def _draw_attention(ax: Axes, report: Diagnosis) -> None:
    by_head = np.array([x.attention_by_head for x in report.layers])
    ax.plot(by_head, color=PALE, lw=0.8, label=["each head"] + [None] * (by_head.shape[1] - 1))
    ax.plot([x.attention_to_outliers for x in report.layers], "o-", color=OUTLIER, label="mean of heads")
    _share_axis(ax, float(by_head.max()), "no outliers to attend to")
    titled(ax, f"Attention on outliers (from {name_of_queries(report.attention_queries)})", columns=2)
    _mark_layers(ax, report)
    ax.set_ylabel("share of attention\nto patches")


def _share_axis(ax: Axes, most: float, if_none: str) -> None:
    """From 0 to a little more than `most`, in percent; the words `if_none` where all is 0."""
    ax.set_ylim(0, min(most * 1.25, 1.04) if most else 0.01)
    ax.set_yticks(*(percent_ticks(*ax.get_ylim()) if most else ([0], ["0%"])))
    if not most:
        text = ax.text(0.5, 0.5, if_none, transform=ax.transAxes, ha="center", va="center", color=QUIET)
        text.set_bbox({"facecolor": "white", "linewidth": 0})


def _mark_layers(ax: Axes, report: Diagnosis, named: bool = False) -> None:
    """Upright lines at the onset and detect layers (without artifacts: at the layer that came closest)."""
    detect, onset, last = report.detect_layer, report.onset_layer, len(report.layers) - 1
    if onset is None:
        marks = [(detect, "layer that came closest")]
    elif onset == detect:
        marks = [(detect, "onset and detect layer")]
    else:
        marks = [(onset, "onset"), (detect, "detect layer")]
    for i, (layer, name) in enumerate(marks):
        ax.axvline(layer, color=QUIET, lw=0.8, ls="--", zorder=0)
        if named:
            side: Literal["left", "right"] = "right" if layer > last / 2 else "left"
            label = ax.text(layer, 0.99 - 0.1 * i, f" {name} {layer} ", ha=side, va="top", fontsize=7.5)
            label.set(transform=ax.get_xaxis_transform(), color=QUIET)
    ax.set_xlim(-0.4, last + 0.4)
    whole_ticks(ax.xaxis)


# -- places ----------------------------------------------------------------------------------------


@house_style
def position_map(report: Diagnosis) -> Figure:
    """For each place on the grid, the share of images that have an outlier there."""
    rows, columns = report.grid
    figure = Figure(figsize=(5.4, min(max(3.75 * rows / columns, 1.6), 7.0) + 0.9), layout="constrained")
    title = f"How often each place is an outlier (after block {report.detect_layer})"
    _draw_positions(figure.subplots(), report, title)
    mark_phantom(figure, report.planted)
    return figure


@house_style
def kind_map(report: Diagnosis, finding: Finding) -> Figure:
    """For each place on the grid, the share of images that show an artifact of another kind there."""
    rows, columns = report.grid
    figure = Figure(figsize=(5.4, min(max(3.75 * rows / columns, 1.6), 7.0) + 0.9), layout="constrained")
    _draw_frequency(figure.subplots(), np.array(finding.positions), report.images, finding.title)
    mark_phantom(figure, report.planted)
    return figure


def _draw_positions(ax: Axes, report: Diagnosis, title: str) -> None:
    _draw_frequency(ax, np.array(report.position_frequency), report.images, title)


def _draw_frequency(ax: Axes, frequency: Float[np.ndarray, "gh gw"], images: int, title: str) -> None:
    most = float(frequency.max())
    top = most if 0 < most < 0.8 else 1.0
    image = ax.imshow(frequency, cmap="cividis", vmin=0, vmax=top, interpolation="nearest")
    bar = ax.figure.colorbar(image, cax=ax.inset_axes((1.03, 0, 0.045, 1)))
    label_bar(bar, percent_ticks(0, top), f"share of the {images:,} images")
    if not frequency.any():
        ax.text(0.5, 0.5, "no outliers at any place", transform=ax.transAxes, ha="center", color="white")
    whole_ticks(ax.xaxis)
    whole_ticks(ax.yaxis)
    ax.set(xlabel="grid column (0-based)", ylabel="grid row (0-based)")
    titled(ax, title)
    ax.spines[:].set_visible(False)
    ax.set_anchor("N")


# -- all of it -------------------------------------------------------------------------------------


@house_style
def overview(report: Diagnosis) -> Figure:
    """The diagnosis in one figure: photos with their maps, norms, outliers and attention by layer, places."""
    width, columns = 9.6, min(max(len(report.examples), 4), 6)
    reason = textwrap.wrap(safe(f"{report.reason}{_others(report)}", 600), 125)
    heights = [0.42 + 0.15 * len(reason), photo_rows_height(report, width, columns, 3), 3.5]
    figure = Figure(figsize=(width, sum(heights)), layout="constrained")
    top, photos, below = np.ravel(figure.subfigures(3, 1, height_ratios=heights, squeeze=False))
    top.text(0.008, 1 - 0.1 / heights[0], headline(report), va="top", fontsize=12, fontweight="bold")
    top.text(0.008, 1 - 0.36 / heights[0], "\n".join(reason), va="top", color=QUIET)
    maps = patch_maps(report, "both", None)
    draw_photo_rows(photos, report, report.examples[:columns], maps, columns, features=True)
    left, middle, right = np.ravel(below.subfigures(1, 3, width_ratios=[1.1, 1, 1.05], squeeze=False))
    _draw_norms_by_layer(left.subplots(), report)
    upper, lower = middle.subplots(2, 1, sharex=True)
    _draw_norm_curves(upper, report, named=False)
    _draw_shares(lower, report)
    lower.set_xlabel(LAYER_LABEL)
    _draw_positions(right.subplots(), report, "Outliers at each place")
    return figure


def _others(report: Diagnosis) -> str:
    """The other kinds of artifacts that the model has, in a sentence; nothing where there are none."""
    titles = "; ".join(finding.title.lower() for finding in report.other_artifacts)
    return f" Other artifacts: {titles}." if titles else ""


def _draw_shares(ax: Axes, report: Diagnosis) -> None:
    """How many tokens are outliers, and how much of the attention they get."""
    outliers = [x.outlier_fraction for x in report.layers]
    attention = [x.attention_to_outliers for x in report.layers]
    ax.plot(outliers, "o-", color=NORMAL, label="of patch tokens")
    ax.plot(attention, "o-", color=OUTLIER, label="of attention")
    _share_axis(ax, max(*outliers, *attention), "no outliers in any layer")
    titled(ax, "Share of outliers", columns=2)
    _mark_layers(ax, report)
    ax.set_ylabel("share")


# -- several models --------------------------------------------------------------------------------


@house_style
def emergence(reports: Sequence[tuple[str, Diagnosis]]) -> Figure:
    """Where outliers come up: their share by label (training step, model size), and by label and layer.

    Models of different depths share the relative depth, 0 after the first block's input and 1 at the end.
    """
    if not reports:
        raise ValueError("found no report, but expected at least one (label, Diagnosis).")
    figure = Figure(figsize=(min(max(5.4, 1.8 + 0.55 * len(reports)), 11.0), 5.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[1, 1.5])
    fractions = [report.outlier_fraction for _, report in reports]
    above.plot(fractions, "o-", color=OUTLIER)
    _share_axis(above, max(fractions), "no outliers in any model")
    above.set(ylabel="outliers among\npatch tokens")
    titled(above, "Share of outliers at each model's detect layer")
    _draw_depths(below, [report for _, report in reports])
    _label_models(below, reports)
    return figure


def _label_models(ax: Axes, reports: Sequence[tuple[str, Diagnosis]], most: int = 24) -> None:
    """The labels below the columns, or every second one, third one, ... if there are too many."""
    labels = [safe(label, 30) + ("\n(phantom)" if x.planted else "") for label, x in reports]
    places = range(0, len(labels), -(-len(labels) // most))
    crowded = len(labels) > 6 or max(map(len, labels)) > 9
    turned: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
    ax.set_xticks(places, [labels[i] for i in places], **turned)
    ax.set_xlim(-0.5, len(labels) - 0.5)


def _draw_depths(ax: Axes, reports: Sequence[Diagnosis]) -> None:
    """A column per model, a cell per layer, coloured by the share of outliers."""
    depths = {len(report.layers) for report in reports}
    top = max(layer.outlier_fraction for report in reports for layer in report.layers)
    scale, colours = Normalize(0, 1.02 * top or 0.01), on_white("viridis")
    for column, report in enumerate(reports):
        depth = len(report.layers)
        edges = np.arange(depth + 1) - 0.5 if len(depths) == 1 else np.linspace(0, 1, depth + 1)
        cells = np.ma.masked_equal([[layer.outlier_fraction] for layer in report.layers], 0)
        mesh = ax.pcolormesh([column - 0.46, column + 0.46], edges, cells, norm=scale, cmap=colours)
    ax.set_facecolor("#f3f4f6")
    bar = ax.figure.colorbar(mesh, ax=ax, pad=0.02)
    label_bar(bar, percent_ticks(0, scale.vmax or 1.0), "outliers among patch tokens")
    if len(depths) == 1:
        whole_ticks(ax.yaxis)
    ax.set(ylabel=LAYER_LABEL if len(depths) == 1 else "relative depth")
    ax.invert_yaxis()
    titled(ax, "Share of outliers in each layer (grey: none)")
