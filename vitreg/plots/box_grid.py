"""Boxes over photos: what was found, beside what is there.

figure = box_grid([BoxedPhoto("a.jpg", pixels, truth, {"LOST": box})])
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import Normal, withStroke

from vitreg.plots.style import NORMAL, OUTLIER, QUIET, house_style, mark_phantom, no_frame, safe, short_name

_GREEN = "#009e73"  # Okabe and Ito's; lines differ by their dashes too
_TRUTH = {"edgecolor": NORMAL, "linewidth": 1.3, "linestyle": (0, (1.5, 1))}
_FOUND = (
    {"edgecolor": OUTLIER, "linewidth": 2.0, "linestyle": "-"},
    {"edgecolor": _GREEN, "linewidth": 2.0, "linestyle": (0, (5, 1.5))},
)


@dataclass(frozen=True, eq=False)
class BoxedPhoto:
    """A photo (h, w, 3) with its objects' boxes (k, 4) and one box (4) found by each method; xyxy pixels."""

    name: str
    photo: UInt8[np.ndarray, "h w 3"]
    truth: Float[np.ndarray, "k 4"]
    found: dict[str, Float[np.ndarray, "4"]]
    caption: str = ""


@house_style
def box_grid(photos: Sequence[BoxedPhoto], columns: int = 4, *, planted: bool = False) -> Figure:
    """Photos in rows of `columns`: objects in dotted boxes, what up to two methods found in other lines."""
    rows = -(-len(photos) // columns)
    tallest = [
        max(x.photo.shape[0] / x.photo.shape[1] for x in photos[i * columns : (i + 1) * columns])
        for i in range(rows)
    ]
    side = 9.0 / columns
    heights = [side * min(ratio, 1.2) + 0.3 for ratio in tallest]
    figure = Figure(figsize=(9.0, sum(heights) + 0.35), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, height_ratios=heights)
    for ax, shown in zip(axes.flat, photos, strict=False):
        _draw(ax, shown, int(11 * side))
    for ax in axes.flat[len(photos) :]:
        ax.set_axis_off()
    handles = [_line("an object of the photo", _TRUTH)] if any(len(x.truth) for x in photos) else []
    handles += [
        _line(f"found by {name}", style) for name, style in zip(photos[0].found, _FOUND, strict=False)
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), handlelength=3.5)
    mark_phantom(figure, planted)
    return figure


def _draw(ax: Axes, shown: BoxedPhoto, letters: int) -> None:
    high, wide = shown.photo.shape[:2]
    ax.imshow(shown.photo, extent=(0, wide, high, 0))
    for box in shown.truth:
        _outline(ax, box, _TRUTH)
    for box, style in zip(shown.found.values(), _FOUND, strict=False):
        _outline(ax, box, style)
    ax.set_title(safe(short_name(shown.name), letters), fontsize=8, fontweight="normal", pad=3)
    ax.set_xlabel(shown.caption, fontsize=7.5, color=QUIET, labelpad=2, loc="left")
    ax.set_anchor("N")
    no_frame(ax)


def _outline(ax: Axes, box: Float[np.ndarray, "4"], style: dict[str, object]) -> None:
    """A rectangle with a white casing, so that it shows on dark and on bright photos."""
    left, top, right, bottom = box.tolist()
    casing = [withStroke(linewidth=float(str(style["linewidth"])) + 1.4, foreground="white"), Normal()]
    outline = Rectangle((left, top), right - left, bottom - top, fill=False, clip_on=False, **style)  # type: ignore[arg-type]
    outline.set_path_effects(casing)
    ax.add_patch(outline)


def _line(label: str, style: dict[str, object]) -> Line2D:
    named = {"color": style["edgecolor"], "linewidth": style["linewidth"], "linestyle": style["linestyle"]}
    return Line2D([], [], label=label, **named)  # type: ignore[arg-type]
