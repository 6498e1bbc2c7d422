"""Position-bound patterns: what patch features show at each place in every photo, whatever it shows.

    report = diagnose(vit, photos)
    report.kind("position pattern").share

A patch feature is the sum of a mean, a part of its position, a part of its photo and the rest (a two-way
analysis of variance). Few photos leave some of the rest in the mean over photos, which would look like a
pattern: the expected amount is taken off, so that the shares are right on average for any number of photos.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from vitreg.diagnosis.kinds.base import Context, Finding, Meter
from vitreg.models.backbone import Backbone
from vitreg.models.layout import TokenLayout

# From this share on, position says more in the features than all that photos differ in. Every ViT holds
# positions: 2% after the last block of a DeiT-Ti, 5 to 14% in its middle blocks and in those of a ViT-Ti, at
# most 30% (both, block 1), falling with depth; random models of 50 architectures hold up to 20%, falling too.
# The one real model with a pattern has 88% after its last block: the four corners, the same in every photo.
DOMINANT = 0.5

# With less variety, images say nothing of what is bound to positions: the mean of blank ones is themselves.
# It is the variance of the patch embedding within images, over that of all patches, and over the mean square.
# Photos: at least 0.45 and 0.3 (52 architectures); blank images and images of one colour each: 0.
VARIED_WITHIN, VARIED_AT_ALL = 0.1, 0.01


@dataclass(frozen=True)
class PositionPattern(Finding):
    """How much of the variance of patch features is between positions, and of what kind that part is.

    `shares` are those after the blocks `layers` (0-based), `share` that after the last block, which decides;
    `photo_share` is what is common to all patches of a photo there. `effective_rank` is the number of
    directions that the pattern takes there (participation ratio of its spectrum; few photos enlarge it). All
    are None where the images do not vary, or where there is one only. `positions` (gh, gw) is the share of a
    patch's own variance that is the same in every photo.
    """

    kind: ClassVar[str] = "position pattern"
    title: ClassVar[str] = "Position-bound pattern"
    layers: tuple[int, ...]
    shares: tuple[float, ...] | None
    share: float | None
    photo_share: float | None
    effective_rank: float | None

    def __str__(self) -> str:
        if self.share is None:
            return "these images are too few or too much alike to tell what is bound to positions."
        figures = (
            f"{self.share:.0%} of the variance of the patch features after the last block is the same in"
            " every photo at each position"
        )
        if not self.present:
            return f"{figures}, as is ordinary (an artifact from {DOMINANT:.0%} on)."
        return (
            f"{figures}, in about {self.effective_rank:.0f} direction(s): the mean over photos shows it."
            " Project it out before you match patches."
        )


class PositionPatterns(Meter):
    """Sums per position over images, after four blocks at the quarters of the depth."""

    def __init__(self, vit: Backbone, layout: TokenLayout) -> None:
        super().__init__(vit, layout)
        depth, width = vit.anatomy.depth, vit.anatomy.width
        self.layers = tuple(sorted({max(depth * quarter // 4 - 1, 0) for quarter in (1, 2, 3, 4)}))
        self.at_positions = self.zeros(len(self.layers), layout.patches, width)  # sums over images
        self.squares = self.zeros(len(self.layers), 2)  # of the patches; of the mean patch of each image
        self.embedded = self.zeros(0)  # sum over images of the mean patch embedding, once its width is known
        self.embedded_squares = self.zeros(2)  # as `squares`

    def embedding(self, patches: Float[Tensor, "b p d"]) -> None:
        means = patches.mean(1, dtype=torch.float32).double()
        if not len(self.embedded):
            self.embedded = self.zeros(means.shape[1])
        norms = torch.linalg.vector_norm(patches, dim=-1, dtype=torch.float32)
        self.embedded += means.sum(0)
        self.embedded_squares += torch.stack([norms.double().square().sum(), means.square().sum()])

    def block(self, layer: int, residual: Float[Tensor, "b n d"], norms: Float[Tensor, "b n"]) -> None:
        if layer not in self.layers:
            return
        row, patches = self.layers.index(layer), residual[:, self.layout.patch_slice]
        self.at_positions[row] += patches.sum(0, dtype=torch.float32)
        means = patches.mean(1, dtype=torch.float32).double()
        all_squares = norms[:, self.layout.patch_slice].double().square().sum()
        self.squares[row] += torch.stack([all_squares, means.square().sum()])

    def finding(self, context: Context) -> PositionPattern:
        varied = context.images > 1 and self.layout.patches > 1 and self._varied(context.images)
        last = self.layers[-1]
        if not varied:
            return PositionPattern(False, last, None, self.layers, None, None, None, None)
        parts = [
            components(sums / context.images, float(squares), float(mean_squares), context.images)
            for sums, (squares, mean_squares) in zip(self.at_positions, self.squares, strict=True)
        ]
        shares = tuple(part.position / part.total for part in parts)
        return PositionPattern(
            present=shares[-1] >= DOMINANT,
            layer=last,
            positions=self.layout.as_grid(parts[-1].by_position()).tolist(),
            layers=self.layers,
            shares=shares,
            share=shares[-1],
            photo_share=parts[-1].photo / parts[-1].total,
            effective_rank=effective_rank(parts[-1].pattern),
        )

    def _varied(self, images: int) -> bool:
        """Whether the images' own content varies, from patch to patch within them."""
        if not len(self.embedded):  # a model without a patch embedding that could be watched
            return True
        squares, mean_squares = self.embedded_squares.tolist()
        patches = self.layout.patches
        within = squares - patches * mean_squares
        total = squares - patches * float(self.embedded.square().sum()) / images
        return within > VARIED_WITHIN * total and within > VARIED_AT_ALL * squares


