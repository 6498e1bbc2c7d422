"""One photo and what a model makes of it, as the explorer shows it: figures of single maps and histograms.

    photo_with_patches(photo, mask)              # nothing but the photo, its marked patches lit
    norm_histogram(norms, threshold=120.0)
    side_by_side({"before": a, "after": b}, "attention")

Maps are (gh, gw). Those in one figure share one colour scale.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, UInt8
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import Normal, withStroke
from matplotlib.ticker import MaxNLocator

from vitreg.plots.outlines import outline
from vitreg.plots.style import (
    INK,
    NORM_COLOURS,
    NORMAL,
    OUTLIER,
    SHARE_COLOURS,
    house_style,
    label_bar,
    log_axis,
    no_frame,
    number,
    number_ticks,
    percent_ticks,
    titled,
)

Quantity = Literal["norms", "attention", "activation", "similarity"]
Patch = tuple[int, int]  # row and column

_COLOURS = {
    "norms": NORM_COLOURS,
    "attention": SHARE_COLOURS,
    "activation": "cividis",
    "similarity": "cividis",
}
_LABELS = {
    "norms": "L2 norm of patch tokens (log)",
    "attention": "share of attention to patches (square root)",
    "activation": "activation",
    "similarity": "cosine of features",
}
_WIDTH = 4.0  # inches: of the photo, and of a map beside its colour bar


@house_style
def photo_with_patches(
    photo: UInt8[np.ndarray, "h w 3"], mask: Bool[np.ndarray, "gh gw"], chosen: Patch | None = None
) -> Figure:
    """The photo without any margin, so that a place in the figure is one in the photo.

    Marked patches are outlined and keep their light while the rest is dimmed; one chosen patch has a frame.
    """
    high, wide = photo.shape[:2]
    figure = Figure(figsize=(_WIDTH, _WIDTH * high / wide))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.imshow(photo, extent=(0, wide, high, 0))
    if mask.any():
        shade = np.where(mask, 0.0, 0.35)
        ax.imshow(np.zeros_like(shade), cmap="gray", alpha=shade, extent=(0, wide, high, 0))
    outline(ax, mask, (high, wide), _WIDTH)
    if chosen is not None:
        frame(ax, chosen, mask.shape, (high, wide))
    ax.set(xlim=(0, wide), ylim=(high, 0))
    no_frame(ax)
    return figure


@house_style
def norm_histogram(
    norms: Float[np.ndarray, "gh gw"],
    threshold: float | None,
    axis: tuple[float, float] | None = None,
    title: str = "Norms of this photo's patches",
) -> Figure:
    """How many patches have which norm, those at or above the threshold in another colour.

    `axis` is the range of the (logarithmic) norm axis, by default that of the norms; what lies outside of it
    is counted at its end.
    """
    low, high = axis or axis_of(norms)
    edges = np.geomspace(low, high, 61)
    figure = Figure(figsize=(1.6 * _WIDTH, 2.2), layout="constrained")
    ax = figure.subplots()
    beyond = norms >= (np.inf if threshold is None else threshold)
    shown = norms.clip(low, high)
    values = [shown[~beyond], shown[beyond]]
    ax.hist(values, edges.tolist(), stacked=True, color=[NORMAL, OUTLIER], label=["below", "above"])
    if threshold is not None:
        ax.axvline(threshold, color=OUTLIER, lw=1.4, label=f"threshold {number(threshold)}")
    median = float(np.median(norms))
    ax.axvline(median, color=INK, lw=1.2, ls=":", label=f"median {number(median)}")
    log_axis(ax.xaxis, low, high)
    ax.set(yscale="symlog", xlabel="L2 norm of patch tokens", ylabel="patches")
    ticks = [0, 1, 3, 10, 30, 100, 300, 1000, 3000]
    ax.set_yticks([tick for tick in ticks if tick <= norms.size], minor=False)
    ax.set_yticklabels([f"{tick:,}" for tick in ticks if tick <= norms.size])
    ax.minorticks_off()
    titled(ax, title, columns=4)
    return figure


def axis_of(norms: Float[np.ndarray, "*l gh gw"]) -> tuple[float, float]:
    """A range of the norm axis with room at both ends, for one layer or for all."""
    low = max(float(norms.min()), 1e-6)
    return low / 1.1, max(float(norms.max()), low * 1.5) * 1.1


@house_style
def side_by_side(
    maps: Mapping[str, Float[np.ndarray, "gh gw"]],
    kind: Quantity,
    mask: Bool[np.ndarray, "gh gw"] | None = None,
    chosen: Patch | None = None,
    shape: tuple[int, int] | None = None,
) -> Figure:
    """One or more maps of a photo under their titles, with one colour scale and bar.

    Patches of `mask` are outlined, a `chosen` patch is framed. `shape` is the photo's (height, width).
    Raises ValueError without a map.
    """
    if not maps:
        raise ValueError("found no map, expected at least one.")
    size = shape or next(iter(maps.values())).shape
    scale = _scale(kind, np.stack(list(maps.values())))
    figure, axes, width = _row_of_pictures(len(maps), size, below=0.9)
    for ax, (title, values) in zip(axes, maps.items(), strict=True):
        image = ax.imshow(
            values, cmap=_COLOURS[kind], norm=scale, interpolation="nearest", extent=(0, size[1], size[0], 0)
        )
        _mark(ax, title, mask, chosen, values.shape, size, width)
    bar = figure.colorbar(image, ax=list(axes), orientation="horizontal", aspect=30 * len(maps), pad=0.03)
    label_bar(bar, _ticks(kind, scale), _LABELS[kind])
    return figure


@house_style
def pictures_side_by_side(
    pictures: Mapping[str, UInt8[np.ndarray, "gh gw 3"]],
    mask: Bool[np.ndarray, "gh gw"] | None = None,
    chosen: Patch | None = None,
    shape: tuple[int, int] | None = None,
) -> Figure:
    """Patches as colours (features, say), one or more pictures under their titles; else as `side_by_side`."""
    if not pictures:
        raise ValueError("found no picture, expected at least one.")
    size = shape or next(iter(pictures.values())).shape[:2]
    figure, axes, width = _row_of_pictures(len(pictures), size, below=0.3)
    for ax, (title, colours) in zip(axes, pictures.items(), strict=True):
        ax.imshow(colours, interpolation="nearest", extent=(0, size[1], size[0], 0))
        _mark(ax, title, mask, chosen, colours.shape[:2], size, width)
    return figure


def _row_of_pictures(count: int, size: tuple[int, ...], below: float) -> tuple[Figure, np.ndarray, float]:
    """A figure, its axes in a row, and how wide (inches) each picture of a photo of `size` is."""
    high, wide = size
    width = _WIDTH if count == 1 else 0.9 * _WIDTH
    figure = Figure(figsize=(width * count + 0.2, width * high / wide + below), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0], width


def _mark(
    ax: Axes,
    title: str,
    mask: Bool[np.ndarray, "gh gw"] | None,
    chosen: Patch | None,
    grid: tuple[int, ...],
    size: tuple[int, ...],
    width: float,
) -> None:
    """The title, marked patches and a chosen one of a picture."""
    if mask is not None:
        outline(ax, mask, size, width)
    if chosen is not None:
        frame(ax, chosen, grid, (size[0], size[1]))
    ax.set_title(title, fontsize=9)
    no_frame(ax)


def _scale(kind: Quantity, values: Float[np.ndarray, "k gh gw"]) -> Normalize:
    low, high = float(values.min()), float(values.max())
    if kind == "norms":
        low = max(low, 1e-6)
        return LogNorm(low, max(high, low * 1.01))
    if kind == "attention":
        return PowerNorm(0.5, 0, high or 1.0)
    if kind == "similarity":
        return Normalize(min(low, 0.0), 1.0)
    return Normalize(low, max(high, low + 1e-6))


def _ticks(kind: Quantity, scale: Normalize) -> tuple[list[float], list[str]]:
    low, high = scale.vmin or 0.0, scale.vmax or 1.0
    if kind == "norms":
        return number_ticks(low, high)
    if kind == "attention":
        return percent_ticks(low, high)
    ticks = [float(t) for t in MaxNLocator(5).tick_values(low, high) if low <= t <= high]
    return ticks, [number(tick) for tick in ticks]


def frame(ax: Axes, chosen: Patch, grid: tuple[int, ...], size: tuple[int, int]) -> None:
    """A white frame with a dark casing around one patch."""
    high, wide = size[0] / grid[0], size[1] / grid[1]
    frame = Rectangle((chosen[1] * wide, chosen[0] * high), wide, high, fill=False, edgecolor="white", lw=1.8)
    frame.set(path_effects=[withStroke(linewidth=3.6, foreground=INK), Normal()], clip_on=False)
    ax.add_patch(frame)
