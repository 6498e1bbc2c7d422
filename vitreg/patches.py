"""How a model cuts images into patches: measured on the watched forward pass, never guessed.

    patches = measure_patches(probe, forward)
    patches.grid                        # (rows, columns) of the images that the probe used
    patches.size, patches.padding       # of any images: grid = (image + padding) // size

A convolution's output is the grid. Where no part of the model has such an output, one pixel row and one pixel
column of an image are changed: the tokens that change with them are the first row and column of the grid.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from vitreg.probe import Feature, Forward, Probe, _equal_tokens

Pair = tuple[int, int]
CONTRAST = 4.0  # what is added to changed pixels, whose own values are -1 to 1


@dataclass(frozen=True)
class Patches:
    """A model's patches: `embedding`, the module that makes them (None: not found), their `grid` (rows,
    columns) on the probe's images, their `size` (height, width) in pixels, and the `padding` that the model
    adds to height and width before it cuts. Without it, pixels that do not fill a patch are left out."""

    embedding: str | None
    grid: Pair
    size: Pair
    padding: Pair


def measure_patches(probe: Probe, forward: Forward) -> Patches:
    """The patches that enter block 0. Raises UnsupportedModelError where their grid cannot be measured."""
    count = probe.tokens - probe.constant_tokens()
    maps = [feature for feature in probe.features if len(feature.shape) == 4]
    of_grid = [feature for feature in maps if feature.grid[0] * feature.grid[1] == count]
    if of_grid:
        grid = of_grid[-1].grid
        first = next((feature for feature in of_grid if _cuts_images(feature.module)), None)
        return Patches(of_grid[-1].name, grid, *_sides(probe, grid, first))
    rows_of_patches = [feature for feature in probe.features if feature.shape[1:-1] == (count,)]
    if maps and not rows_of_patches and count < maps[-1].grid[0] * maps[-1].grid[1]:
        rows, columns = maps[-1].grid
        raise probe._unsupported(
            f"of the {rows}x{columns} cells of {maps[-1].name!r} only {count} enter them as patch tokens."
            " Token dropping and merging are not supported: switch them off"
        )
    grid = _grid_by_touch(probe, forward, count)
    linear = rows_of_patches[-1] if rows_of_patches else None
    return Patches(linear and linear.name, grid, *_sides(probe, grid, linear))


def _cuts_images(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.in_channels == 3


# -- the grid, where no part of the model shows it ---------------------------------------------------


def _grid_by_touch(probe: Probe, forward: Forward, count: int) -> Pair:
    """The grid of `count` patches, by the tokens that the first row and the first column of pixels reach."""
    images = probe._noise()[:1].repeat(3, 1, 1, 1)
    images[1, :, 0] += CONTRAST
    images[2, :, :, 0] += CONTRAST
    stream = probe.entering(forward, images)
    start = probe.constant_tokens()
    row, column = (_changed(stream, other) for other in (1, 2))
    rows, columns = len(column), len(row)
    in_order = row == list(range(start, start + columns)) and column == [
        start + i * columns for i in range(rows)
    ]
    if rows * columns != count or not in_order:
        height, width = probe.image_size
        raise probe._unsupported(
            f"no part of the model shows the grid of their {count} patch tokens, and in an image of"
            f" {height}x{width} pixels the first row of pixels changes {columns} of them and the first column"
            f" {rows}, which is no grid in row-major order",
            "Pass an Anatomy with the patch size to override.",
        )
    return rows, columns


def _changed(stream: Tensor, other: int) -> list[int]:
    return (~_equal_tokens(stream[0], stream[other])).nonzero().flatten().tolist()


# -- the size of a patch, which says what the grid of other images is ---------------------------------


def _sides(probe: Probe, grid: Pair, feature: Feature | None) -> tuple[Pair, Pair]:
    """Size and padding of patches, each (vertical, horizontal)."""
    module = feature.module if feature else None
    if isinstance(module, nn.Conv2d) and feature and _cuts_images(module):
        sides = [
            _of_convolution(module, axis, feature.entering[axis], probe.image_size[axis]) for axis in (0, 1)
        ]
    elif isinstance(module, nn.Linear):
        sides = _of_linear(module, probe.image_size, grid)
    else:
        sides = [None, None]
    fitting = [
        side if side and (length + side[1]) // side[0] == cells else _even(length, cells)
        for side, length, cells in zip(sides, probe.image_size, grid, strict=True)
    ]
    vertical, horizontal = fitting
    if vertical is None or horizontal is None:
        (height, width), (rows, columns) = probe.image_size, grid
        raise probe._unsupported(
            f"{rows}x{columns} patches of {height}x{width} pixels do not say how large a patch is",
            f"Use a size that the grid divides, such as {_near(height, rows)}x{_near(width, columns)}.",
        )
    return (vertical[0], horizontal[0]), (vertical[1], horizontal[1])


def _near(length: int, cells: int) -> int:
    return round(length / cells) * cells


def _even(length: int, cells: int) -> Pair | None:
    return None if length % cells else (length // cells, 0)


def _of_convolution(conv: nn.Conv2d, axis: int, entering: int, length: int) -> Pair | None:
    """Size and padding along one axis of patches that a convolution makes of images.

    A model may bring the image to whole patches before: larger ones are padded, smaller ones are cut.
    """
    stride, kernel, margin = conv.stride[axis], conv.kernel_size[axis], conv.padding
    if isinstance(margin, str):
        return None
    if entering == length:
        return stride, 2 * margin[axis] - conv.dilation[axis] * (kernel - 1) - 1 + stride
    if entering == -(-length // stride) * stride:
        return stride, stride - 1
    return (stride, 0) if entering == length // stride * stride else None


def _of_linear(linear: nn.Linear, image: Pair, grid: Pair) -> list[Pair | None]:
    """Of patches that a linear layer embeds, three colours of each pixel: the one shape of so many pixels
    with which the image has this grid, cut or padded."""
    pixels, rest = divmod(linear.in_features, 3)
    fitting = {
        ((high, padded * (high - 1)), (wide, padded * (wide - 1)))
        for high in range(1, pixels + 1)
        for wide in ([pixels // high] if pixels % high == 0 and not rest else [])
        for padded in (0, 1)
        if (image[0] + padded * (high - 1)) // high == grid[0]
        and (image[1] + padded * (wide - 1)) // wide == grid[1]
    }
    cut = [sides for sides in fitting if sides[0][1] == sides[1][1] == 0] or list(fitting)
    return list(cut[0]) if len(cut) == 1 else [None, None]
