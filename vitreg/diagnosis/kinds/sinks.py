"""Attention sinks of ordinary norm: patches that every query attends to, whatever it asks and they show.

    diagnosis = diagnose(vit, photos)
    sinks = diagnosis.kind("attention sinks")
    print(sinks)                     # how many, how much attention they draw, at fixed places or not

Attention that follows content has a few queries, or CLS alone, on its side. A sink has all of them: in the
mean over heads, CLS and three of four spread patches (without CLS: half of sixteen, and all of them on
average) alike give it ten times an even share.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitreg.diagnosis.bins import NORMS
from vitreg.diagnosis.kinds.base import AttentionRows, Context, Finding, Meter, shares_of_patches
from vitreg.models.backbone import Backbone
from vitreg.models.layout import TokenLayout

# How many times an even share of the attention to patches a sink draws. In the clean blocks of two real
# models the most drawn patch of 128 photos has 6.6 times (the photos' median: 0.5 to 2.3); in the last block,
# which has sinks, 58 and 33 times (median 17 and 16).
SINK = 10.0
# Sinks are the model's, so they are in many images. At least this share of them, and this many: random
# models of 20 patches, whose attention is peaked, show one in at most 1 of 50 images, DeiT-Ti in 85% of them.
MIN_IMAGES, FEWEST_IMAGES = 0.2, 3
FIXED = 0.5  # a place is fixed where at least this share of the images has a sink


@dataclass(frozen=True)
class SinkFinding(Finding):
    """Patches that draw attention though the norm with which they enter the block is no outlier's.

    All figures are of block `layer`, where they draw most (of sinks of any norm, if they are not present).
    `per_image` counts sinks, `images_with` is the share of images that have any, `attention` the share of
    attention to patches that `asked` gives them, `even` the share that as many patches have on average.
    `at_fixed` is the share of sinks at places where half of the images have one. `high_norm_per_image` and
    `high_norm_attention` are of the sinks that are outliers by norm. `to_prefix` and `to_registers` are per
    layer: how much of their attention over all tokens patches give to CLS and other prefix tokens, and to
    registers (a fix's included). That alone is no artifact.
    """

    kind: ClassVar[str] = "attention sinks"
    title: ClassVar[str] = "Attention sinks of ordinary norm"
    asked: str
    per_image: float
    images_with: float
    attention: float
    even: float
    at_fixed: float
    high_norm_per_image: float
    high_norm_attention: float
    to_prefix: list[float]
    to_registers: list[float]

    def __str__(self) -> str:
        return " ".join([self._sinks(), *self._special()])

    def _sinks(self) -> str:
        if self.present:
            return (
                f"{self.per_image:.1f} patches per image draw {self.attention:.0%} of the {self.asked}"
                f" attention in block {self.layer} (an even share is {self.even:.1%}) though they are no"
                f" outliers by norm; {self.images_with:.0%} of the images have some, and {self.at_fixed:.0%}"
                " of them are at fixed places. Attention maps show these patches beside what the photo holds."
            )
        none = (
            f"in no block do {MIN_IMAGES:.0%} of the images have a patch of ordinary norm to which all"
            f" queries alike give {SINK:.0f} times an even share of attention (block {self.layer}:"
            f" {self.images_with:.0%})."
        )
        if not self.high_norm_per_image:
            return none
        return (
            f"{none} High-norm outliers draw as much there: {self.high_norm_per_image:.1f} per image,"
            f" {self.high_norm_attention:.0%} of the {self.asked} attention."
        )

    def _special(self) -> list[str]:
        """What CLS and register tokens draw, said where it is more than a tenth."""
        said = []
        for name, shares in (("CLS", self.to_prefix), ("registers", self.to_registers)):
            layer = max(range(len(shares)), key=shares.__getitem__)
            if shares[layer] > 0.1:
                said.append(
                    f"Patches give {name} up to {shares[layer]:.0%} of their attention (block {layer})."
                )
        return said


class Sinks(Meter):
    """Sums of sinks by layer and by the norm with which a patch enters it: outliers are not known yet."""

    def __init__(self, vit: Backbone, layout: TokenLayout) -> None:
        super().__init__(vit, layout)
        depth, bins = vit.anatomy.depth, NORMS.count
        self.positions = self.zeros(depth, layout.patches, bins, dtype=torch.int32)  # sinks
        self.attention_drawn = self.zeros(depth, bins)  # by sinks, summed over images
        self.least = self.zeros(depth, bins, dtype=torch.int64)  # images, by their sink of the least norm
        self.special = self.zeros(depth, 2)  # attention of patches to prefix and registers
        self._entering: list[Int[Tensor, "b p"]] = []  # bins; a list, since a Tensor would be a sum

    def start(self) -> None:
        self._entering = []

    def block(self, layer: int, residual: Float[Tensor, "b n d"], norms: Float[Tensor, "b n"]) -> None:
        self._entering = [NORMS.index(norms[:, self.layout.patch_slice])]

    def attention(self, layer: int, rows: AttentionRows) -> None:
        spread, prefix = rows.spread.mean(1), self.layout.prefix
        special = [spread[..., :prefix], spread[..., prefix : rows.patches.start]]
        self.special[layer] += torch.stack([part.sum(-1).mean(1).sum() for part in special])
        if self._entering:  # in block 0 no block has written yet, so no norm says who is an outlier
            typical = shares_of_patches(spread, rows.patches).median(1).values
            self._add_sinks(layer, rows.asked.mean(1), typical)

    def _add_sinks(self, layer: int, asked: Float[Tensor, "b p"], typical: Float[Tensor, "b p"]) -> None:
        sinks = torch.minimum(asked, typical) * self.layout.patches >= SINK
        (bins,) = self._entering
        self.positions[layer].scatter_add_(1, bins.T, sinks.T.int())
        self.attention_drawn[layer].scatter_add_(0, bins.flatten(), (asked * sinks).flatten().double())
        least = torch.where(sinks, bins, NORMS.count).amin(1)
        self.least[layer] += torch.bincount(least, minlength=NORMS.count + 1)[:-1]

    def finding(self, context: Context) -> SinkFinding:
        images = context.images
        ordinary = [NORMS.below(None), *map(NORMS.below, context.thresholds[:-1])]  # as they enter a block
        images_with = _summed(self.least, ordinary, images)
        drawn = _summed(self.attention_drawn, ordinary, images)
        present = [share >= MIN_IMAGES and round(share * images) >= FEWEST_IMAGES for share in images_with]
        ranking = drawn if any(present) else self.attention_drawn.sum(1).tolist()
        layer = max(range(len(ranking)), key=lambda x: (present[x], ranking[x]))
        sinks, outlying = self.positions[layer].double() / images, ~ordinary[layer]
        positions = sinks[:, ordinary[layer]].sum(1)
        per_image = float(positions.sum())
        return SinkFinding(
            present=any(present),
            layer=layer,
            positions=self.layout.as_grid(positions).tolist(),
            asked="CLS" if self.layout.prefix else "patches'",
            per_image=per_image,
            images_with=images_with[layer],
            attention=drawn[layer],
            even=per_image / self.layout.patches,
            at_fixed=float(positions[positions >= FIXED].sum()) / per_image if per_image else 0.0,
            high_norm_per_image=float(sinks[:, outlying].sum()),
            high_norm_attention=float(self.attention_drawn[layer][outlying].sum()) / images,
            to_prefix=(self.special[:, 0] / images).tolist(),
            to_registers=(self.special[:, 1] / images).tolist(),
        )


def _summed(sums: Tensor, bins: list[Bool[Tensor, " k"]], images: int) -> list[float]:
    """Per layer, the sum over some bins, per image."""
    return [float(row[chosen].sum()) / images for row, chosen in zip(sums, bins, strict=True)]
