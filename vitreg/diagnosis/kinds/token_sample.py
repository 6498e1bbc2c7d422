"""A sample of patches of a sample of photos, of fixed size, that any order and any processes make alike.

    sample = TokenSample(photos=64, tokens=32)
    sample.add(patches, norms, embedded)  # of each batch: after the last block, and as they were embedded
    sample.features, sample.contents      # (i, t, d) of up to 64 photos, 32 patches of each

Which photos stay, and which of their patches, is drawn from a number that the photo's own content gives
(bottom-k sampling): so the sample does not depend on the order of the photos, nor on who read them.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitreg.distributed import Ranks

# Patches say nearly the same (cosine of centred features) though they show something else (cosine of centred
# patch embeddings). Of such pairs in different photos, 1 in 1000 reaches 0.5 in blocks 3 and 5 of two real
# models.
ALIKE, UNLIKE = 0.8, 0.0
# Far places of one photo are proxies only if they say it still more alike (parts of one object reach 0.8),
# and in spite of the patches beside them.
ALIKE_IN_PHOTO, UNLIKE_BESIDE = 0.95, 0.5
FLAT = 1e-3  # contrast between patches of a photo, over the size of their embeddings (photos: 0.5 and more)


@dataclass(frozen=True)
class Sampled:
    """Patches of some photos: the draw (i) that chose each photo, its cells (row-major), and what is known.

    `features` (i, t, d) are those after the last block, `contents` (i, t, e) the patch embedding less its
    mean over the photo; `alone` are patches that say what far patches of the same photo say, with other
    content, and not what those beside them say.
    """

    draws: Float[Tensor, " i"]
    cells: Int[Tensor, "i t"]
    features: Float[Tensor, "i t d"]
    contents: Float[Tensor, "i t e"]
    alone: Bool[Tensor, "i t"]

    def lowest(self, count: int) -> "Sampled":
        """The photos with the lowest draws, in their order."""
        return self._of(self.draws.argsort()[:count])

    def with_contrast(self) -> "Sampled":
        """Without photos that show little: half of the middle one's contrast between patches, or less.

        Blank photos are the same at each place, and so is whatever any model makes of them.
        """
        contrast = self.contents.square().sum(-1).mean(1).sqrt()
        return self._of((contrast > contrast.median() / 2).nonzero()[:, 0])

    def _of(self, photos: Int[Tensor, " i"]) -> "Sampled":
        return Sampled(*(getattr(self, name)[photos] for name in self.__dataclass_fields__))

    @staticmethod
    def joined(parts: list["Sampled"]) -> "Sampled":
        return Sampled(
            *(torch.cat([getattr(x, name) for x in parts]) for name in Sampled.__dataclass_fields__)
        )

    def cpu(self) -> "Sampled":
        return Sampled(*(getattr(self, name).cpu() for name in self.__dataclass_fields__))


class TokenSample:
    """The patches kept of all photos seen so far. See the module's docstring."""

    def __init__(self, grid: tuple[int, int], photos: int, tokens: int) -> None:
        self.photos, self.tokens = photos, min(tokens, grid[0] * grid[1])
        self.sampled: Sampled | None = None
        row = torch.arange(grid[0]).repeat_interleave(grid[1])
        column = torch.arange(grid[1]).repeat(grid[0])
        down, across = (row - row[:, None]).abs(), (column - column[:, None]).abs()
        self._beside = down + across == 1
        self._far = torch.maximum(down, across) >= max(max(grid) // 4, 2)
        self._shuffled = torch.randperm(len(row), generator=torch.Generator().manual_seed(0))

    def add(
        self, patches: Float[Tensor, "b p d"], norms: Float[Tensor, "b p"], embedded: Float[Tensor, "b p e"]
    ) -> None:
        """Draw each photo of a batch; keep those with the lowest draws. `norms` are those of `patches`."""
        draws, starts = _draws(embedded)
        kept = draws if self.sampled is None else torch.cat([self.sampled.draws, draws])
        last = kept.sort().values[: self.photos][-1]
        if not (draws <= last).all():
            chosen = draws <= last
            draws, starts, patches = draws[chosen], starts[chosen], patches[chosen]
            norms, embedded = norms[chosen], embedded[chosen]
        if len(draws):
            new = self._sampled(draws, self._cells(starts), patches.float(), norms, embedded.float())
            joined = Sampled.joined([self.sampled, new]) if self.sampled else new
            self.sampled = joined.lowest(self.photos)

    def _cells(self, starts: Float[Tensor, " i"]) -> Int[Tensor, "i t"]:
        """For each photo so many cells of a fixed shuffle, from its own start on."""
        first = (starts * len(self._shuffled)).long()[:, None]
        order = (first + torch.arange(self.tokens, device=first.device)) % len(self._shuffled)
        return self._shuffled.to(first.device)[order]

    def _sampled(
        self, draws: Tensor, cells: Tensor, patches: Tensor, norms: Tensor, embedded: Tensor
    ) -> Sampled:
        features, shown = _rows(patches, cells), _rows(embedded, cells)
        mean, sizes = embedded.mean(1, keepdim=True), torch.linalg.vector_norm(embedded, dim=-1)
        contents = shown - mean
        # What a flat image shows is rounding: it shows nothing.
        contents[contents.norm(dim=-1).mean(1) < FLAT * sizes.mean(1)] = 0
        alike = _cosines(features, patches, centre(features), norms)
        unlike = _cosines(shown, embedded, mean, sizes) < UNLIKE
        far, beside = (mask.to(cells.device)[cells] for mask in (self._far, self._beside))
        echoes = ((alike > ALIKE_IN_PHOTO) & unlike & far).sum(-1)
        near = (alike * beside).sum(-1) / beside.sum(-1).clamp(min=1)
        alone = (echoes >= max(1, patches.shape[1] // 100)) & (near < UNLIKE_BESIDE)
        return Sampled(draws, cells, features, contents, alone)

    def all_reduce(self, ranks: Ranks) -> None:
        """That of all processes' photos, on the CPU."""
        parts = [part for part in ranks.gather(self.sampled and self.sampled.cpu()) if part]
        self.sampled = Sampled.joined(parts).lowest(self.photos) if parts else None


def centre(tokens: Float[Tensor, "*b t d"]) -> Float[Tensor, "*b 1 d"]:
    """The mean of the three quarters of the tokens nearest to the mean of all: outliers do not move it."""
    distances = torch.linalg.vector_norm(tokens - tokens.mean(-2, keepdim=True), dim=-1)
    near = distances <= distances.quantile(0.75, dim=-1, keepdim=True)
    return (tokens * near[..., None]).sum(-2, keepdim=True) / near.sum(-1)[..., None, None]


def _draws(embedded: Float[Tensor, "b p e"]) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Two numbers from 0 to 1 per photo, as good as random, that rounding hardly changes."""
    some = embedded[:, :: max(embedded.shape[1] // 16, 1)].flatten(1).double()
    sizes = torch.stack([some.abs().mean(1), some.square().mean(1)]).clamp(min=1e-30)
    first, second = 1e4 * sizes.log()
    return first - first.floor(), second - second.floor()


def _rows(x: Float[Tensor, "i p d"], cells: Int[Tensor, "i t"]) -> Float[Tensor, "i t d"]:
    return x[torch.arange(len(x), device=x.device)[:, None], cells]


def _cosines(
    some: Float[Tensor, "i t d"], all_: Float[Tensor, "i p d"], middle: Tensor, norms: Float[Tensor, "i p"]
) -> Float[Tensor, "i t p"]:
    """Cosines of some patches to all of their photo, both less `middle` (i, 1, d), from the `norms` of all.

    All patches are many, so they are read once, and not changed: (x - m)(y - m) = (x - m)y - (x - m)m.
    """
    centred = some - middle
    products = torch.cat([centred, middle], 1) @ all_.transpose(1, 2)
    dots = products[:, :-1] - (centred * middle).sum(-1, keepdim=True)
    lengths = (norms.square()[:, None] - 2 * products[:, -1:] + middle.square().sum(-1, keepdim=True)).clamp(
        min=0
    )
    return dots / (torch.linalg.vector_norm(centred, dim=-1, keepdim=True) * lengths.sqrt()).clamp(min=1e-12)
