"""Photos beside maps of their patches, with the outliers outlined. figures.py offers these figures.

A map is drawn as it is, one flat square per patch, and its colours mean the same in all photos. Outlined
patches are the outliers by the diagnosis' own layer and threshold, in every map.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LogNorm, Normalize, PowerNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import AxesImage

from vitreg.diagnosis.result import Diagnosis, Example
from vitreg.diagnosis.wording import kind_of_query
from vitreg.plots.outlines import outline
from vitreg.plots.principal import PrincipalColours
from vitreg.plots.style import (
    NORM_COLOURS,
    QUIET,
    SHARE_COLOURS,
    house_style,
    label_bar,
    mark_phantom,
    no_frame,
    number_ticks,
    percent_ticks,
    safe,
    short_name,
)
from vitreg.printing import one_of

What = Literal["norms", "attention", "both"]

FEATURES = "features: PCA of each photo"


@dataclass(frozen=True)
class PatchMap:
    """A quantity per patch, (l, gh, gw) in every example, with the layer and the colour scale to show."""

    quantity: Literal["norms", "attention"]
    layer: int
    label: str
    colours: str
    scale: Normalize

    def values(self, example: Example) -> Float[np.ndarray, "gh gw"]:
        of_all_layers: np.ndarray = getattr(example, self.quantity)
        return of_all_layers[self.layer]


@house_style
def photo_grid(report: Diagnosis, what: What = "norms", layer: int | None = None, columns: int = 4) -> Figure:
    """The example photos, and under each its map of norms, of attention, or both.

    Norms are those after block `layer` (default: the detect layer), attention is that inside block `layer`
    (default: the last).
    """
    maps = patch_maps(report, what, layer)
    groups = [report.examples[i : i + columns] for i in range(0, len(report.examples), columns)] or [[]]
    width = 9.0
    height = photo_rows_height(report, width, columns, len(maps)) * len(groups)
    figure = Figure(figsize=(width, height), layout="constrained")
    parts = np.ravel(figure.subfigures(len(groups), 1, squeeze=False))
    for part, group in zip(parts, groups, strict=True):
        draw_photo_rows(part, report, group, maps, columns)
    mark_phantom(parts[-1], report.planted)
    return figure


@house_style
def photo_strip(report: Diagnosis, index: int) -> Figure:
    """One example: the photo, its norms after the detect layer, attention in the last block, features."""
    example, maps = report.examples[index], patch_maps(report, "both", None)
    rows, columns = example.photo.shape[:2]
    side = 1.7
    height = side * rows / columns
    figure = Figure(figsize=(7.2, height + 0.65), layout="constrained")
    axes = figure.subplots(1, 4)
    _draw_photo(axes[0], report, example, side)
    draw_picture(axes[3], report, example, feature_pictures([report])[0][index], side)
    _small_title(axes[3], FEATURES)
    for ax, shown in zip(axes[1:], maps, strict=False):
        image = draw_map(ax, report, example, shown, side)
        _small_title(ax, shown.label)
        place = ax.inset_axes((0, -0.18 / height, 1, 0.1 / height))
        label_map(figure.colorbar(image, cax=place, orientation="horizontal"), shown)
    mark_phantom(figure, report.planted)
    return figure


def photo_rows_height(report: Diagnosis, width: float, columns: int, maps: int) -> float:
    """How tall (inches) rows of `columns` photos with that many maps are when `width` inches wide."""
    if not report.examples:
        return 0.6
    high, wide = report.examples[0].photo.shape[:2]
    return ((width - 0.9) / columns * high / wide + 0.24) * (1 + maps)


def draw_photo_rows(
    figure: Figure | SubFigure,
    report: Diagnosis,
    examples: Sequence[Example],
    maps: Sequence[PatchMap],
    columns: int,
    features: bool = False,
) -> None:
    """A row of photos, a row of maps with a colour bar for each kind of map, and one of features."""
    if not examples:
        figure.text(0.5, 0.5, "no example photos were kept", ha="center", va="center", color=QUIET)
        return
    axes = figure.subplots(1 + len(maps) + features, columns, squeeze=False)
    side = 8.1 / columns
    for ax in axes[:, len(examples) :].flat:
        ax.set_axis_off()
    for ax, example in zip(axes[0], examples, strict=False):
        _draw_photo(ax, report, example, side)
    for row, shown in zip(axes[1:], maps, strict=False):
        images = [draw_map(ax, report, x, shown, side) for ax, x in zip(row, examples, strict=False)]
        _small_title(row[0], shown.label)
        bar = figure.colorbar(images[0], ax=list(row[: len(images)]), pad=0.015, aspect=18, shrink=0.95)
        label_map(bar, shown)
    if features:
        pictures = feature_pictures([report])[0]
        for ax, example, picture in zip(axes[-1], examples, pictures, strict=False):
            draw_picture(ax, report, example, picture, side)
        _small_title(axes[-1][0], FEATURES)


def feature_pictures(versions: Sequence[Diagnosis]) -> list[list[UInt8[np.ndarray, "gh gw 3"]]]:
    """For each version of a model and each example its patches' features as colours.

    The colours are principal components of each photo by itself, of those patches that are no outliers in the
    first version: the same in all versions, so that what a fix changes can be seen.
    """
    first, pictures = versions[0], []
    for example in first.examples:
        normal = ~first.rule.mask(example.norms[first.rule.layer])
        pictures.append(
            PrincipalColours.of_most(torch.from_numpy(example.features), torch.from_numpy(normal))
        )
    return [
        [
            colours(torch.from_numpy(example.features)).numpy()
            for colours, example in zip(pictures, version.examples, strict=False)
        ]
        for version in versions
    ]


def patch_maps(report: Diagnosis, what: What, layer: int | None) -> list[PatchMap]:
    """The maps to show, with scales that span all examples. Raises ValueError for what there is none of."""
    depth = len(report.layers)
    if what not in get_args(What):
        raise ValueError(f"there is no map of {what!r}. {one_of(what, get_args(What))}")
    if layer is not None and not 0 <= layer < depth:
        raise ValueError(f"found layer {layer}, but the model has layers 0 to {depth - 1}.")
    maps = []
    if what in ("norms", "both"):
        maps.append(_norm_map(report, report.detect_layer if layer is None else layer))
    if what in ("attention", "both"):
        maps.append(_attention_map(report, depth - 1 if layer is None else layer))
    return maps


def _norm_map(report: Diagnosis, layer: int) -> PatchMap:
    values = np.array([x.norms[layer] for x in report.examples] or [[1.0]])
    low = max(float(values.min()), 1e-6)
    scale = LogNorm(low, max(float(values.max()), low * 1.01))
    return PatchMap("norms", layer, f"L2 norm after block {layer}", NORM_COLOURS, scale)


def _attention_map(report: Diagnosis, layer: int) -> PatchMap:
    top = max((float(x.attention[layer].max()) for x in report.examples), default=1.0)
    source = kind_of_query(report.attention_queries)
    label = f"{source} attention, block {layer}"
    return PatchMap("attention", layer, label, SHARE_COLOURS, PowerNorm(0.5, 0, top or 1.0))


def _draw_photo(ax: Axes, report: Diagnosis, example: Example, side: float) -> None:
    """The photo, `side` inches wide."""
    high, wide = example.photo.shape[:2]
    ax.imshow(example.photo, extent=(0, wide, high, 0))
    _small_title(ax, safe(short_name(example.name), int(13 * side)))
    _outline(ax, report, example, side)
    no_frame(ax)


def draw_map(ax: Axes, report: Diagnosis, example: Example, shown: PatchMap, side: float) -> AxesImage:
    """Draw a map of one example, `side` inches wide, with its outliers outlined."""
    high, wide = example.photo.shape[:2]
    image = ax.imshow(
        shown.values(example),
        cmap=shown.colours,
        norm=shown.scale,
        interpolation="nearest",
        extent=(0, wide, high, 0),
    )
    _outline(ax, report, example, side)
    no_frame(ax)
    return image


def draw_picture(
    ax: Axes, report: Diagnosis, example: Example, picture: UInt8[np.ndarray, "gh gw 3"], side: float
) -> None:
    """Draw features as colours, `side` inches wide, with the outliers outlined."""
    high, wide = example.photo.shape[:2]
    ax.imshow(picture, interpolation="nearest", extent=(0, wide, high, 0))
    _outline(ax, report, example, side)
    no_frame(ax)


def _outline(ax: Axes, report: Diagnosis, example: Example, side: float) -> None:
    if report.rule.marks_any:
        mask = report.rule.mask(example.norms[report.rule.layer])
        outline(ax, mask, example.photo.shape[:2], side)


def _small_title(ax: Axes, text: str) -> None:
    ax.set_title(text, fontsize=8, fontweight="normal", pad=3)


def label_map(bar: Colorbar, shown: PatchMap) -> None:
    """Give the colour bar of a map the ticks of its quantity."""
    low, high = shown.scale.vmin or 0.0, shown.scale.vmax or 1.0
    label_bar(bar, (number_ticks if shown.quantity == "norms" else percent_ticks)(low, high), "")
