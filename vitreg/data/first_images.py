"""The first images of many, the same in each process that reads them."""

import itertools
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from vitreg.data.batches import Batch, indices_of, pixels_of
from vitreg.data.images import Images
from vitreg.distributed import ALONE, Ranks
from vitreg.errors import ImageError


def ranks_of(images: object) -> Ranks:
    """The processes that share these images."""
    return images.ranks if isinstance(images, Images) else ALONE


class First:
    """The first images of those that pass by, of all processes; `together` hands them to each of them."""

    def __init__(self, count: int, images: object) -> None:
        self._count, self._ranks = count, ranks_of(images)
        self._kept: list[tuple[int, Tensor]] = []
        self._seen = 0

    def add(self, batch: Batch | Tensor) -> None:
        pixels, numbers = pixels_of(batch), indices_of(batch, self._seen)
        # Copies: a view of a batch would keep all of it, and be sent with all of it.
        self._kept += [(i, row.clone()) for i, row in zip(numbers, pixels, strict=True) if i < self._count]
        self._seen += len(pixels)

    @property
    def complete(self) -> bool:
        return len(self._kept) == self._count

    def together(self) -> Float[Tensor, "b 3 h w"]:
        """Raises ImageError if there are none, or of several sizes."""
        kept = sorted(itertools.chain(*self._ranks.gather(self._kept)), key=lambda pair: pair[0])
        if not kept:
            raise ImageError("there are no images; expected at least one batch.")
        return torch.stack([row for _, row in kept])


def first_images(images: Iterable[Batch] | Iterable[Tensor], count: int) -> Float[Tensor, "b 3 h w"]:
    """The pixels of the first images, the same on every rank."""
    kept = First(count, images)
    for batch in images.first(count) if isinstance(images, Images) else images:
        kept.add(batch)
        if kept.complete:
            break
    return kept.together()
