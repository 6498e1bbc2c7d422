"""Photos for training: a file is decoded as everywhere in vitreg, and one that cannot be is replaced."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
from torch import Tensor

from vitreg.data.decoding import decode, reason
from vitreg.data.evenly_spaced import evenly_spaced
from vitreg.data.images import read_images
from vitreg.data.listing import printable
from vitreg.errors import DataError

Transform = Callable[[PIL.Image.Image], Any]

# So many pictures that cannot be decoded are no accident any more.
IN_A_ROW = 10
# Photos on which a model is diagnosed while it trains.
WATCHED = 64


class TrainingPhotos:
    """A map-style dataset of transformed photos, with their labels if there are any.

    A long run must not end over one damaged file: the next photo takes its place, with a warning that names
    it. Raises DataError where ten in a row are damaged.
    """

    def __init__(
        self, paths: Sequence[Path], transform: Transform, labels: Sequence[int] | None = None
    ) -> None:
        self.paths, self.transform, self.labels = list(paths), transform, labels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        found = readable(
            iter(range(index, index + IN_A_ROW)),
            lambda i: str(self.paths[i % len(self)]),
            lambda i: printable(str(self.paths[i % len(self)])),
        )
        if found is None:
            raise DataError(
                f"ten photos in a row cannot be read, the first of them {printable(str(self.paths[index]))};"
                " warnings say why. See to them."
            )
        i, image = found
        pixels = self.transform(image)
        return pixels if self.labels is None else (pixels, self.labels[i % len(self)])


def readable(
    places: Iterator[int], read: Callable[[int], str | bytes], name: Callable[[int], str]
) -> tuple[int, PIL.Image.Image] | None:
    """The first place whose picture can be decoded, and the picture; warns of those before it by name.

    `read` gives a path or the file's bytes.

    An iterator, for a type checker looks into a sequence by drawing on `random`, as the picture will.
    """
    for place in places:
        try:
            return place, decode(read(place), name=name(place))
        except Exception as error:  # decoders raise what they like
            warnings.warn(f"{name(place)} is left out: {reason(error)}", stacklevel=3)
    return None


def watched(paths: Sequence[Path], transform: Transform, number: int = WATCHED) -> list[Tensor]:
    """Some of the photos, evenly spread, as batches (b, 3, h, w): those to diagnose a model on."""
    chosen = [paths[i] for i in evenly_spaced(len(paths), number)]
    return [batch.pixels for batch in read_images(chosen, transform, batch_size=32, workers=0)]
