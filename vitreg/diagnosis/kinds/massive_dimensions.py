"""Massive dimensions: a few residual channels that dominate every token, and the cosines between patches.

    diagnosis = diagnose(vit, photos)
    massive = diagnosis.kind("massive dimensions")
    print(massive)                   # which, how large, what is left of the cosines without them

Sun et al. (2024) describe massive activations, DINOv3's authors theirs. Every token counts alike, as a unit
vector: a few high-norm outliers, whose excess lies in one or two channels, do not make these massive.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from vitreg.diagnosis.kinds.base import Context, Finding, Meter
from vitreg.models.backbone import Backbone
from vitreg.models.layout import TokenLayout

# A massive dimension's mean |value| is at least this many times the median dimension's (random models: up
# to 4.7; clean blocks of two real models: 5.5 and 11.6). It is so in every token: its squared mean |value|
# over its mean square is 1 for one size everywhere, and f where a part f of the tokens has all of it.
MASSIVE, STEADY = 10.0, 0.85
# They dominate if they carry half of a token's squared norm on average: more than all others together. The
# real ViT-Ti's dimension 41 carries 21% after block 1, the most of any clean block.
DOMINATES = 0.5
FEW = 8  # more dimensions than these are no few
SAMPLED = 32  # patches per image, spread evenly


@dataclass(frozen=True)
class MassiveFinding(Finding):
    """The largest residual `dimensions` after block `layer`, with their figures.

    `sizes` are their mean |value| over the median dimension's, tokens taken as unit vectors, `share` what
    they carry of a patch's squared norm together, on average. `cosine` is the mean between patches of
    different places in one image, `cosine_without` the same of what is left without these dimensions (mean
    inner product over mean squared length, so patches of which little is left count little). Where none is
    massive the single largest one is named.
    """

    kind: ClassVar[str] = "massive dimensions"
    title: ClassVar[str] = "Massive dimensions"
    dimensions: list[int]
    sizes: list[float]
    share: float
    cosine: float
    cosine_without: float

    def __str__(self) -> str:
        names = ", ".join(map(str, self.dimensions))
        if not self.present:
            return (
                f"no few residual dimensions dominate every patch. The largest, {names}, is"
                f" {self.sizes[0]:.1f}x the median one and carries {self.share:.0%} of the squared norm"
                f" (block {self.layer}); the mean cosine between patches is {self.cosine:.2f} with it,"
                f" {self.cosine_without:.2f} without."
            )
        one = len(self.dimensions) == 1
        carry, them = ("dimension {} carries", "it") if one else ("dimensions {} carry", "them")
        return (
            f"after block {self.layer} {carry.format(names)} {self.share:.0%} of the squared norm of nearly"
            f" every patch (up to {self.sizes[0]:.0f}x the median dimension). The mean cosine between patches"
            f" of one image is {self.cosine:.2f} with {them}, {self.cosine_without:.2f} without: leave {them}"
            " out, or standardise features, before comparing patches."
        )


class MassiveDimensions(Meter):
    """Sums per layer and dimension over evenly spread patches, as unit vectors."""

    def __init__(self, vit: Backbone, layout: TokenLayout) -> None:
        super().__init__(vit, layout)
        depth, width = vit.anatomy.depth, vit.anatomy.width
        self.sizes = self.zeros(depth, width)  # |value|
        self.squares = self.zeros(depth, width)
        self.products = self.zeros(depth, width)  # of the values of all pairs of patches of one image
        count = min(SAMPLED, layout.patches)
        first = layout.patch_slice.start
        self._sampled = [first + int((i + 0.5) * layout.patches / count) for i in range(count)]

    def block(self, layer: int, residual: Float[Tensor, "b n d"], norms: Float[Tensor, "b n"]) -> None:
        sampled = residual.index_select(1, torch.tensor(self._sampled, device=residual.device))
        patches = F.normalize(sampled.float(), dim=-1)
        squares = patches.square().sum((0, 1))
        self.sizes[layer] += patches.abs().sum((0, 1))
        self.squares[layer] += squares
        self.products[layer] += patches.sum(1).square().sum(0) - squares

    def finding(self, context: Context) -> MassiveFinding:
        layers = [self._found(layer, context.images) for layer in range(len(self.sizes))]
        return max(layers, key=lambda found: (found.present, found.share))

    def _found(self, layer: int, images: int) -> MassiveFinding:
        count = len(self._sampled)
        pairs = images * count * max(count - 1, 1)
        means, shares = self.sizes[layer] / (images * count), self.squares[layer] / (images * count)
        sizes = means / means.median()
        massive = _massive(sizes, means.square() / shares)
        present = 0 < len(massive) <= FEW and float(shares[massive].sum()) >= DOMINATES
        named = massive if present else shares.argmax()[None]
        left = torch.ones_like(shares, dtype=torch.bool)
        left[named] = False
        return MassiveFinding(
            present=present,
            layer=layer,
            positions=None,
            dimensions=named.tolist(),
            sizes=sizes[named].tolist(),
            share=float(shares[named].sum()),
            cosine=float(self.products[layer].sum()) / pairs,
            cosine_without=float(self.products[layer][left].sum() / pairs / shares[left].sum()),
        )


def _massive(sizes: Float[Tensor, " d"], steadiness: Float[Tensor, " d"]) -> Int[Tensor, " massive"]:
    """The massive dimensions, largest first."""
    massive = ((sizes >= MASSIVE) & (steadiness >= STEADY)).nonzero()[:, 0]
    return massive[sizes[massive].argsort(descending=True)]
