"""Patch features as colours: their first three principal components, red, green and blue.

    colours = PrincipalColours.fit(features)          # (n, d), of one photo or of many
    picture = colours(features_of_a_photo)            # (gh, gw, d) -> (gh, gw, 3), 8 bits

Patches of like colour have like features. The same colours can be given to another version of a model (a fix
changes its features, not their axes); for another model, `matched` turns its own axes so that like places get
like colours.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from vitreg.errors import NonFiniteError

# A colour channel spans all scores but this share at either end.
CLIPPED = 0.01


@dataclass(frozen=True, eq=False)
class PrincipalColours:
    """Axes (d, 3) through a mean (d), each from its `low` to its `high` score (3): 0 to 255 of a colour.

    `explained` (3) is the share of the features' variance along each principal component, largest first.
    """

    mean: Float[Tensor, " d"]
    axes: Float[Tensor, "d 3"]
    low: Float[Tensor, " 3"]
    high: Float[Tensor, " 3"]
    explained: Float[Tensor, " 3"]

    @classmethod
    def fit(cls, features: Float[Tensor, "n d"]) -> "PrincipalColours":
        """The first three principal components of these patches (fewer than three are filled up with none).

        An axis points to where most of its largest entries do, so that the same features give the same
        colours. Raises NonFiniteError for NaN or infinity.
        """
        features = features.double()
        if not features.isfinite().all():
            raise NonFiniteError(
                "the patch features hold NaN or infinity: they have no principal components."
            )
        mean = features.mean(0)
        centred = features - mean
        variances, vectors = torch.linalg.eigh(centred.mT @ centred / max(len(features), 1))
        axes = torch.zeros(features.shape[1], 3, dtype=torch.float64)
        axes[:, : min(3, len(variances))] = vectors.flip(1)[:, :3]
        heaviest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
        axes = axes * torch.where(heaviest < 0, -1.0, 1.0)
        explained = (axes * (centred.mT @ (centred @ axes))).sum(0) / centred.square().sum().clamp(min=1e-300)
        unset = torch.zeros(3, dtype=torch.float64)
        return _spanning(cls(mean, axes, unset, unset, explained), features)

    @classmethod
    def of_most(cls, features: Float[Tensor, "*p d"], *masks: Bool[Tensor, "*p"]) -> "PrincipalColours":
        """Of the patches in the first mask that has enough for three axes, else of all."""
        chosen = next((mask for mask in masks if mask.sum() > 3), None)
        return cls.fit(features.flatten(0, -2) if chosen is None else features[chosen])

    def scores(self, features: Float[Tensor, "*p d"]) -> Float[Tensor, "*p 3"]:
        """Where features lie along the axes."""
        return (features.double() - self.mean) @ self.axes

    def __call__(self, features: Float[Tensor, "*p d"]) -> UInt8[Tensor, "*p 3"]:
        """The features' colours. Those beyond the range of the fitted patches get its ends."""
        unit = (self.scores(features) - self.low) / (self.high - self.low).clamp(min=1e-12)
        return (unit.clamp(0, 1) * 255).round().byte()

    def matched(self, own: Float[Tensor, "n d"], other: Float[Tensor, "n 3"]) -> "PrincipalColours":
        """The same three axes, turned so that these patches' scores come closest to `other` scores of the
        same places (orthogonal Procrustes, both scaled to unit deviations)."""
        scores = self.scores(own)
        mine, theirs = (x / x.std(0, unbiased=False).clamp(min=1e-12) for x in (scores, other.double()))
        left, _, right = torch.linalg.svd(mine.mT @ (theirs - theirs.mean(0)))
        scale = 1 / scores.std(0, unbiased=False).clamp(min=1e-12)
        return _spanning(replace(self, axes=self.axes * scale @ (left @ right)), own)


def _spanning(colours: PrincipalColours, features: Float[Tensor, "n d"]) -> PrincipalColours:
    """These axes, with the range of the features' scores."""
    ends = np.quantile(
        colours.scores(features).numpy(), (CLIPPED, 1 - CLIPPED), axis=0
    )  # torch's has a limit
    low, high = torch.from_numpy(ends)
    return replace(colours, low=low, high=high)


def foreground_of(
    features: Float[Tensor, "b gh gw d"], normal: Bool[Tensor, "b gh gw"]
) -> Bool[Tensor, "b gh gw"]:
    """The patches on one side of the mean of the first principal component, as in DINOv2's pictures.

    The axis is that of the `normal` patches. Which side is the foreground is guessed: the one that has the
    smaller share of the patches at the border.
    """
    side = PrincipalColours.fit(features[normal]).scores(features)[..., 0] > 0
    inner = side[:, 1:-1, 1:-1]
    border = (side.sum() - inner.sum()) / max(side.numel() - inner.numel(), 1)
    return side if border <= side.double().mean() else ~side
