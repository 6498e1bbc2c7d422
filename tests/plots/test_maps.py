"""Figures of one photo: what is lit, counted and framed is what was asked for."""

import io

import numpy as np
import pytest
from matplotlib.patches import Rectangle
from PIL import Image

from vitreg.plots.maps import axis_of, norm_histogram, photo_with_patches, side_by_side
from vitreg.plots.style import png

GRID = (4, 5)


def pixels(figure) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png(figure, dpi=100))).convert("RGB")).astype(int)


@pytest.fixture
def photo() -> np.ndarray:
    return np.full((80, 100, 3), 200, np.uint8)


def test_the_photo_has_no_margin_and_marked_patches_keep_their_light(photo: np.ndarray) -> None:
    mask = np.zeros(GRID, bool)
    mask[1, 3] = True
    shown = pixels(photo_with_patches(photo, mask))
    assert shown.shape[:2] == (320, 400)
    centres = shown[40::80, 40::80, 0]
    assert centres.shape == GRID
    assert (centres[mask] == 200).all()
    assert (centres[~mask] < 160).all()


def test_a_photo_without_marks_is_the_photo(photo: np.ndarray) -> None:
    shown = pixels(photo_with_patches(photo, np.zeros(GRID, bool)))
    assert (shown == 200).all()
    framed = pixels(photo_with_patches(photo, np.zeros(GRID, bool), (0, 4)))
    changed = (framed != 200).any(-1).nonzero()
    assert changed[0].max() < 90
    assert changed[1].min() > 310


def test_the_histogram_counts_every_patch_once_on_its_side_of_the_threshold() -> None:
    norms = np.array([[1.0, 2, 3, 4, 100], [1, 2, 3, 4, 250]])
    figure = norm_histogram(norms, 100.0, (2.0, 200.0))
    below, above = (sum(bar.get_height() for bar in bars) for bars in figure.axes[0].containers)
    assert (below, above) == (8, 2)
    labels = [str(line.get_label()) for line in figure.axes[0].lines]
    assert labels == ["threshold 100", "median 3"]


def test_without_a_threshold_nothing_is_above() -> None:
    norms = np.array([[1.0, 2, 3, 4]])
    figure = norm_histogram(norms, None)
    assert sum(bar.get_height() for bar in figure.axes[0].containers[1]) == 0
    assert [str(line.get_label()) for line in figure.axes[0].lines] == ["median 2.5"]
    low, high = axis_of(norms)
    assert low < 1 < 4 < high


@pytest.mark.parametrize("kind", ["norms", "attention", "activation"])
def test_maps_side_by_side_share_a_scale(kind: str) -> None:
    first, second = np.full(GRID, 1.0), np.full(GRID, 1.0)
    second[2, 2] = 9.0
    figure = side_by_side({"before": first, "after": second}, kind, second > 5, (0, 1))
    images = [ax.images[0] for ax in figure.axes[:2]]
    assert images[0].norm is images[1].norm
    assert images[0].norm.vmax == 9.0
    assert [ax.get_title(loc="left") for ax in figure.axes[:2]] == ["before", "after"]
    frames = [x for ax in figure.axes[:2] for x in ax.patches if isinstance(x, Rectangle)]
    assert [frame.get_xy() for frame in frames] == [(1, 0), (1, 0)]


@pytest.mark.parametrize("kind", ["norms", "attention", "activation"])
@pytest.mark.parametrize("value", [0.0, 1.0, 1e-9])
def test_a_map_of_one_value_can_be_drawn(kind: str, value: float) -> None:
    png(side_by_side({"x": np.full(GRID, value)}, kind))


def test_no_map_is_refused() -> None:
    with pytest.raises(ValueError, match="no map"):
        side_by_side({}, "norms")
