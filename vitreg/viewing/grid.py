"""Photos and maps in rows and columns, with what is seen above them and colour bars below.

Maps that are compared share a `Scale`: its colours mean the same in each of them.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Shaped
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from vitreg.plots.maps import Patch, frame
from vitreg.plots.outlines import outline
from vitreg.plots.style import INK, OUTLIER, QUIET, label_bar, no_frame, number_ticks, safe, short_name

WIDTH = 9.6  # inches
_LABEL = 0.35  # of it, for the rows' names
_LETTERS = 140  # of the text that fit into the width


@dataclass(frozen=True)
class Scale:
    """What the colours of some maps mean."""

    norm: Normalize
    colours: str
    words: str

    @property
    def ticks(self) -> tuple[list[float], list[str]]:
        low, high = self.norm.vmin or 0.0, self.norm.vmax or 1.0
        if isinstance(self.norm, LogNorm):
            return number_ticks(low, high)
        at = [
            tick for tick in (-1, -0.5, 0, 0.5, 1, 5, 10, 20, 50, 100, 200, 500, 1000) if low <= tick <= high
        ]
        crowded = {0.5, 10} if high >= 20 else {0.5} if high > 2 else set()
        return [tick for tick in at if tick not in crowded], [f"{t:g}" for t in at if t not in crowded]


@dataclass(frozen=True, eq=False)
class Panel:
    """A photo or colours (h, w, 3), or a map (gh, gw) with its scale; a few words in it, one patch framed."""

    values: Shaped[np.ndarray, "..."]
    scale: Scale | None = None
    note: str = ""
    chosen: Patch | None = None


@dataclass(frozen=True, eq=False)
class Row:
    """A row of panels of one photo of a shape (height, width). In all of them artifacts are outlined, and,
    in grey, patches that were artifacts before."""

    name: str
    panels: Sequence[Panel]
    shape: tuple[int, int]
    artifacts: Bool[np.ndarray, "gh gw"]
    former: Bool[np.ndarray, "gh gw"]
    alarming: bool = False


@dataclass(frozen=True)
class Legend:
    """What stands below some columns, from `first` to `last`: a colour bar, or words alone."""

    first: int
    last: int
    scale: Scale | None = None
    words: str = ""


def grid_figure(
    text: Sequence[str], titles: Sequence[str], rows: Sequence[Row], legends: Sequence[Legend]
) -> Figure:
    """The figure. Text that is too long for a line is wrapped."""
    columns = len(titles)
    side = (WIDTH - _LABEL) / columns
    heights = [side * row.shape[0] / row.shape[1] + 0.05 for row in rows]
    lines = [part for line in text for part in textwrap.wrap(safe(line, 600), _LETTERS)]
    top, bottom = (0.34 if any(titles) else 0.16) + 0.17 * len(lines), 0.72
    height = sum(heights) + top + bottom
    figure = Figure(figsize=(WIDTH, height))
    spaces = {"left": _LABEL / WIDTH, "right": 0.996, "wspace": 0.03, "hspace": 0.03}
    grid = figure.add_gridspec(
        len(rows), columns, height_ratios=heights, bottom=bottom / height, top=1 - top / height, **spaces
    )
    axes: np.ndarray = grid.subplots(squeeze=False)
    for line, row in zip(axes, rows, strict=True):
        _draw(line, row, side)
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize=8.5, fontweight="normal", pad=4)
    for legend in legends:
        _explain(figure, axes[-1], legend)
    figure.text(0.006, 1 - 0.09 / height, "\n".join(lines), va="top", linespacing=1.35)
    return figure


def _draw(axes: np.ndarray, row: Row, side: float) -> None:
    high, wide = row.shape
    for ax, panel in zip(axes, row.panels, strict=False):
        _draw_panel(ax, panel, row.shape)
        outline(ax, row.former & ~row.artifacts, (high, wide), side, QUIET)
        outline(ax, row.artifacts, (high, wide), side)
        if panel.chosen is not None:
            frame(ax, panel.chosen, row.artifacts.shape, (high, wide))
    for ax in axes:
        no_frame(ax)
    for ax in axes[len(row.panels) :]:
        ax.set_axis_off()
    name = safe(short_name(row.name), max(round(14.5 * side * high / wide), 8))
    axes[0].set_ylabel(name, color=OUTLIER if row.alarming else INK, fontsize=8, labelpad=3)


def _draw_panel(ax: Axes, panel: Panel, shape: tuple[int, int]) -> None:
    high, wide = shape
    ax.imshow(
        panel.values,
        extent=(0, wide, high, 0),
        interpolation=None if panel.values.shape[:2] == shape else "nearest",
        cmap=None if panel.scale is None else panel.scale.colours,
        norm=None if panel.scale is None else panel.scale.norm,
    )
    if panel.note:
        note = ax.text(0.5, 0.012, panel.note, transform=ax.transAxes, ha="center", va="bottom", fontsize=7)
        note.set(bbox={"facecolor": "white", "alpha": 0.85, "pad": 1.2, "linewidth": 0})


def _explain(figure: Figure, axes: np.ndarray, legend: Legend) -> None:
    """A colour bar below some columns, or words in its place."""
    left, right = axes[legend.first].get_position(), axes[legend.last].get_position()
    inch, width = 1 / figure.get_figheight(), right.x1 - left.x0
    if legend.scale is None:
        words = figure.text(left.x0 + width / 2, left.y0 - 0.1 * inch, legend.words, ha="center", va="top")
        words.set(fontsize=8, color=QUIET)
        return
    bar_axes = figure.add_axes((left.x0 + 0.04 * width, left.y0 - 0.19 * inch, 0.92 * width, 0.09 * inch))
    mappable = ScalarMappable(legend.scale.norm, legend.scale.colours)
    bar = figure.colorbar(mappable, cax=bar_axes, orientation="horizontal")
    label_bar(bar, legend.scale.ticks, legend.scale.words)
