"""Lines around the marked patches of a photo."""

import numpy as np
from jaxtyping import Bool
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.patheffects import withStroke

from vitreg.plots.style import (
    OUTLIER,
)


def outline(
    ax: Axes, mask: Bool[np.ndarray, "gh gw"], size: tuple[int, ...], side: float, colour: str = OUTLIER
) -> None:
    """A line around marked patches of a photo of `size` (height, width), drawn `side` inches wide; thin
    enough for the size of a patch."""
    (high, wide), (rows, columns) = size, mask.shape
    lines = [np.array(edge) * (wide / columns, high / rows) for edge in _edges(mask)]
    width = min(max(0.12 * 72 * side / columns, 0.5), 1.2)
    style = {"colors": colour, "linewidths": width, "capstyle": "projecting", "clip_on": False}
    casing = [withStroke(linewidth=2 * width, foreground="white")]
    ax.add_collection(LineCollection(lines, path_effects=casing, **style))


def _edges(mask: Bool[np.ndarray, "gh gw"]) -> list[list[tuple[int, int]]]:
    """Borders between patches in the mask and others, as ((x, y), (x, y)) in units of patches."""
    framed = np.pad(mask, 1)
    across = np.argwhere(framed[1:, 1:-1] != framed[:-1, 1:-1]).tolist()
    upright = np.argwhere(framed[1:-1, 1:] != framed[1:-1, :-1]).tolist()
    lines = [[(x, y), (x + 1, y)] for y, x in across]
    return lines + [[(x, y), (x, y + 1)] for y, x in upright]
