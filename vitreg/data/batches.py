"""A batch of photos, with their names and their numbers among all photos."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vitreg.errors import ImageError

# Images that a search or a calibration gives to a model at a time.
BATCH = 32


@dataclass(frozen=True)
class Batch:
    """Preprocessed images (CPU, float32) and the path of each; "shard.tar/member.jpg" for a web dataset.

    `places`: of each among all good images, also those of other processes.
    """

    pixels: Float[Tensor, "b 3 h w"]
    names: tuple[str, ...]
    places: range | None = None


def to_batch(images: list[tuple[str, Tensor]], places: range | None = None) -> Batch:
    """Named images (3, h, w) as one batch. Raises ImageError where they differ in size."""
    first, shape = images[0][0], tuple(images[0][1].shape)
    for name, pixels in images:
        if pixels.shape != shape:
            found = f"the preprocess gave {tuple(pixels.shape)} for {name}, but {shape} for {first}"
            raise ImageError(
                f"{found}. A batch needs one size: crop in the preprocess, or pass batch_size=1."
            )
    return Batch(torch.stack([pixels for _, pixels in images]), tuple(name for name, _ in images), places)


def pixels_of(batch: Batch | Tensor) -> Float[Tensor, "b 3 h w"]:
    """The pixels of a batch, or the tensor that was given in its place."""
    return batch.pixels if isinstance(batch, Batch) else batch


def indices_of(batch: Batch | Tensor, seen: int) -> range:
    """Of each image among all, those of other processes, too; so many were `seen` where no batch says it."""
    known = batch.places if isinstance(batch, Batch) else None
    return range(seen, seen + len(pixels_of(batch))) if known is None else known