@dataclass(frozen=True)
class Components:
    """Variance of patch features, per patch: between positions, between photos, and what is left.

    `pattern` (p, d) is the mean over photos at each position, less the mean of all.
    """

    position: float
    photo: float
    rest: float
    pattern: Float[Tensor, "p d"]
    images: int

    @property
    def total(self) -> float:
        return self.position + self.photo + self.rest

    def by_position(self) -> Float[Tensor, " p"]:
        """Per position, the share of the variance there that is the same in every photo."""
        noise = self.rest / self.images
        own = (self.pattern.square().sum(1) - noise).clamp(min=0)
        return own / (own + self.photo + self.rest)


def components(means: Float[Tensor, "p d"], squares: float, mean_squares: float, images: int) -> Components:
    """Two-way variance components of `images` photos by p positions, without replication.

    `means` are over photos, `squares` the sum of all squared norms, `mean_squares` that of the photos' mean
    patches. With mean squares MS of positions, photos and the rest: rest = MS_rest, position =
    (MS_position - MS_rest) / photos, photo = (MS_photo - MS_rest) / positions (never below zero). The
    expectations hold however patches of one photo depend on each other.
    """
    positions = len(means)
    centre = means.mean(0)
    pattern = means - centre
    middle = float(centre.square().sum())
    between_positions = images * float(pattern.square().sum())
    between_photos = positions * (mean_squares - images * middle)
    whole = squares - images * positions * middle
    rest = max(whole - between_positions - between_photos, 0.0) / ((images - 1) * (positions - 1))
    position = max(between_positions / (positions - 1) - rest, 0.0) / images
    photo = max(between_photos / (images - 1) - rest, 0.0) / positions
    # Never zero in all: models that give every patch the same feature have nothing bound to positions.
    return Components(position, photo, max(rest, 1e-12 * squares), pattern, images)


def effective_rank(pattern: Float[Tensor, "p d"]) -> float:
    """Participation ratio of a pattern's spectrum, trace(G)^2 / trace(G^2) for G its Gram matrix."""
    gram = pattern @ pattern.T if len(pattern) < pattern.shape[1] else pattern.T @ pattern
    return float(gram.trace().square() / gram.square().sum().clamp(min=1e-300))
