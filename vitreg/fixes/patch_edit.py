"""Changes what a block says of its patches, once it has run.

    class Halved(PatchEdit):
        def change(self, patches):       # (b, p, d), and so what is returned
            return patches / 2

CLS, registers and what other fixes insert before the patches stay as they are.
"""

from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitreg.fixes.base import first_patch
from vitreg.hooks.block_edit import BlockEdit, Inner
from vitreg.models.backbone import Backbone


class PatchEdit(BlockEdit):
    """A block whose patches are changed after it has run."""

    def __init__(self, vit: Backbone, layer: int) -> None:
        self.start = first_patch(vit, layer)

    def run(
        self, block: nn.Module, inner: Inner, x: Float[Tensor, "b n d"], args: Any, kwargs: Any
    ) -> Float[Tensor, "b n d"]:
        y = inner(x, args, kwargs)
        before, patches = y[:, : self.start], y[:, self.start :]
        return torch.cat([before, self.change(patches)], 1)

    @abstractmethod
    def change(self, patches: Float[Tensor, "b p d"]) -> Float[Tensor, "b p d"]:
        """The patches as later blocks, and who reads them, shall see them."""


def along(x: Float[Tensor, "b p d"], basis: Float[Tensor, "r d"]) -> Float[Tensor, "b p d"]:
    """The part of patches that lies in the span of orthonormal rows: x B^T B."""
    rows = basis.to(x)
    return F.linear(F.linear(x, rows), rows.T)


def refuse_skewed(basis: Float[Tensor, "r d"]) -> None:
    """Raise ValueError for rows that are not orthonormal: `along` would scale what it should keep."""
    gram = basis.double() @ basis.double().T
    if not torch.allclose(gram, torch.eye(len(basis), dtype=gram.dtype, device=gram.device), atol=1e-3):
        raise ValueError("the directions are not orthonormal rows. Use torch.linalg.qr(rows.T).Q.T.")
