"""The look of every figure: one light theme, colours that colour-blind readers can tell apart, safe text.

    @house_style
    def my_figure(report) -> Figure: ...

A figure keeps this look whatever the caller's rcParams are, and drawing changes nothing outside itself.
"""

import functools
import io
import math
import re
import threading
from collections.abc import Callable
from typing import Any, ParamSpec

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Colormap, ListedColormap
from matplotlib.figure import Figure, SubFigure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import MaxNLocator, NullLocator
from PIL import Image

from vitreg.printing import PHANTOM
from vitreg.printing import number as number
from vitreg.printing import percent as percent
from vitreg.printing import short_name as short_name

# Blue and vermillion of Okabe and Ito's palette, and greys.
INK, QUIET, PALE = "#1f2328", "#6e7781", "#d0d7de"
NORMAL, OUTLIER = "#0072b2", "#d55e00"
NORM_COLOURS, SHARE_COLOURS = "viridis", "magma"

_FONT = "DejaVu Sans"  # comes with matplotlib, so figures are the same on every machine
_STYLE: dict[str, Any] = {
    "font.family": _FONT,
    "font.size": 8.5,
    "text.color": INK,
    "text.parse_math": False,  # a "$" in a file name is a dollar
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.labelsize": 8.5,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlepad": 7.0,
    "figure.facecolor": "white",
    "figure.titleweight": "bold",
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 3.5,
    "xtick.color": QUIET,
    "xtick.labelcolor": INK,
    "xtick.labelsize": 8,
    "xtick.major.width": 0.6,
    "xtick.major.size": 3,
    "ytick.color": QUIET,
    "ytick.labelcolor": INK,
    "ytick.labelsize": 8,
    "ytick.major.width": 0.6,
    "ytick.major.size": 3,
}

P = ParamSpec("P")
_one_at_a_time = threading.RLock()  # matplotlib's parameters are global, and the app draws in threads


def house_style(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Make the figure that `draw` returns look like the others."""

    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with _one_at_a_time, matplotlib.style.context(["default", _STYLE]):
            figure = draw(*args, **kwargs)
            # Ticks and layout are made when first drawn: here, while the style holds.
            figure.draw_without_rendering()
        return figure

    return styled


def safe(text: str, most: int = 200) -> str:
    """Text from outside, drawable: without glyphs that the font lacks, its middle left out if too long."""
    kept = "".join(c if ord(c) in _glyphs() else "\N{REPLACEMENT CHARACTER}" for c in text)
    if len(kept) <= most:
        return kept
    tail = (most - 1) // 2
    return f"{kept[: most - 1 - tail]}…{kept[len(kept) - tail :]}"


@functools.cache
def _glyphs() -> frozenset[int]:
    known = get_font(findfont(_FONT)).get_charmap()
    return frozenset(code for code in known if chr(code).isprintable())


def mark_phantom(figure: Figure | SubFigure, planted: bool) -> None:
    """A phantom, whose artifacts were planted, is called one wherever it is shown."""
    if planted:
        figure.supxlabel(PHANTOM, fontsize=7.5, color=OUTLIER, x=0.99, ha="right")


def log_axis(axis: Axis, low: float, high: float) -> None:
    """A logarithmic axis from `low` to `high`, with plain numbers at its ticks."""
    axes = axis.axes
    if axis is axes.xaxis:
        axes.set(xscale="log", xlim=(low, high))
    else:
        axes.set(yscale="log", ylim=(low, high))
    ticks, words = number_ticks(low, high)
    axis.set_ticks(ticks, words)
    axis.set_minor_locator(NullLocator())


def number_ticks(low: float, high: float) -> tuple[list[float], list[str]]:
    """Ticks for a logarithmic scale and their labels, also where it spans less than a power of ten."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 3), (1, 2, 5)):
        ticks = [digit * 10.0**power for power in powers for digit in digits]
        if sum(low <= tick <= high for tick in ticks) >= 3:
            break
    else:
        ticks = list(MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(low, high))
    inside = [float(tick) for tick in ticks if low <= tick <= high]
    return inside, [number(tick) for tick in inside]


def percent_ticks(low: float, high: float) -> tuple[list[float], list[str]]:
    """Ticks for a linear scale of shares, and their labels in percent."""
    ticks = MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low, high)
    inside = [float(tick) for tick in ticks if low <= tick <= high]
    return inside, [f"{100 * tick:.6g}%" for tick in inside]


def label_bar(bar: Colorbar, ticks: tuple[list[float], list[str]], label: str) -> None:
    """A colour bar's ticks, from `number_ticks` or `percent_ticks`, and its label."""
    bar.set_ticks(ticks[0], labels=ticks[1])
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)
    bar.set_label(label)


def titled(ax: Axes, title: str, columns: int = 0) -> None:
    """A panel's title; with `columns`, the legend in a row of its own between the title and the panel."""
    rows = -(-len(ax.get_legend_handles_labels()[1]) // columns) if columns else 0
    ax.set_title(title, pad=5.0 + 13.5 * rows)
    if rows:
        spaces = {"borderpad": 0.1, "borderaxespad": 0.2, "columnspacing": 1.4, "labelspacing": 0.3}
        ax.legend(loc="lower left", bbox_to_anchor=(-0.01, 1), ncols=columns, **spaces)


def on_white(name: str) -> Colormap:
    """A perceptually uniform map, dark for much and light (but not white, which means none) for little."""
    colours = matplotlib.colormaps[name].reversed()(np.linspace(0.08, 1, 256))
    return ListedColormap(colours, name=f"{name} on white")


def whole_ticks(axis: Axis) -> None:
    """Whole numbers, as many as there is room for."""
    axis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))


def no_frame(ax: Axes) -> None:
    """A picture: no ticks, no border."""
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def png(figure: Figure, dpi: int = 150, colours: int | None = None) -> bytes:
    """The figure as a PNG, the same bytes every time; with `colours`, reduced to a palette of that many."""
    data = io.BytesIO()
    with _one_at_a_time, matplotlib.style.context(["default", _STYLE]):
        figure.savefig(data, format="png", dpi=dpi, metadata={"Software": None})
    if colours is None:
        return data.getvalue()
    small = io.BytesIO()
    with Image.open(data) as image:
        image.convert("RGB").quantize(colours).save(small, format="png", optimize=True)
    return small.getvalue()


def image(figure: Figure, suffix: str) -> bytes:
    """The figure as the file that a suffix of FIGURES (vitreg/files.py) stands for.

    A PNG and an SVG have the same bytes every time; in a PDF matplotlib orders clip paths as it likes. What
    has none of these suffixes (a pipe, say) is a PNG.
    """
    if suffix.lower() not in (".pdf", ".svg"):
        return png(figure)
    undated = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}[suffix.lower()]
    data = io.BytesIO()
    with _one_at_a_time, matplotlib.style.context(["default", _STYLE, {"svg.hashsalt": "vitreg"}]):
        figure.savefig(data, format=suffix.lower()[1:], metadata=undated)
    return _numbered_clips(data.getvalue()) if suffix.lower() == ".svg" else data.getvalue()


def _numbered_clips(svg: bytes) -> bytes:
    """The names of clip paths, which matplotlib makes of addresses in memory, in the order of the file."""
    names: dict[bytes, bytes] = {}
    return re.sub(rb"\bp[0-9a-f]{10}\b", lambda x: names.setdefault(x[0], b"clip-%d" % len(names)), svg)
