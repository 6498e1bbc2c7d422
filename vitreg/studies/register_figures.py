"""Where registers look, and how alike they are.

registers(study).savefig("registers.png")
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure, SubFigure

from vitreg.plots.style import SHARE_COLOURS, house_style, label_bar, mark_phantom, no_frame, number_ticks

if TYPE_CHECKING:
    from vitreg.studies.register_maps import RegisterStudy

_SIDE = 1.15  # a photo's width, in inches


@house_style
def registers(study: RegisterStudy) -> Figure:
    """A row for each photo: the photo, and what CLS and each register attend to; below, their similarities.

    Maps are over a uniform one of as much attention on patches: 1 is what every patch would get. Colours mean
    the same in all of them, up to the value that one patch in 200 exceeds.
    """
    rows, columns = len(study.examples), 1 + len(study.queries)
    high, wide = study.examples[0].photo.shape[:2] if rows else (1, 1)
    above, below = rows * (_SIDE * high / wide + 0.04) + 0.35, 1.2 + 0.27 * len(study.tokens)
    figure = Figure(
        figsize=(max(_SIDE * columns + 0.7, 2 * below + 1.2), above + below), layout="constrained"
    )
    top, bottom = np.ravel(figure.subfigures(2, 1, height_ratios=[above, below], squeeze=False))
    if rows:
        _draw_maps(top, study, columns)
    left, right = bottom.subplots(1, 2)
    _draw_similarity(left, study.tokens, study.output_similarity, f"Outputs of block {study.layer}")
    _draw_similarity(right, study.queries, study.map_similarity, "Attention maps")
    mark_phantom(figure, study.planted)
    return figure


def _draw_maps(figure: SubFigure, study: RegisterStudy, columns: int) -> None:
    axes = figure.subplots(len(study.examples), columns, squeeze=False)
    maps = np.stack([example.maps for example in study.examples])
    relative = maps / maps.mean((2, 3), keepdims=True).clip(min=1e-12)
    scale = PowerNorm(0.5, 0, max(float(np.quantile(relative, 0.995)), 1.0))
    for row, example, values in zip(axes, study.examples, relative, strict=True):
        frame = (0, example.photo.shape[1], example.photo.shape[0], 0)
        row[0].imshow(example.photo, extent=frame)
        for ax, value in zip(row[1:], values, strict=True):
            image = ax.imshow(value, cmap=SHARE_COLOURS, norm=scale, interpolation="nearest", extent=frame)
    for ax in axes.flat:
        no_frame(ax)
    titles = ["photo", *(f"{x}: {y:.0%}" for x, y in zip(study.queries, study.attention, strict=True))]
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title.replace("register", "reg."), fontsize=8, fontweight="normal", pad=3, loc="center")
    bar = figure.colorbar(image, ax=list(axes.flat), pad=0.01, fraction=0.03, aspect=30, extend="max")
    top = scale.vmax or 1.0
    ticks = [0.0, *(x for x in number_ticks(0.1, top)[0] if x >= 1)]
    label_bar(bar, (ticks, [f"{x:g}" for x in ticks]), "attention over its mean (%: on patches)")


def _draw_similarity(
    ax: Axes, names: Sequence[str], similarity: Sequence[Sequence[float]], title: str
) -> None:
    values = np.array(similarity)
    ax.imshow(values, cmap="RdBu_r", vmin=-1, vmax=1)
    for i, j in np.ndindex(values.shape):
        colour = "white" if abs(values[i, j]) > 0.6 else "black"
        ax.text(j, i, f"{values[i, j]:.2f}", ha="center", va="center", fontsize=6.5, color=colour)
    short = [name.replace("register ", "") for name in names]
    ax.set_xticks(range(len(names)), short)
    ax.set_yticks(range(len(names)), names)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    ax.set_title(f"{title}: cosine similarity")
