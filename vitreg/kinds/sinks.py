"""Attention sinks of ordinary norm: patches that every query attends to, whatever it asks and they show.

    diagnosis = diagnose(vit, photos)
    sinks = next(finding for finding in diagnosis.kinds if finding.kind == "attention sinks")
    print(sinks)                     # how many, how much attention they draw, at fixed places or not

Attention that follows content has a few queries, or CLS alone, on its side. A sink has all of them: in the
mean over heads, CLS and the median of evenly spread patches alike give it ten times an even share.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitreg.anatomy import TokenLayout
from vitreg.attention import AttentionCall
from vitreg.kinds.base import Context, Finding, Meter
from vitreg.kinds.bins import LogBins
from vitreg.models import Backbone

# How many times an even share of the attention to patches a sink draws. In the clean blocks of two real
# models the most drawn patch of 256 photos has 6.4 times (their median 0.4 to 2.4); in the late blocks that
# have sinks, 55 and 32 times (median 17 and 16).
SINK = 10.0
# Sinks are the model's, so they are in many photos. At least this share of them, and this many: a random
# model of 20 patches, whose attention is peaked, shows one in at most 1 of 50 photos.
MIN_PHOTOS, FEWEST_PHOTOS = 0.2, 3
PATCH_QUERIES = 8  # beside CLS; their median must agree, so that none of them can make a sink alone
FIXED = 0.5  # a place is fixed where at least this share of the photos has a sink
NORMS = LogBins(-6, 18)


@dataclass(frozen=True)
class SinkFinding(Finding):
    """Patches that draw attention though the norm with which they enter the block is no outlier's.

    All figures are of block `layer`. `per_image` counts sinks, `images_with` is the share of images that have
    any, `attention` the share of attention to patches that `asked` gives them, `even` the share that as many
    patches have on average. `at_fixed` is the share of sinks at places where half of the images have one.
    `high_norm_per_image` and `high_norm_attention` are of the sinks that are outliers by norm. Per layer:
    how much of their attention over all tokens patches give to CLS and other prefix tokens, and to registers
    (a fix's included), and CLS the same. That alone is no artifact.
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
    patches_to_prefix: list[float]
    patches_to_registers: list[float]
    cls_to_prefix: list[float]
    cls_to_registers: list[float]

    def __str__(self) -> str:
        return " ".join([self._sinks(), *self._special()])

    def _sinks(self) -> str:
        if self.present:
            return (
                f"{self.per_image:.1f} patches per image draw {self.attention:.0%} of the {self.asked} attention"
                f" in block {self.layer} (an even share is {self.even:.1%}) though their norms are ordinary;"
                f" {self.images_with:.0%} of the images have some, {self.at_fixed:.0%} of them are at fixed"
                " places. Attention maps show these patches, not only what the photo holds."
            )
        most = (
            f"no patch of ordinary norm draws {SINK:.0f} times an even share of attention from all queries in"
            f" {MIN_PHOTOS:.0%} of the images (block {self.layer} comes closest: {self.images_with:.1%})."
        )
        if not self.high_norm_per_image:
            return most
        return (
            f"{most} Patches that draw as much are high-norm outliers: {self.high_norm_per_image:.1f} per image,"
            f" {self.high_norm_attention:.0%} of the {self.asked} attention in that block."
        )

    def _special(self) -> list[str]:
        """What CLS and register tokens draw, said where it is more than a tenth."""
        said = []
        for name, shares in (("CLS", self.patches_to_prefix), ("registers", self.patches_to_registers)):
            layer = max(range(len(shares)), key=shares.__getitem__)
            if shares[layer] > 0.1:
                said.append(f"Patches give {name} up to {shares[layer]:.0%} of their attention (block {layer}).")
        return said


class Sinks(Meter):
    """Sums of sinks by layer and by the norm with which a patch enters it, since outliers are not known yet."""

    def __init__(self, vit: Backbone, layout: TokenLayout) -> None:
        super().__init__(vit, layout)
        depth, bins = vit.anatomy.depth, NORMS.count
        self.positions = self.zeros(depth, layout.patches, bins, dtype=torch.int32)  # sinks
        self.attention_drawn = self.zeros(depth, bins)  # by sinks, summed over images
        self.least = self.zeros(depth, bins, dtype=torch.int64)  # images, by their sink of the least norm
        self.special = self.zeros(depth, 2, 2)  # attention of (patches, CLS) to (prefix, registers)
        # Not a Tensor: those are sums.
        self._entering: list[Int[Tensor, "b p"]] = []
        count = min(PATCH_QUERIES, layout.patches)
        self._queries = [int((i + 0.5) * layout.patches / count) for i in range(count)]

    def start(self) -> None:
        self._entering = []

    def block(self, layer: int, residual: Float[Tensor, "b n d"], norms: Float[Tensor, "b n"]) -> None:
        self._entering = [NORMS.index(norms[:, self.layout.patch_slice])]

    def attention(self, layer: int, call: AttentionCall, shares: Float[Tensor, "b h p"]) -> None:
        first = call.tokens - self.layout.patches  # a fix may carry tokens of its own before the patches
        prefix = self.layout.prefix
        queries = [0] * bool(prefix) + [first + patch for patch in self._queries]
        rows = call.rows(torch.tensor(queries, device=self.vit.device)).mean(1)
        by_cls, by_patches = rows[:, : bool(prefix)], rows[:, bool(prefix) :]
        for asker, asked in enumerate((by_patches, by_cls)):
            if asked.shape[1]:
                self.special[layer, asker, 0] += asked[..., :prefix].sum(-1).mean(1).sum()
                self.special[layer, asker, 1] += asked[..., prefix:first].sum(-1).mean(1).sum()
        if self._entering:  # block 0: no block has written yet, so no norm says who is an outlier
            self._add_sinks(layer, by_cls[..., first:], by_patches[..., first:])

    def _add_sinks(
        self, layer: int, by_cls: Float[Tensor, "b c p"], by_patches: Float[Tensor, "b q p"]
    ) -> None:
        typical = _shares(by_patches).median(1).values
        asked = _shares(by_cls)[:, 0] if by_cls.shape[1] else typical
        sinks = torch.minimum(asked, typical) * self.layout.patches >= SINK
        (bins,) = self._entering
        self.positions[layer].scatter_add_(1, bins.T, sinks.T.int())
        drawn = (asked * sinks).flatten().double()
        self.attention_drawn[layer].scatter_add_(0, bins.flatten(), drawn)
        least = torch.where(sinks, bins, NORMS.count).amin(1)
        self.least[layer] += torch.bincount(least, minlength=NORMS.count + 1)[:-1]

    def finding(self, context: Context) -> SinkFinding:
        ordinary = [NORMS.below(None), *map(NORMS.below, context.thresholds[:-1])]  # as they enter a block
        images = context.images
        images_with = [
            float(least[bins].sum()) / images for least, bins in zip(self.least, ordinary, strict=True)
        ]
        drawn = [float(x[bins].sum()) for x, bins in zip(self.attention_drawn, ordinary, strict=True)]
        enough = [
            share >= MIN_PHOTOS and round(share * images) >= FEWEST_PHOTOS for share in images_with
        ]
        layer = max(range(len(drawn)), key=lambda x: (enough[x], drawn[x] if any(enough) else images_with[x]))
        positions = self.positions[layer][:, ordinary[layer]].sum(1).double() / images
        outliers = self.positions[layer][:, ~ordinary[layer]].sum()
        per_image = float(positions.sum())
        special = (self.special / images).tolist()
        return SinkFinding(
            present=any(enough),
            layer=layer,
            positions=self.layout.as_grid(positions).tolist(),
            asked="CLS" if self.layout.prefix else "patches'",
            per_image=per_image,
            images_with=images_with[layer],
            attention=drawn[layer] / images,
            even=per_image / self.layout.patches,
            at_fixed=float(positions[positions >= FIXED].sum()) / per_image if per_image else 0.0,
            high_norm_per_image=int(outliers) / images,
            high_norm_attention=float(self.attention_drawn[layer][~ordinary[layer]].sum()) / images,
            patches_to_prefix=[asker[0][0] for asker in special],
            patches_to_registers=[asker[0][1] for asker in special],
            cls_to_prefix=[asker[1][0] for asker in special],
            cls_to_registers=[asker[1][1] for asker in special],
        )


def _shares(rows: Float[Tensor, "b q p"]) -> Float[Tensor, "b q p"]:
    """Attention to patches as shares of what goes to patches."""
    return rows / rows.sum(-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
