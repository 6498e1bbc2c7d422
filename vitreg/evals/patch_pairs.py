"""All pairs of patches, a block of rows at a time: at once, those of a photo of 12 megapixels take 18 GB."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float, UInt8

BLOCK_BYTES = 64 << 20  # that the dot products of a block take
_CHUNK_BYTES = 1 << 20  # of bits that are numbers again: they stay in a processor's cache


def dot_products(
    rows: Float[np.ndarray, "r d"], columns: Float[np.ndarray, "p d"]
) -> Iterator[tuple[slice, Float[np.ndarray, "_ p"]]]:
    """rows @ columns.T in blocks of rows, each with its place."""
    for block in _blocks(len(rows), 8 * len(columns), BLOCK_BYTES):
        yield block, rows[block] @ columns.T


class LikePairs:
    """Which pairs of patches have a dot product beyond `least`: one bit each, p * p / 8 bytes."""

    def __init__(self, rows: Float[np.ndarray, "p d"], least: float) -> None:
        self.patches = len(rows)
        self._bits: UInt8[np.ndarray, "p c"] = np.empty((len(rows), -(-len(rows) // 8)), np.uint8)
        for block, products in dot_products(rows, rows):
            self._bits[block] = np.packbits(products > least, axis=1)

    def dense(self) -> Bool[np.ndarray, "p p"]:
        """All pairs as a matrix."""
        return np.unpackbits(self._bits, axis=1, count=self.patches).astype(bool)

    def sums(self, values: Float[np.ndarray, " p"]) -> Float[np.ndarray, " p"]:
        """For each patch, the sum of the values of the patches that are like it."""
        found = np.empty(self.patches)
        for block in _blocks(self.patches, 8 * self.patches, _CHUNK_BYTES):
            found[block] = np.unpackbits(self._bits[block], axis=1, count=self.patches) @ values
        return found


def _blocks(count: int, bytes_each: int, most: int) -> Iterator[slice]:
    size = max(1, most // max(1, bytes_each))
    return (slice(start, start + size) for start in range(0, count, size))
