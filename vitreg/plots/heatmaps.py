"""Photos, their heatmaps, and what lies above the heatmap's mean against the true foreground.

heatmaps(photos, heats, masks).savefig("heatmaps.png")
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, Shaped
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vitreg.plots.style import INK, NORMAL, OUTLIER, PALE, SHARE_COLOURS, house_style, no_frame


@house_style
def heatmaps(
    photos: Sequence[Shaped[np.ndarray, "_ _ 3"]],
    heats: Sequence[Float[np.ndarray, "_ _"]],
    masks: Sequence[Int[np.ndarray, "_ _"]],
) -> Figure:
    """A column for each photo: the photo, its heatmap (each 0 to 1), and the foreground found and missed.

    Masks are above 0 where foreground is, and below 0 where neither is; each has its photo's size.
    """
    figure = Figure(figsize=(max(1.45 * len(photos), 4.5), 4.2), layout="constrained")
    axes = figure.subplots(3, len(photos), squeeze=False)
    for column, (photo, heat, mask) in enumerate(zip(photos, heats, masks, strict=True)):
        axes[0, column].imshow(photo)
        axes[1, column].imshow(heat, cmap=SHARE_COLOURS, vmin=0, vmax=1)
        _draw_answer(axes[2, column], heat > heat.mean(), mask)
    for ax in axes.flat:
        no_frame(ax)
    for ax, words in zip(axes[:, 0], ("photo", "CLS attention", "above its mean"), strict=True):
        ax.set_ylabel(words, color=INK)
    _legend(figure)
    return figure


_ANSWERS = {"found": NORMAL, "missed": OUTLIER, "background taken for it": "#8c959f"}


def _draw_answer(ax: Axes, guess: np.ndarray, mask: np.ndarray) -> None:
    pixels = np.full((*mask.shape, 3), 1.0)
    kinds = (guess & (mask > 0), ~guess & (mask > 0), guess & (mask == 0))
    for kind, colour in zip(kinds, _ANSWERS.values(), strict=True):
        pixels[kind] = _rgb(colour)
    pixels[mask < 0] = _rgb(PALE)
    ax.imshow(pixels, interpolation="nearest")


def _rgb(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))


def _legend(figure: Figure) -> None:
    from matplotlib.patches import Patch

    kinds = (_ANSWERS | {"no class": PALE}).items()
    handles = [
        Patch(color=colour, label=f"foreground {name}" if i < 2 else name)
        for i, (name, colour) in enumerate(kinds)
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles))
