"""Plant tokens that say nothing of their place: fixed patterns, or global proxies.

    phantom = plant_token_content(vit, images, layer=11, says="the same")     # or "the photo"
    phantom.marked(images)            # (b, gh, gw): the patches that were overwritten

Which patches are overwritten depends on what they hold, as good as at random, and not on their place.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from vitreg.models.backbone import Backbone
from vitreg.phantoms.changed_patches import patches_after, with_changed_patches

Says = Literal["the same", "the photo"]


@dataclass(frozen=True)
class TokenContentPhantom:
    """A planted model and its truth: after block `layer`, `rate` of each photo's patches say only one thing.

    `clean` is the model that it was planted in.
    """

    vit: Backbone
    clean: Backbone
    layer: int
    overwrites: "_Overwrites"

    def marked(self, images: Float[Tensor, "b 3 h w"]) -> Bool[Tensor, "b gh gw"]:
        """The ground truth for any images: the patches that are overwritten."""
        patches = patches_after(self.clean, images, self.layer)
        return self.clean.layout_for(images).as_grid(self.overwrites.marked(patches))


def plant_token_content(
    vit: Backbone,
    images: Float[Tensor, "b 3 h w"],
    layer: int,
    *,
    says: Says,
    rate: float = 0.1,
    strength: float = 3.0,
    seed: int = 0,
) -> TokenContentPhantom:
    """Overwrite `rate` of each photo's patches after block `layer` (0-based) of a copy of `vit`.

    With "the same", all by one vector; with "the photo", by one that follows from the mean of the photo's
    patches and from nothing else. The vectors lie `strength` times the other patches' distance (root mean
    square, over `images`) from the mean of all or of the photo's patches. Raises ValueError for a rate that
    marks none, or most, of the patches, or a layer out of range.
    """
    if not 1 <= round(rate * vit.layout.patches) <= vit.layout.patches // 2:
        raise ValueError(
            f"rate={rate}: expected one that marks 1 to {vit.layout.patches // 2} of {vit.layout.patches}"
            " patches."
        )
    patches = patches_after(vit, images, layer)
    generator = torch.Generator().manual_seed(seed)
    width = vit.anatomy.width
    centre = patches.mean((0, 1))
    overwrites = _Overwrites(
        rate=rate,
        reads=F.normalize(torch.randn(width, generator=generator), dim=0).to(patches),
        mixes=torch.randn(width, width, generator=generator).to(patches) if says == "the photo" else None,
        fixed=F.normalize(torch.randn(width, generator=generator), dim=0).to(patches),
        centre=centre,
        spread=float((patches - centre).square().sum(-1).mean().sqrt()),
        strength=strength,
    )
    planted = with_changed_patches(vit, layer, overwrites, f"tokens that say {says}")
    return TokenContentPhantom(planted, vit, layer, overwrites)


@dataclass(frozen=True)
class _Overwrites:
    """The change itself. `mixes` (d, d) gives a photo a direction by its mean patch (None: all the same)."""

    rate: float
    reads: Float[Tensor, " d"]
    mixes: Float[Tensor, "d d"] | None
    fixed: Float[Tensor, " d"]
    centre: Float[Tensor, " d"]
    spread: float
    strength: float

    def marked(self, patches: Float[Tensor, "b p d"]) -> Bool[Tensor, "b p"]:
        # The sine folds the reading so often that what is marked has no content in common.
        scores = torch.sin(40 / self.spread * (patches.float() - self.centre) @ self.reads)
        lowest = scores.topk(round(self.rate * patches.shape[1]), 1).values[:, -1:]
        return scores >= lowest

    def __call__(self, patches: Float[Tensor, "b p d"]) -> Float[Tensor, "b p d"]:
        base, direction = self.centre, self.fixed
        if self.mixes is not None:
            base = patches.float().mean(1, keepdim=True)
            # Folded likewise: photos that are alike in one respect still say different things.
            direction = F.normalize(torch.sin(5 / self.spread * (base - self.centre) @ self.mixes), dim=-1)
        said = (base + self.strength * self.spread * direction).to(patches)
        return torch.where(self.marked(patches)[..., None], said, patches)
