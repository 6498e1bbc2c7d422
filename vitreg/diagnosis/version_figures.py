"""One model in several versions (as trained, with artifacts, fixed) on the same photos.

before_after([("phantom", report), ("fixed", after)]).savefig("before_after.png")
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm, PowerNorm
from matplotlib.figure import Figure

from vitreg.diagnosis.photo_figures import (
    FEATURES,
    PatchMap,
    draw_map,
    draw_picture,
    feature_pictures,
    label_map,
)
from vitreg.diagnosis.result import Diagnosis
from vitreg.diagnosis.wording import kind_of_query
from vitreg.plots.style import INK, NORM_COLOURS, OUTLIER, SHARE_COLOURS, house_style, mark_phantom, no_frame

Versions = Sequence[tuple[str, Diagnosis]]

WIDTH, MARGINS = 9.6, 1.1  # inches: of the figure, and of what stands beside the photos in it
FEWEST = 4  # columns, so that one photo does not fill the figure


@house_style
def before_after(versions: Versions, photos: int = 8) -> Figure:
    """A column for each photo: the photo, and each version's norms, attention and features.

    Norms are those after one block, the detect layer of the first version with artifacts; attention is that
    of CLS (of patches, in a model without) in the last block, mean of heads. Colours mean the same in all
    maps of a kind, those of features in all versions of a photo; a version's outliers are outlined. Raises
    ValueError unless all versions were diagnosed on the same photos, with examples kept.
    """
    reports = [report for _, report in versions]
    names = {tuple(example.name for example in report.examples) for report in reports}
    if len(names) != 1 or names == {()}:
        raise ValueError("expected diagnoses of the same photos, each with examples, but found others.")
    shown = min(photos, len(reports[0].examples))
    columns = max(shown, FEWEST)
    high, wide = reports[0].examples[0].photo.shape[:2]
    side, rows = (WIDTH - MARGINS) / columns, 1 + 3 * len(reports)
    height = (side * high / wide + 0.06) * rows + 0.75
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax, example in zip(axes[0], reports[0].examples, strict=False):
        ax.imshow(example.photo)
        no_frame(ax)
    for ax in axes[:, shown:].flat:
        ax.set_axis_off()
    _head(axes[0], "Photos")
    parts = np.split(axes[1:], 3)
    for part, maps in zip(parts, _maps(reports, shown), strict=False):
        _draw_maps(figure, part, versions, maps, side)
    _draw_features(parts[-1], versions, side)
    for report in reports:
        mark_phantom(figure, report.planted)
    return figure


def _maps(reports: Sequence[Diagnosis], columns: int) -> tuple[PatchMap, PatchMap]:
    """Norms and attention, with scales that span all versions."""
    layer = next((x.detect_layer for x in reports if x.has_artifacts), reports[0].detect_layer)
    last, examples = len(reports[0].layers) - 1, [x for report in reports for x in report.examples[:columns]]
    norms = np.array([x.norms[layer] for x in examples])
    low = max(float(norms.min()), 1e-6)
    attention = max(float(x.attention[last].max()) for x in examples)
    source = kind_of_query(reports[0].attention_queries)
    return (
        PatchMap(
            "norms",
            layer,
            f"L2 norm of patch tokens after block {layer}",
            NORM_COLOURS,
            LogNorm(low, max(float(norms.max()), low * 1.01)),
        ),
        PatchMap(
            "attention",
            last,
            f"{source} attention in block {last}, mean of heads",
            SHARE_COLOURS,
            PowerNorm(0.5, 0, attention or 1.0),
        ),
    )


def _draw_maps(figure: Figure, axes: np.ndarray, versions: Versions, shown: PatchMap, side: float) -> None:
    """A row for each version, and one colour bar."""
    for row, (name, report) in zip(axes, versions, strict=True):
        images = [draw_map(ax, report, x, shown, side) for ax, x in zip(row, report.examples, strict=False)]
        row[0].set_ylabel(name, color=OUTLIER if report.has_artifacts else INK, fontweight="bold")
    _head(axes[0], shown.label)
    label_map(figure.colorbar(images[0], ax=list(axes.flat), pad=0.012, aspect=30, fraction=0.03), shown)


def _draw_features(axes: np.ndarray, versions: Versions, side: float) -> None:
    """A row of features for each version."""
    pictures = feature_pictures([report for _, report in versions])
    for row, (name, report), of_version in zip(axes, versions, pictures, strict=True):
        for ax, example, picture in zip(row, report.examples, of_version, strict=False):
            draw_picture(ax, report, example, picture, side)
        row[0].set_ylabel(name, color=OUTLIER if report.has_artifacts else INK, fontweight="bold")
    _head(axes[0], FEATURES)


def _head(row: np.ndarray, title: str) -> None:
    """A title over a row's maps. As that of the first one it would widen its column, as long as it is."""
    place: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
    text = row[0].annotate(title, (0, 1), (0, 5), fontsize=9.5, fontweight="bold", **place)
    text.set_in_layout(False)
    row[0].set_title(" ", pad=5.0)  # keeps the place free
