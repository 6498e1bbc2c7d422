"""The sink shifted at will, in pictures: where the outliers are, and where one has put them.

shift_figure(vit, image, neurons, {"to the centre": [(6, 6)], "to a V": drawn(V, (14, 14))})
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patheffects import withStroke
from torch import Tensor

from vitreg.diagnosis.diagnosing import photos_of
from vitreg.fixes.neurons import RegisterNeurons
from vitreg.fixes.shift_sink import GridPosition, ShiftSink
from vitreg.models.backbone import Backbone
from vitreg.models.probe import evaluating
from vitreg.plots.style import (
    NORM_COLOURS,
    OUTLIER,
    house_style,
    label_bar,
    mark_phantom,
    no_frame,
    number,
    number_ticks,
)
from vitreg.tracing.records import trace

SIDE = 2.0  # of a photo, in inches


@house_style
def shift_figure(
    vit: Backbone,
    image: Float[Tensor, "3 h w"],
    neurons: RegisterNeurons,
    places: Mapping[str, Sequence[GridPosition] | Tensor],
    layer: int | None = None,
) -> Figure:
    """A preprocessed photo, its patch norms as they are, and with the neurons moved to each of `places`.

    `places` names lists of (row, column), or masks (gh, gw). Norms are those after block `layer` (0-based,
    default: the last), all on one scale; patches that the neurons were moved to are outlined.
    """
    last = vit.anatomy.depth - 1 if layer is None else layer
    fixes = {name: ShiftSink(neurons, places=where) for name, where in places.items()}  # type: ignore[arg-type]
    before = _norms(vit, image, last)
    after = {}
    for name, fix in fixes.items():
        with fix.applied_to(vit):
            after[name] = _norms(vit, image, last)
    every = np.stack([before, *after.values()])
    scale = LogNorm(max(float(every.min()), 1e-6), float(every.max()))
    ratio = image.shape[1] / image.shape[2]
    pictures = 2 + len(fixes)
    figure = Figure(figsize=(pictures * (SIDE + 0.1) + 0.8, SIDE * ratio + 0.5), layout="constrained")
    axes = figure.subplots(1, pictures)
    _photo(axes[0], photos_of(vit, image[None])[0])
    shown = _map(axes[1], "outliers as they are", before, ratio, scale, ())
    for ax, (name, norms) in zip(axes[2:], after.items(), strict=True):
        _map(ax, f"moved {name}", norms, ratio, scale, fixes[name].places)
    colours = figure.colorbar(shown, cax=axes[-1].inset_axes((1.05, 0, 0.05, 1)))
    label_bar(colours, number_ticks(scale.vmin or 1.0, scale.vmax or 1.0), f"L2 norm after block {last}")
    mark_phantom(figure, vit.planted)
    return figure


def _norms(vit: Backbone, image: Float[Tensor, "3 h w"], layer: int) -> Float[np.ndarray, "gh gw"]:
    with evaluating(vit.model), trace(vit, layers=[layer]) as t:
        vit(image[None])
    norms: np.ndarray = t.layout.as_grid(t.norms[0, 0, t.layout.patch_slice]).cpu().numpy()
    return norms


def _photo(ax: Axes, photo: np.ndarray) -> None:
    ax.imshow(photo)
    ax.set_title("photo", pad=4)
    no_frame(ax)


def _map(
    ax: Axes,
    title: str,
    norms: Float[np.ndarray, "gh gw"],
    ratio: float,
    scale: LogNorm,
    places: Sequence[GridPosition],
) -> AxesImage:
    rows, columns = norms.shape
    cell = ratio * columns / rows  # height of a patch, in units of its width
    extent = (0, columns, rows * cell, 0)
    image = ax.imshow(norms, cmap=NORM_COLOURS, norm=scale, interpolation="nearest", extent=extent)
    lines = [[(x, y * cell) for x, y in line] for line in _border(places)]
    casing = [withStroke(linewidth=2.4, foreground="white")]
    ax.add_collection(
        LineCollection(lines, colors=OUTLIER, linewidths=1.2, clip_on=False, path_effects=casing)
    )
    ax.set_title(title, pad=4)
    ax.set_xlabel(f"largest {number(float(norms.max()))}", fontsize=7.5)
    no_frame(ax)
    return image


def _border(places: Sequence[GridPosition]) -> list[tuple[GridPosition, GridPosition]]:
    """The sides that a shape made of patches shows: those that belong to one of its patches only."""
    sides = Counter(
        side
        for y, x in places
        for side in (
            ((x, y), (x + 1, y)),
            ((x, y + 1), (x + 1, y + 1)),
            ((x, y), (x, y + 1)),
            ((x + 1, y), (x + 1, y + 1)),
        )
    )
    return [side for side, times in sides.items() if times == 1]
