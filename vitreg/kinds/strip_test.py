"""A second look at what tokens say: what becomes of it when their strip of the photo lies in another one.

    print(strip_test(vit, images))        # a few photos, (b, 3, h, w): two forward passes

A strip of patch rows in the middle of each photo is pasted over the same rows of the next photo. A token that
speaks of its own place goes on saying what it said. A fixed pattern does so, too, but says what patches around
the strip say that show something else; a global proxy drops what it said for that (UniRefiner, arXiv 2605.19622).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from vitreg.errors import ImageError
from vitreg.kinds.token_sample import ALIKE, ALIKE_IN_PHOTO, UNLIKE
from vitreg.models import Backbone
from vitreg.probe import evaluating
from vitreg.trace import trace

DROPPED = 0.5  # a token that resembles what it said in its own photo less than this has dropped it


@dataclass(frozen=True)
class StripTest:
    """Which patches of the pasted strips (b, rows, gw) are fixed patterns, and which global proxies.

    `rows` is the first of the strips' rows in the grid.
    """

    fixed: Bool[Tensor, "b rows gw"]
    proxies: Bool[Tensor, "b rows gw"]
    row: int

    def __str__(self) -> str:
        fixed, proxies = (float(marked.double().mean()) for marked in (self.fixed, self.proxies))
        return (
            f"pasted into another photo, {proxies:.1%} of the patches say only what that photo says (global"
            f" proxies), and {fixed:.1%} what patches of both photos say (fixed patterns)."
        )


def strip_test(vit: Backbone, images: Float[Tensor, "b 3 h w"]) -> StripTest:
    """Paste a strip of each photo into the next, and compare what its patches say after the last block.

    Features are centred by the median of all patches. Raises ImageError for fewer than two photos, or a grid of
    fewer than three rows.
    """
    layout = vit.layout_for(images)
    rows, patch = layout.grid[0], vit.anatomy.patch_size[0]
    if len(images) < 2 or rows < 3:
        raise ImageError(
            f"the strip test got {len(images)} photos of {rows} patch rows; expected at least 2 photos of 3 rows."
        )
    strip = slice(rows // 3, rows - rows // 3)
    pasted = images.roll(1, 0)
    pasted[:, :, strip.start * patch : strip.stop * patch] = images[:, :, strip.start * patch : strip.stop * patch]
    before, after, shown = _last_patches(vit, images)[0], *_last_patches(vit, pasted)
    centre = before.flatten(0, 1).median(0).values
    before, after = (F.normalize(x - centre, dim=-1).unflatten(1, layout.grid) for x in (before, after))
    shown = F.normalize(shown - shown.mean(1, keepdim=True), dim=-1).unflatten(1, layout.grid)
    kept = (before * after).sum(-1)[:, strip]
    around = torch.ones(rows, dtype=torch.bool, device=kept.device)
    around[strip] = False
    alike = _pairs(after, strip, around).masked_fill(_pairs(shown, strip, around) >= UNLIKE, -1)
    host = alike.amax(-1).view_as(kept)
    return StripTest(
        fixed=(kept > ALIKE) & (host > ALIKE),
        proxies=(kept < DROPPED) & (host > ALIKE_IN_PHOTO),
        row=strip.start,
    )


def _last_patches(vit: Backbone, images: Tensor) -> tuple[Float[Tensor, "b p d"], Float[Tensor, "b p e"]]:
    """Patches after the last block, and their embedding (without one that is known: zeros, all unlike)."""
    embeds = vit.anatomy.patch_embedding is not None
    layers = [vit.anatomy.depth - 1]
    with evaluating(vit.model), trace(vit, residuals=True, embedding=embeds, layers=layers) as t:
        vit(images)
    patches = t.residuals[0][:, t.layout.patch_slice].float()
    return patches, t.embedding.float() if embeds else torch.zeros_like(patches)


def _pairs(x: Float[Tensor, "b gh gw d"], strip: slice, around: Bool[Tensor, " gh"]) -> Float[Tensor, "b s o"]:
    """Cosines of each patch of the strip to each around it."""
    return x[:, strip].flatten(1, 2) @ x[:, around].flatten(1, 2).transpose(1, 2)
