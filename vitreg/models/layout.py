"""How the tokens of a pass are ordered: always [prefix | registers | patches].

Nothing else turns this into indices.

layout.patch_slice, layout.patch(row, column)
"""

from dataclasses import dataclass

from jaxtyping import Shaped
from torch import Tensor


@dataclass(frozen=True)
class TokenLayout:
    """How the tokens of one forward pass are ordered: [prefix | registers | patches].

    `prefix` counts CLS and distillation tokens, `registers` the trained register tokens, `grid` is
    (rows, columns) of patches, in row-major order.
    """

    prefix: int
    registers: int
    grid: tuple[int, int]

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        return self.prefix + self.registers + self.patches

    @property
    def prefix_slice(self) -> slice:
        return slice(0, self.prefix)

    @property
    def register_slice(self) -> slice:
        return slice(self.prefix, self.prefix + self.registers)

    @property
    def patch_slice(self) -> slice:
        return slice(self.prefix + self.registers, self.tokens)

    def patch(self, row: int, column: int) -> int:
        """Index of the token of one patch."""
        return self.prefix + self.registers + row * self.grid[1] + column

    def as_grid(self, x: Shaped[Tensor, "*b p"]) -> Shaped[Tensor, "*b gh gw"]:
        """Values per patch, laid out as the image is."""
        return x.unflatten(-1, self.grid)
