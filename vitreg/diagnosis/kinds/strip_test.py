"""A second look at what tokens say: what becomes of it when their strip of the photo lies in another one.

    print(strip_test(vit, images))        # a few photos, (b, 3, h, w): two forward passes

A strip of each photo, its upper half, is pasted over that of the next photo. A token that speaks of its own
place goes on saying what it said. A global proxy drops that for what patches below the strip say, though they
show something else; a fixed pattern says what such patches of either photo say (after UniRefiner, arXiv
2605.19622).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from vitreg.diagnosis.kinds.token_sample import ALIKE, ALIKE_IN_PHOTO, UNLIKE, centre
from vitreg.errors import ImageError
from vitreg.models.backbone import Backbone
from vitreg.models.probe import evaluating
from vitreg.tracing.records import trace

DROPPED = 0.5  # a token that resembles what it said in its own photo less than this has dropped it


@dataclass(frozen=True)
class StripTest:
    """Which patches of the pasted strips (the grid's first rows) are fixed patterns, and which proxies."""

    fixed: Bool[Tensor, "b rows gw"]
    proxies: Bool[Tensor, "b rows gw"]

    def __str__(self) -> str:
        fixed, proxies = (float(marked.double().mean()) for marked in (self.fixed, self.proxies))
        return (
            f"pasted into another photo, {proxies:.1%} of the patches say only what that photo says (global"
            f" proxies), and {fixed:.1%} what patches of both photos say (fixed patterns)."
        )


def strip_test(vit: Backbone, images: Float[Tensor, "b 3 h w"]) -> StripTest:
    """Paste a strip of each photo into the next, and compare what its patches say after the last block.

    Features are centred by the middle of each photo's patches. Raises ImageError for fewer than two photos,
    or a grid of fewer than two rows.
    """
    layout = vit.layout_for(images)
    rows, patch = layout.grid[0], vit.anatomy.patch_size[0]
    if len(images) < 2 or rows < 2:
        raise ImageError(
            f"the strip test got {len(images)} photos of {rows} patch rows; expected at least 2 photos of 2"
            " rows."
        )
    strip = slice(0, rows // 2)
    pasted = images.roll(1, 0)
    pasted[:, :, strip.start * patch : strip.stop * patch] = images[
        :, :, strip.start * patch : strip.stop * patch
    ]
    (before, shown), (after, shown_there) = (_last_patches(vit, x) for x in (images, pasted))
    before, after = (_own(x).unflatten(1, layout.grid) for x in (before, after))
    shown, shown_there = (_centred(x).unflatten(1, layout.grid) for x in (shown, shown_there))
    own = _echo(after[:, strip], before, shown[:, strip], shown)
    below = slice(strip.stop, None)
    host = _echo(after[:, strip], after[:, below], shown_there[:, strip], shown_there[:, below])
    dropped = (before * after).sum(-1)[:, strip] < DROPPED
    return StripTest(
        fixed=(host > ALIKE) & (own > ALIKE),
        proxies=(host > ALIKE_IN_PHOTO) & (own < ALIKE) & dropped,
    )


def _own(patches: Float[Tensor, "b p d"]) -> Float[Tensor, "b p d"]:
    return F.normalize(patches - centre(patches), dim=-1)


def _centred(embedded: Float[Tensor, "b p e"]) -> Float[Tensor, "b p e"]:
    return F.normalize(embedded - embedded.mean(1, keepdim=True), dim=-1)


def _echo(
    said: Float[Tensor, "b s gw d"],
    others: Float[Tensor, "b r gw d"],
    shown: Float[Tensor, "b s gw e"],
    others_shown: Float[Tensor, "b r gw e"],
) -> Float[Tensor, "b s gw"]:
    """The largest cosine of each patch of a strip to those of other patches that show something else."""
    alike = said.flatten(1, 2) @ others.flatten(1, 2).transpose(1, 2)
    content = shown.flatten(1, 2) @ others_shown.flatten(1, 2).transpose(1, 2)
    return alike.masked_fill(content >= UNLIKE, -1).amax(-1).view(said.shape[:3])


def _last_patches(vit: Backbone, images: Tensor) -> tuple[Float[Tensor, "b p d"], Float[Tensor, "b p e"]]:
    """Patches after the last block, and their embedding (without one that is known: zeros, all unlike)."""
    embeds = vit.anatomy.patch_embedding is not None
    layers = [vit.anatomy.depth - 1]
    with evaluating(vit.model), trace(vit, residuals=True, embedding=embeds, layers=layers) as t:
        vit(images)
    patches = t.residuals[0][:, t.layout.patch_slice].float()
    return patches, t.embedding.float() if embeds else torch.zeros_like(patches)
