"""A sample of patches of a sample of photos, of fixed size, that any order and any processes make alike.

    sample = TokenSample(photos=64, tokens=32)
    sample.add(patches, contents)         # of each batch: after the last block, and as they were embedded
    sample.features, sample.contents      # (i, t, d) of up to 64 photos, 32 patches of each

Which photos stay, and which of their patches, is drawn from a number that the photo's own content gives
(bottom-k sampling): so the sample does not depend on the order of the photos, nor on who read them.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitreg.ranks import Ranks

# Patches say nearly the same (cosine of centred features) though they show something else (cosine of centred
# patch embeddings). Of such pairs in different photos, 1 in 1000 reaches 0.5 in blocks 3 and 5 of two real models.
ALIKE, UNLIKE = 0.8, 0.0
# Far places of one photo are proxies only if they say it still more alike (parts of one object reach 0.8), and
# in spite of the patches beside them.
ALIKE_IN_PHOTO, UNLIKE_BESIDE = 0.95, 0.5


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

    def add(self, patches: Float[Tensor, "b p d"], embedded: Float[Tensor, "b p e"]) -> None:
        """Draw each photo of a batch; keep those with the lowest draws of all."""
        draws, starts = _draws(embedded)
        bound = self.sampled.draws[-1] if self.sampled and len(self.sampled.draws) == self.photos else 1.0
        chosen = (draws < bound).nonzero()[:, 0]
        chosen = chosen[draws[chosen].argsort()[: self.photos]]
        if not len(chosen):
            return
        start = (starts[chosen] * len(self._shuffled)).long()[:, None]
        order = (start + torch.arange(self.tokens, device=start.device)) % len(self._shuffled)
        cells = self._shuffled.to(start.device)[order]
        new = self._sampled(draws[chosen], cells, patches[chosen].float(), embedded[chosen].float())
        joined = Sampled.joined([self.sampled, new]) if self.sampled else new
        self.sampled = joined.lowest(self.photos)

    def _sampled(self, draws: Tensor, cells: Tensor, patches: Tensor, embedded: Tensor) -> Sampled:
        features, contents = _rows(patches, cells), embedded - embedded.mean(1, keepdim=True)
        alike = _cosines(features, patches, features.median(1, keepdim=True).values)
        unlike = _cosines(_rows(contents, cells), contents, 0.0) < UNLIKE
        far, beside = (mask.to(cells.device)[cells] for mask in (self._far, self._beside))
        echoes = ((alike > ALIKE_IN_PHOTO) & unlike & far).sum(-1)
        near = (alike * beside).sum(-1) / beside.sum(-1).clamp(min=1)
        alone = (echoes >= max(1, patches.shape[1] // 100)) & (near < UNLIKE_BESIDE)
        return Sampled(draws, cells, features, _rows(contents, cells), alone)

    def all_reduce(self, ranks: Ranks) -> None:
        """That of all processes' photos, on the CPU."""
        parts = [part for part in ranks.gather(self.sampled and self.sampled.cpu()) if part]
        self.sampled = Sampled.joined(parts).lowest(self.photos) if parts else None


def _draws(embedded: Float[Tensor, "b p e"]) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Two numbers from 0 to 1 per photo, as good as random, that rounding hardly changes."""
    x = embedded.flatten(1)
    sizes = x.abs().mean(1, dtype=torch.float64), torch.linalg.vector_norm(x, dim=1, dtype=torch.float64)
    return tuple((size * 1e4).frac().abs() for size in sizes)  # type: ignore[return-value]


def _rows(x: Float[Tensor, "i p d"], cells: Int[Tensor, "i t"]) -> Float[Tensor, "i t d"]:
    return x.gather(1, cells[..., None].expand(-1, -1, x.shape[-1]))


def _cosines(one: Tensor, other: Tensor, centre: Tensor | float) -> Float[Tensor, "i t p"]:
    return F.normalize(one - centre, dim=-1) @ F.normalize(other - centre, dim=-1).transpose(-2, -1)
