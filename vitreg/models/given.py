"""What a model is given in a pass: images, or the patches of images in a row and a table of their grids."""

from typing import Any, NamedTuple

from jaxtyping import Int
from torch import Tensor

from vitreg.errors import UnsupportedModelError
from vitreg.hooks.stream import tensors_in
from vitreg.models.sizes import Pair


class Given(NamedTuple):
    """What a model is given: images (b, 3, h, w), or a table (b, 2 or 3) of integers: (rows, columns) of each
    image's patches, or (frames, rows, columns)."""

    images: Tensor | None
    table: Tensor | None

    @property
    def images_count(self) -> int:
        known = self.table if self.images is None else self.images
        return 0 if known is None else len(known)

    def grid(self, patch: Pair) -> Pair:
        """Of every image, in patches of so many pixels. Raises UnsupportedModelError where images differ."""
        if self.images is None:
            assert self.table is not None
            return one_grid(self.table)
        height, width = self.images.shape[2:]
        if self.table is not None and one_grid(self.table) != (height, width):
            raise UnsupportedModelError(
                "found images that fill a part of their pixels only: padded to one size."
            )
        return height // patch[0], width // patch[1]


def given_to(args: Any, kwargs: Any) -> Given:
    """The images or the table of grids among a model's arguments."""
    tensors = [tensor for _, tensor in tensors_in((args, kwargs))]
    tables = [x for x in tensors if x.dim() == 2 and x.shape[1] in (2, 3) and not x.is_floating_point()]
    images = [x for x in tensors if x.dim() == 4 and x.shape[1] == 3]
    if tables and images and len(images[0]) == int(tables[0].prod(1).sum()):  # patches, unflattened
        images = []
    return Given(next(iter(images), None), next(iter(tables), None))


def one_grid(table: Int[Tensor, "b _"]) -> Pair:
    """The (rows, columns) that all images of a batch have."""
    if table.shape[1] == 3 and bool((table[:, 0] != 1).any()):
        raise UnsupportedModelError("found several frames for one image: video is not supported.")
    grids = {(int(high), int(wide)) for high, wide in table[:, -2:].tolist()}
    if len(grids) > 1:
        raise UnsupportedModelError(
            f"found images of {len(grids)} patch grids in one batch, such as {sorted(grids)[:2]}: expected"
            " one. Pass images of each size by themselves."
        )
    return grids.pop()
