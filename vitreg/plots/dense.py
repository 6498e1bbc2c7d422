"""Photos beside a map that is known of them and the map that a dense head predicts: classes or depth.

segmentation_figure([(path, truth, guess)], classes).savefig("segmentation.png")
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from vitreg.plots.style import INK, house_style, label_bar, no_frame, number_ticks, safe

SIDE = 2.2  # a picture's width, in inches
_PALETTES = ("tab20", "tab20b", "tab20c")


@house_style
def segmentation_figure(
    shown: Sequence[tuple[Path, Int[np.ndarray, "_ _"], Int[np.ndarray, "_ _"]]], classes: Sequence[str]
) -> Figure:
    """A row for each photo: the photo, its mask (white where the pixel has no class), and the prediction."""
    colours = _class_colours(len(classes))
    figure, axes = _rows([truth.shape for _, truth, _ in shown], legend=1.1)
    for row, (path, truth, guess) in zip(axes, shown, strict=True):
        row[0].imshow(_photo(path))
        row[1].imshow(colours[truth], interpolation="nearest")
        row[2].imshow(colours[guess], interpolation="nearest")
    present = sorted({int(i) for _, truth, guess in shown for i in (*np.unique(truth), *np.unique(guess))})
    handles = [Patch(color=colours[i], label=safe(classes[i], 20)) for i in present if i >= 0]
    figure.legend(handles=handles[:40], loc="outside right upper")
    return figure


@house_style
def depth_figure(
    shown: Sequence[tuple[Path, Float[np.ndarray, "_ _"], Float[np.ndarray, "_ _"]]], unit: str
) -> Figure:
    """A row for each photo: the photo, its depth (white where there is none), and the prediction."""
    known = np.concatenate([truth[truth > 0] for _, truth, _ in shown])
    low, high = (float(x) for x in np.quantile(known, [0.01, 0.99]))
    scale = LogNorm(low, max(high, 1.001 * low))
    figure, axes = _rows([truth.shape for _, truth, _ in shown], legend=0.7)
    for row, (path, truth, guess) in zip(axes, shown, strict=True):
        row[0].imshow(_photo(path))
        row[1].imshow(np.where(truth > 0, truth, np.nan), norm=scale, cmap="viridis_r")
        image = row[2].imshow(guess, norm=scale, cmap="viridis_r")
    bar = figure.colorbar(image, cax=axes[0, -1].inset_axes((1.05, 0, 0.05, 1)))
    label_bar(bar, number_ticks(scale.vmin or low, scale.vmax or high), f"depth, {unit}")
    return figure


def _rows(shapes: Sequence[tuple[int, ...]], legend: float) -> tuple[Figure, np.ndarray]:
    """A figure of three pictures in a row for each (h, w), with room at the right."""
    heights = [h / w for h, w in shapes]
    size = (3 * (SIDE + 0.05) + legend, SIDE * sum(heights) + 0.05 * len(shapes) + 0.3)
    figure = Figure(figsize=size, layout="constrained")
    axes: np.ndarray = figure.subplots(len(shapes), 3, squeeze=False, height_ratios=heights)
    for ax in axes.flat:
        no_frame(ax)
    for ax, words in zip(axes[0], ("photo", "truth", "prediction"), strict=True):
        _small_title(ax, words)
    return figure, axes


def _small_title(ax: Axes, words: str) -> None:
    ax.set_title(words, fontsize=8.5, fontweight="normal", color=INK)


def _photo(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _class_colours(classes: int) -> Float[np.ndarray, "c 3"]:
    """A colour for each class, used again after 60 of them, and white, which index -1 takes."""
    known = np.concatenate([matplotlib.colormaps[name](np.arange(20))[:, :3] for name in _PALETTES])
    return np.concatenate([known[np.arange(classes) % len(known)], np.ones((1, 3))])
