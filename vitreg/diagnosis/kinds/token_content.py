"""Tokens that say nothing of their place: the same in every photo, or only what the whole photo says.

    report = diagnose(vit, photos)
    report.kind("token content").fixed
    vitreg.diagnosis.kinds.strip_test(vit, images)        # a second look, at a few photos

After UniRefiner (arXiv 2605.19622), in one pass: a *fixed pattern* has, in many other photos, patches that
say nearly the same although they show something else. A *global proxy* says what far patches of its own
photo say, which show something else, and not what the patches beside it say; other photos' proxies say
something else.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from vitreg.diagnosis.kinds.base import Context, Finding, Meter
from vitreg.diagnosis.kinds.token_sample import ALIKE, UNLIKE, Sampled, TokenSample, centre
from vitreg.distributed import Ranks
from vitreg.models.backbone import Backbone
from vitreg.models.layout import TokenLayout

PHOTOS, TOKENS = 32, 32  # sampled of all photos, and of the patches of each
# A token says the same in every photo if so many of the others hold one alike that shows something else (of
# two fixed tokens, about half do): among a sample of their patches, in which a pattern on 4% of them is met
# three times in four, or among all.
OF_SAMPLES, OF_WHOLE_PHOTOS = 0.25, 0.35
# A proxy is alike to less than this share of other photos' patches: where features have so few directions
# that many are alike, those of one photo are so by chance, too.
CHANCE = 0.01
# Shares of tokens from which on there are fixed patterns, or proxies. In sets of 16 to 1000 photos, a DeiT-Ti
# has 3.5 to 6.6% fixed patterns after its last block (its soft outliers), a ViT-Ti 1.4 to 2.1% (its corners),
# and neither has proxies; in blocks 0 to 5, of 64 photos, both have none of either kind. Random models of 52
# architectures have at most 0.3% and 1.3%, in 4214 trials with 9 to 96 photos or noise images.
FIXED, PROXIES = 0.0075, 0.04
FEWEST_PHOTOS, FEWEST_TOKENS = 8, 7


@dataclass(frozen=True)
class TokenContent(Finding):
    """Shares of the patches after the last block that are fixed patterns, and global proxies.

    The shares are of a sample, of patches of `photos` photos that show something; they are None where these
    are too few. `positions` (gh, gw) is the share of those sampled at each place that are either (or 0).
    """

    kind: ClassVar[str] = "token content"
    title: ClassVar[str] = "Tokens that say nothing of their place"
    fixed: float | None
    proxies: float | None
    photos: int

    def __str__(self) -> str:
        if self.fixed is None or self.proxies is None:
            return f"{self.photos} photos that show something are too few to tell what tokens say in each."
        parts = []
        if self.present and self.fixed >= FIXED:
            parts.append(
                f"{self.fixed:.1%} of the patches after the last block say the same in every photo, whatever"
                " they show (fixed patterns)"
            )
        if self.present and self.proxies >= PROXIES:
            parts.append(
                f"{self.proxies:.1%} of the patches after the last block say only what far patches of their"
                " photo say, not what they show or what is beside them (global proxies)"
            )
        if not parts:
            return (
                f"{self.fixed:.1%} of the patches say the same in every photo, {self.proxies:.1%} only what"
                " their whole photo says: no more than chance and content make."
            )
        return "; ".join(parts) + ". Leave them out, or mend them, before you match or segment patches."


class TokenContentMeter(Meter):
    """A sample of patches after the last block, with what they showed, of a sample of photos."""

    def __init__(self, vit: Backbone, layout: TokenLayout) -> None:
        super().__init__(vit, layout)
        self._sample = TokenSample(layout.grid, PHOTOS, TOKENS)
        # Of the pass that runs. Where a model has none, what patches show is known by what they say: nothing
        # that is alike is unlike, and nothing is found.
        self._embedded: list[Tensor] = []

    def embedding(self, patches: Float[Tensor, "b p d"]) -> None:
        self._embedded = [patches]

    def block(self, layer: int, residual: Float[Tensor, "b n d"], norms: Float[Tensor, "b n"]) -> None:
        if layer < self.vit.anatomy.depth - 1:
            return
        patches = self.layout.patch_slice
        shown = self._embedded.pop() if self._embedded else residual[:, patches]
        self._sample.add(residual[:, patches], norms[:, patches], shown)

    def all_reduce(self, ranks: Ranks) -> None:
        self._sample.all_reduce(ranks)

    def finding(self, context: Context) -> TokenContent:
        last = self.vit.anatomy.depth - 1
        sampled = self._sample.sampled and self._sample.sampled.with_contrast()
        photos = len(sampled.draws) if sampled else 0
        if sampled is None or photos < FEWEST_PHOTOS:
            return TokenContent(False, last, None, None, None, photos)
        fixed, proxies = fixed_and_proxies(sampled, self.layout.patches)
        return TokenContent(
            present=_enough(fixed, FIXED) or _enough(proxies, PROXIES),
            layer=last,
            positions=self.layout.as_grid(_by_place(fixed | proxies, sampled, self.layout)).tolist(),
            fixed=float(fixed.double().mean()),
            proxies=float(proxies.double().mean()),
            photos=photos,
        )


def _enough(marked: Bool[Tensor, "i t"], share: float) -> bool:
    return int(marked.sum()) >= max(share * marked.numel(), FEWEST_TOKENS)


def fixed_and_proxies(sampled: Sampled, patches: int) -> tuple[Bool[Tensor, "i t"], Bool[Tensor, "i t"]]:
    """Which of the sampled tokens say the same in every photo, and which only what their whole photo says.

    `patches` is how many each photo has.

    Features are centred twice, by all tokens and by those of their own photo: what tells photos apart, such
    as their brightness, is no pattern, and neither is what tells one patch from the others of its photo only.
    """
    photos, tokens = sampled.cells.shape
    own = F.normalize(sampled.features - centre(sampled.features), dim=-1).flatten(0, 1)
    of_all = sampled.features.flatten(0, 1)
    of_all = F.normalize(of_all - centre(of_all), dim=-1)
    shown = F.normalize(sampled.contents.flatten(0, 1), dim=-1)
    photo = torch.arange(photos, device=own.device).repeat_interleave(tokens)
    unlike = (shown @ shown.T < UNLIKE) & (photo != photo[:, None])
    alike = (own @ own.T > ALIKE) & unlike
    met = (alike & (of_all @ of_all.T > ALIKE)).unflatten(1, (photos, tokens)).any(2).sum(1)
    every = OF_SAMPLES + (OF_WHOLE_PHOTOS - OF_SAMPLES) * (tokens / patches) ** 2
    fixed = met >= max(every * (photos - 1), 3)
    rare = alike.sum(1) < CHANCE * unlike.sum(1)
    return fixed.view(photos, tokens), (sampled.alone.flatten() & ~fixed & rare).view(photos, tokens)


def _by_place(marked: Bool[Tensor, "i t"], sampled: Sampled, layout: TokenLayout) -> Float[Tensor, " p"]:
    cells = sampled.cells.flatten()
    count = torch.bincount(cells, minlength=layout.patches)
    return torch.bincount(cells, marked.flatten().double(), layout.patches) / count.clamp(min=1)
