"""How a model cuts images into patches: measured on the watched forward pass, never guessed.

    patches = measure_patches(probe, forward)
    patches.grid                        # (rows, columns) of the images that the probe used
    patches.size, patches.padding       # of any images: grid = (image + padding) // size

A convolution's output is the grid. Where no part of the model has such an output, rows and columns of pixels
are changed one by one: the tokens that change with the first ones are the first row and column of the grid.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from vitreg.models.feature import Feature
from vitreg.models.given import one_grid
from vitreg.models.layout import TokenLayout
from vitreg.models.probe import CONTRAST, Forward, Probe, equal_tokens

Pair = tuple[int, int]


@dataclass(frozen=True)
class PatchGeometry:
    """A model's patches: `embedding`, the module that makes them (None: not found), their `grid` (rows,
    columns) on the probe's images, their `size` (height, width) in pixels, and the `padding` that the model
    adds to height and width before it cuts. Without it, pixels that do not fill a patch are left out."""

    embedding: str | None
    grid: Pair
    size: Pair
    padding: Pair


def measure_patches(probe: Probe, forward: Forward) -> PatchGeometry:
    """The patches that enter block 0. Raises UnsupportedModelError where their grid cannot be measured."""
    count = probe.tokens - probe.constant_tokens()
    if probe.calls.in_a_row and probe.given.images is None and probe.given.table is not None:
        return _of_table(probe, probe.given.table, count)
    maps = [feature for feature in probe.features if len(feature.shape) == 4]
    of_grid = [feature for feature in maps if feature.grid[0] * feature.grid[1] == count]
    if of_grid:
        return PatchGeometry(of_grid[-1].name, of_grid[-1].grid, *_sides_of_maps(probe, of_grid))
    rows_of_patches = [feature.name for feature in probe.features if feature.shape[1:-1] == (count,)]
    if maps and not rows_of_patches and count < maps[-1].grid[0] * maps[-1].grid[1]:
        rows, columns = maps[-1].grid
        raise probe.unsupported(
            f"of the {rows}x{columns} cells of {maps[-1].name!r} only {count} enter them as patch tokens."
            " Token dropping and merging are not supported: switch them off"
        )
    grid = _grid_by_touch(probe, forward, count)
    name = rows_of_patches[-1] if rows_of_patches else None
    return PatchGeometry(name, grid, *_sides_by_touch(probe, forward, grid))


def _of_table(probe: Probe, table: Tensor, count: int) -> PatchGeometry:
    """What the table says that the model is given beside patches in a row."""
    (rows, columns), (height, width) = one_grid(table), probe.image_size
    if rows * columns != count or height % rows or width % columns:
        raise probe.unsupported(
            f"they are given {count} tokens for an image of {height}x{width} pixels, where the model is told"
            f" of {rows}x{columns} patches. Token dropping and merging are not supported"
        )
    return PatchGeometry(None, (rows, columns), (height // rows, width // columns), (0, 0))


def prove_grid(probe: Probe, layout: TokenLayout, size: Pair, forward: Forward) -> None:
    """Change the pixels of one patch: its token must move most. Raises UnsupportedModelError if another does.

    Patches far from the diagonal tell rows from columns. Where a stem of convolutions lets pixels reach
    several tokens, it may be the token of a neighbouring patch.
    """
    (rows, columns), (high, wide) = layout.grid, size
    tried = sorted({(0, columns - 1), (rows - 1, 0), (rows // 2, columns // 3)})
    images = probe.noise()[:1].repeat(len(tried) + 1, 1, 1, 1)
    for image, (row, column) in zip(images[1:], tried, strict=True):
        image[:, row * high : (row + 1) * high, column * wide : (column + 1) * wide].add_(CONTRAST)
    plain, *changed = probe.entering(forward, images).float()
    for (row, column), stream in zip(tried, changed, strict=True):
        moved = int((stream - plain).norm(dim=-1).argmax())
        reached = int((~equal_tokens(plain, stream)).sum())
        y, x = divmod(moved - layout.patch(0, 0), columns)
        apart = max(abs(y - row), abs(x - column))
        if apart > (reached > 1):
            raise probe.unsupported(
                f"their {layout.patches} patch tokens are not a grid of {rows}x{columns} in row-major order:"
                f" pixels of the patch in row {row}, column {column} change token {moved} most, not"
                f" {layout.patch(row, column)}. Time steps, several views and other orders of patches are not"
                " supported"
            )


# -- where a map shows the grid ----------------------------------------------------------------------


def _sides_of_maps(probe: Probe, of_grid: list[Feature]) -> tuple[Pair, Pair]:
    """Size and padding of patches, each (vertical, horizontal), by the convolution that cuts images.

    After a stem of several layers, only a size that the grid divides shows them.
    """
    grid = of_grid[-1].grid
    cutting = next(
        (f for f in of_grid if isinstance(f.module, nn.Conv2d) and f.module.in_channels == 3), None
    )
    sides = []
    for axis in (0, 1):
        length, cells = probe.image_size[axis], grid[axis]
        side = _of_convolution(cutting.module, axis, cutting.entering[axis], length) if cutting else None
        if side is None or (length + side[1]) // side[0] != cells:
            side = (length // cells, 0)
            if length % cells:
                (height, width), (rows, columns) = probe.image_size, grid
                near = f"{round(height / rows) * rows}x{round(width / columns) * columns}"
                raise probe.unsupported(
                    f"{rows}x{columns} patches of {height}x{width} pixels do not say how large a patch is",
                    f"Use a size that the grid divides, such as {near}.",
                )
        sides.append(side)
    (high, below), (wide, beside) = sides
    return (high, wide), (below, beside)


def _of_convolution(conv: nn.Module, axis: int, entering: int, length: int) -> Pair | None:
    """Size and padding along one axis of patches that a convolution makes of images.

    A model may bring the image to whole patches before: larger ones are padded, smaller ones are cut.
    """
    assert isinstance(conv, nn.Conv2d)
    stride, kernel = conv.stride[axis], conv.kernel_size[axis]
    margin = 0 if isinstance(conv.padding, str) else conv.padding[axis]  # "same" has stride 1: no patches
    if entering == length:
        return stride, 2 * margin - conv.dilation[axis] * (kernel - 1) - 1 + stride
    if entering == -(-length // stride) * stride:
        return stride, stride - 1
    return (stride, 0) if entering == length // stride * stride else None


# -- where no part of the model shows it ---------------------------------------------------------------


def _grid_by_touch(probe: Probe, forward: Forward, count: int) -> Pair:
    """The grid of `count` patches, by the tokens that the first row and the first column of pixels reach."""
    row, column = _tokens_reached(probe, forward, [(0, 0), (1, 0)])
    rows, columns, start = len(column), len(row), probe.constant_tokens()
    in_order = row == [start + i for i in range(columns)] and column == [
        start + i * columns for i in range(rows)
    ]
    if rows * columns != count or not in_order:
        height, width = probe.image_size
        raise probe.unsupported(
            f"no part of the model shows the grid of their {count} patch tokens, and in an image of"
            f" {height}x{width} pixels the first row of pixels changes {columns} of them and the first column"
            f" {rows}, which is not a grid in row-major order",
            "Pass an Anatomy with the patch size to override.",
        )
    return rows, columns


def _sides_by_touch(probe: Probe, forward: Forward, grid: Pair) -> tuple[Pair, Pair]:
    """Size and padding of patches, by how many rows and columns of pixels reach the first patch."""
    sides = []
    for axis in (0, 1):
        length, cells = probe.image_size[axis], grid[axis]
        possible = [side for side in range(1, length + 1) if cells in (length // side, -(-length // side))]
        reached = _tokens_reached(probe, forward, [(axis, side - 1) for side in possible])
        first = probe.constant_tokens()
        side = max(side for side, tokens in zip(possible, reached, strict=True) if first in tokens)
        sides.append((side, 0 if length // side == cells else side - 1))
    (high, below), (wide, beside) = sides
    return (high, wide), (below, beside)


def _tokens_reached(probe: Probe, forward: Forward, lines: list[Pair]) -> list[list[int]]:
    """The tokens that change with each line of pixels, (0, row) or (1, column)."""
    images = probe.noise()[:1].repeat(len(lines) + 1, 1, 1, 1)
    for image, (axis, place) in zip(images[1:], lines, strict=True):
        image.select(axis + 1, place).add_(CONTRAST)
    stream = probe.entering(forward, images)
    return [(~equal_tokens(stream[0], changed)).nonzero().flatten().tolist() for changed in stream[1:]]
