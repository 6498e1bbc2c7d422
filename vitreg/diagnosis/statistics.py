"""What a diagnosis needs from each forward pass, in memory that does not grow with the images.

Everything that is asked of outliers (how many, where, how much attention they draw) depends on a
threshold that is known only at the end. So each quantity is summed per bin of the token's norm:
afterwards, "over the outliers" is a sum over the bins beyond the threshold, for any threshold, from one
pass. All sums add up, so the ranks' statistics merge and the order of the images does not matter.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitreg.diagnosis.bins import NORMS
from vitreg.diagnosis.kinds.base import AttentionRows, Meter, shares_of_patches
from vitreg.diagnosis.outliers import OutlierRule
from vitreg.distributed import Ranks
from vitreg.errors import NonFiniteError
from vitreg.hooks.attention import AttentionCall
from vitreg.models.backbone import Backbone
from vitreg.models.layout import TokenLayout
from vitreg.tracing.streams import token_norms, watch

BINS, EDGES = NORMS.count, NORMS.edges

# Photos are dealt out into this many groups, so that one odd photo is told from many.
GROUPS = 16
NEARLY_ALL = 0.9  # of the patches in a bin
# For directions, each photo's largest norms are looked at (one patch in so many), in coarse bins.
LARGEST = 16
COARSE = 4  # bins in a coarse one
ORDINARY = 8  # ordinary patches looked at per photo
FEW = 3  # residual dimensions that one thing is carried by

# Evenly spread patches whose attention is read: beside CLS (with 3, 5 and 8 as many photos have sinks, to 4
# points, in each block of two real models), and where there is no CLS token.
PATCH_QUERIES, INSTEAD_OF_CLS = 4, 16


@dataclass
class Statistics:
    """Sums over images, per layer (l) and norm bin (k). Positions are row-major grid cells (p)."""

    counts: Int[Tensor, "l k"]  # patch tokens
    positions: Int[Tensor, "l p k"]  # patch tokens
    similarity: Float[Tensor, "l k"]  # summed cosine to the grid neighbours, after the patch embedding
    attention: Float[Tensor, "l h k"]  # summed share of CLS-to-patch attention, by the norm entering layer l
    values: Float[Tensor, "l k"]  # summed value norms, by the norm entering layer l
    largest: Float[Tensor, " l"]  # largest patch norm
    moments: Float[Tensor, "l 2"]  # sums of patch norms and of their squares
    special: Float[Tensor, "l 2"]  # summed norms of CLS, and the mean over registers
    relative: Int[Tensor, "l k"]  # patch tokens, by their norm over the `ordinary_norm` of their photo
    groups: Int[Tensor, "l g k"]  # patch tokens, by groups of photos
    # Sums of each photo's largest patches, and of their squares; c coarse bins.
    large: Float[Tensor, "l c 2 d"]
    large_counts: Float[Tensor, "l c"]  # these patches
    ordinary: Float[Tensor, "l 2 d"]  # the same of each photo's patches with at most the median norm
    ordinary_counts: Float[Tensor, " l"]  # these patches
    images: int = 0

    @staticmethod
    def empty(vit: Backbone, layout: TokenLayout) -> "Statistics":
        anatomy = vit.anatomy
        depth, heads, width = anatomy.depth, anatomy.heads, anatomy.width

        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=vit.device)

        return Statistics(
            counts=zeros(depth, BINS, dtype=torch.int64),
            positions=zeros(depth, layout.patches, BINS, dtype=torch.int32),
            similarity=zeros(depth, BINS),
            attention=zeros(depth, heads, BINS),
            values=zeros(depth, BINS),
            largest=zeros(depth),
            moments=zeros(depth, 2),
            special=zeros(depth, 2),
            relative=zeros(depth, BINS, dtype=torch.int64),
            groups=zeros(depth, GROUPS, BINS, dtype=torch.int32),
            large=zeros(depth, BINS // COARSE, 2, width),
            large_counts=zeros(depth, BINS // COARSE),
            ordinary=zeros(depth, 2, width),
            ordinary_counts=zeros(depth),
        )

    def together(self, ranks: Ranks) -> "Statistics":
        """Those of all ranks' images, on the CPU."""
        found = {}
        for name, mine in vars(self).items():
            if name == "images":
                found[name] = sum(ranks.gather(mine))
            else:
                found[name] = (ranks.largest if name == "largest" else ranks.add)(mine.cpu())
        return Statistics(**found)

    # -- questions, answered once the threshold is known -------------------------------------------

    def norm_moments(self, layer: int) -> tuple[float, float]:
        """Mean and standard deviation of patch norms."""
        mean, square = (self.moments[layer] / self.counts[layer].sum()).tolist()
        return mean, max(square - mean**2, 0.0) ** 0.5

    def fraction_beyond(self, layer: int, norm: float) -> float:
        """Share of patch tokens in bins at or above `norm` (exact to one bin, 4%)."""
        return float(self.counts[layer][_beyond(norm)].sum()) / int(self.counts[layer].sum())

    def position_frequency(self, layer: int, threshold: float | None) -> Float[Tensor, " p"]:
        """Per grid cell, the share of images whose patch there is an outlier."""
        return self.positions[layer][:, _beyond(threshold)].sum(1).double() / self.images

    def neighbour_similarity(self, layer: int, threshold: float | None) -> dict[str, float | None]:
        """Mean cosine to the neighbours of outliers and of the other patches (None: there are none)."""
        sums, counts, beyond = self.similarity[layer], self.counts[layer], _beyond(threshold)
        known = bool(sums.any())
        return {
            "outlier": _mean(sums, counts, beyond) if known else None,
            "normal": _mean(sums, counts, ~beyond) if known else None,
        }

    def attention_beyond(self, layer: int, threshold: float | None) -> list[float]:
        """Per head, the share of CLS-to-patch attention on tokens that enter the block as outliers."""
        shares: list[float] = (self.attention[layer][:, _beyond(threshold)].sum(1) / self.images).tolist()
        return shares

    def value_norm_ratio(self, layer: int, threshold: float | None) -> float | None:
        """Mean value norm of tokens that enter the block as outliers, over that of the others."""
        sums, counts, beyond = self.values[layer], self.counts[layer - 1], _beyond(threshold)
        inside, outside = _mean(sums, counts, beyond), _mean(sums, counts, ~beyond)
        return inside / outside if inside is not None and outside else None

    def excess_dimensions(self, layer: int, threshold: float, most: int = 5) -> list[dict[str, int | float]]:
        """The residual dimensions with most of the squared norm that outliers have beyond the ordinary."""
        share = self._excess(layer, threshold)
        top = share.topk(min(most, len(share))).indices.tolist()
        return [{"dimension": d, "share": float(share[d])} for d in top if share[d] >= 0.01]

    def few_dimensions(self, layer: int, threshold: float) -> float:
        """How far three residual dimensions carry the outliers' excess squared norm, in 0 to 1.

        The share of the three richest ones, without what those of any vector hold: 0 if the excess lies in
        all dimensions alike, 1 if in three alone.
        """
        share = self._excess(layer, threshold)
        chance = share_by_chance(len(share), FEW)
        return max((float(share.topk(FEW).values.sum()) - chance) / (1 - chance), 0.0)

    def direction(self, layer: int, threshold: float) -> float:
        """How far outliers differ from ordinary patches in one shared direction, in 0 to 1.

        |mean of x - m|^2 over the mean of |x - m|^2, m the mean of ordinary patches, without what so few
        outliers would show by chance: 0 if they differ in all directions, 1 if all by the same vector.
        """
        count = float(self.large_counts[layer][self._large_beyond(layer, threshold)].sum())
        if count < 2:
            return 0.0
        (mean, squares), (center, _) = self._means(layer, threshold)
        energy = float((squares - 2 * mean * center + center.square()).sum())
        chance = energy / count
        return min(
            max((float((mean - center).square().sum()) - chance) / max(energy - chance, 1e-30), 0.0), 1.0
        )

    def excess(self, rule: OutlierRule) -> Float[Tensor, " d"]:
        """The mean of the outliers less that of ordinary patches, in the residual stream after a layer."""
        outliers, ordinary = self._means(rule.layer, rule.threshold)
        return outliers[0] - ordinary[0]

    def _excess(self, layer: int, threshold: float) -> Float[Tensor, " d"]:
        """Per dimension, the share of the squared norm that outliers have beyond ordinary patches."""
        outliers, ordinary = self._means(layer, threshold)
        excess = (outliers[1] - ordinary[1]).clamp(min=0)
        return excess / excess.sum().clamp(min=1e-30)

    def _means(self, layer: int, threshold: float) -> tuple[Float[Tensor, "2 d"], Float[Tensor, "2 d"]]:
        """What outliers and what ordinary patches hold, and its square, on average."""
        chosen = self._large_beyond(layer, threshold)
        outliers = self.large[layer][chosen].sum(0) / self.large_counts[layer][chosen].sum().clamp(min=1)
        return outliers, self.ordinary[layer] / self.ordinary_counts[layer].clamp(min=1)

    def _large_beyond(self, layer: int, threshold: float) -> Bool[Tensor, " c"]:
        """The coarse bins beyond a threshold, and often the one that it lies in.

        That counts where it has most of the outliers (or all but one) and little else, or where there is no
        other.
        """
        beyond, touched = EDGES[:-1:COARSE] >= threshold, EDGES[COARSE::COARSE] > threshold
        without, with_it = (int(self.large_counts[layer][chosen].sum()) for chosen in (beyond, touched))
        if without >= max(with_it / 2, 2):
            return beyond
        return touched if not without or self._nearly_all_beyond(layer, threshold, touched) else beyond

    def _nearly_all_beyond(self, layer: int, threshold: float, coarse: Bool[Tensor, " c"]) -> bool:
        """Whether hardly a patch in these coarse bins is below a threshold."""
        counts = self.counts[layer].unflatten(0, (-1, COARSE))[coarse]
        above = int(counts[_beyond(threshold).unflatten(0, (-1, COARSE))[coarse]].sum())
        return above >= NEARLY_ALL * int(counts.sum())

    def largest_group(self, layer: int, threshold: float) -> float:
        """The share of the outliers that lie in the one group of photos that has most of them."""
        beyond = self.groups[layer][:, _beyond(threshold)].sum(1)
        return float(beyond.max()) / max(int(beyond.sum()), 1)

    def bound(self, layer: int, threshold: float, often: float = 0.5) -> float:
        """The share of outliers that lie at fixed positions: where `often` of the photos have one."""
        frequency = self.position_frequency(layer, threshold)
        return float(frequency[frequency >= often].sum() / frequency.sum().clamp(min=1e-30))


def share_by_chance(width: int, count: int) -> float:
    """The share of its squared length that a random vector holds in its `count` largest dimensions.

    By Blom's approximation of the expected order statistics of normal numbers' magnitudes.
    """
    ranks = width - torch.arange(count, dtype=torch.float64)
    magnitudes = torch.special.ndtri((1 + (ranks - 0.375) / (width + 0.25)) / 2)
    return min(float(magnitudes.square().sum()) / width, 0.99)


def _beyond(threshold: float | None) -> Bool[Tensor, " bins"]:
    """The bins at or above a threshold (a bin edge); none of them for None."""
    return EDGES[:-1] >= (torch.inf if threshold is None else threshold)


def _mean(sums: Tensor, counts: Tensor, chosen: Tensor) -> float | None:
    count = int(counts[chosen].sum())
    return float(sums[chosen].sum()) / count if count else None


class Collector:
    """Adds the forward passes that `watch` shows it to a Statistics."""

    def __init__(
        self, vit: Backbone, statistics: Statistics, layout: TokenLayout, meters: Sequence[Meter] = ()
    ) -> None:
        self.vit, self.statistics, self.layout, self.meters = vit, statistics, layout, meters
        self.norms: list[Tensor] = []  # of the latest batch, (b, p) per layer
        self.shares: list[Tensor] = []  # of the latest batch, (b, p) per layer
        self.patches: Tensor | None = None  # of the latest batch after its last layer, (b, p, d)
        self._groups = torch.zeros(0, dtype=torch.long)  # of the photos of the next pass
        self._bins: Tensor | None = None
        self._similarity: Tensor | None = None

    def see(self, pixels: Float[Tensor, "b 3 h w"]) -> None:
        """Run the model on some images, which adds them."""
        self._groups = _groups_of(pixels).to(self.vit.device)
        self.vit(pixels)

    def watching(self) -> watch:
        """A context in which every forward pass is added."""
        self._watch = watch(
            self.vit,
            on_start=self._start,
            on_embedding=self._embedding,
            on_block=self._block,
            on_attention=self._attention,
        )
        return self._watch

    def _start(self) -> None:
        self.norms, self.shares, self.patches, self._bins = [], [], None, None
        for meter in self.meters:
            meter.start()

    def _embedding(self, patches: Float[Tensor, "b p d"]) -> None:
        self._similarity = neighbour_similarity(patches, self.layout)
        for meter in self.meters:
            meter.embedding(patches)

    def _block(self, layer: int, residual: Float[Tensor, "b n d"]) -> None:
        s, layout = self.statistics, self.layout
        norms = token_norms(residual)
        if not norms.isfinite().all():
            raise NonFiniteError(
                f"the residual stream after block {layer} holds NaN or infinity in {residual.dtype}."
                " Check the checkpoint, or use --dtype float32 (float16 overflows where outliers are large)."
            )
        patches = norms[:, layout.patch_slice]
        bins = NORMS.index(patches)
        s.counts[layer] += torch.bincount(bins.flatten(), minlength=BINS)
        ones = torch.ones_like(bins, dtype=torch.int32)
        s.positions[layer].scatter_add_(1, bins.T, ones.T)
        if self._similarity is not None:
            s.similarity[layer] += _binned(bins, self._similarity)
        s.largest[layer] = torch.maximum(s.largest[layer], patches.max())
        exact = patches.double()
        s.moments[layer] += torch.stack([exact.sum(), exact.square().sum()])
        s.special[layer, 0] += norms[:, layout.prefix_slice][:, :1].sum()
        if layout.registers:
            s.special[layer, 1] += norms[:, layout.register_slice].mean(1).sum()
        s.relative[layer] += torch.bincount(
            NORMS.index(patches / ordinary_norm(patches)).flatten(), minlength=BINS
        )
        group = self._groups[:, None] * BINS + bins
        s.groups[layer] += torch.bincount(group.flatten(), minlength=GROUPS * BINS).view(GROUPS, BINS)
        self._add_directions(layer, residual[:, layout.patch_slice], patches)
        if layer == 0:
            s.images += len(norms)
        self.norms.append(patches)
        self.patches = residual[:, layout.patch_slice]
        self._bins = bins
        for meter in self.meters:
            meter.block(layer, residual, norms)

    def _add_directions(
        self, layer: int, residual: Float[Tensor, "b p d"], norms: Float[Tensor, "b p"]
    ) -> None:
        """What the largest patches of each photo hold, by their norms, and what ordinary ones do."""
        s, count = self.statistics, max(norms.shape[1] // LARGEST, 1)
        largest, index = norms.topk(count, 1)
        rows = residual.gather(1, index[..., None].expand(-1, -1, residual.shape[2])).flatten(0, 1).double()
        bins = (NORMS.index(largest) // COARSE).flatten()
        s.large[layer].index_add_(0, bins, torch.stack([rows, rows.square()], 1))
        s.large_counts[layer] += torch.bincount(bins, minlength=BINS // COARSE)
        _, index = norms.topk(norms.shape[1] // 2 + 1, 1, largest=False)
        index = index[:, :: max(index.shape[1] // ORDINARY, 1)]
        rows = residual.gather(1, index[..., None].expand(-1, -1, residual.shape[2])).flatten(0, 1).double()
        s.ordinary[layer] += torch.stack([rows.sum(0), rows.square().sum(0)])
        s.ordinary_counts[layer] += len(rows)

    def _attention(self, layer: int, call: AttentionCall) -> None:
        inner = self._watch.inner
        patches = inner.patch_slice
        asked, spread = query_tokens(inner), spread_patches(inner)
        rows = call.rows(torch.cat([asked, spread]).to(self.vit.device))  # (b, h, r, m), read only once
        shares = shares_of_patches(rows[:, :, : len(asked)], patches).mean(2)
        self.shares.append(shares.mean(1))
        read = AttentionRows(shares, rows[:, :, len(asked) :] if len(spread) else rows, patches)
        for meter in self.meters:
            meter.attention(layer, read)
        if self._bins is None:  # layer 0: no block has written yet
            return
        s = self.statistics
        bins = self._bins.flatten().expand(shares.shape[1], -1)
        s.attention[layer].scatter_add_(1, bins, shares.transpose(0, 1).flatten(1).double())
        value_norms = torch.linalg.vector_norm(call.v[:, :, patches], dim=(1, 3), dtype=torch.float32)
        s.values[layer] += _binned(self._bins, value_norms)


def query_tokens(layout: TokenLayout) -> Int[Tensor, " q"]:
    """The tokens whose attention a diagnosis reads: CLS, or without one some evenly spread patches."""
    return torch.zeros(1, dtype=torch.long) if layout.prefix else _evenly(layout, INSTEAD_OF_CLS)


def spread_patches(layout: TokenLayout) -> Int[Tensor, " q"]:
    """The patches whose attention is read beside that of CLS; without CLS, none more."""
    return _evenly(layout, PATCH_QUERIES if layout.prefix else 0)


def _evenly(layout: TokenLayout, count: int) -> Int[Tensor, " q"]:
    count = min(count, layout.patches)
    spread = (torch.arange(count) + 0.5) * layout.patches / max(count, 1)
    return spread.long() + layout.patch_slice.start


def neighbour_similarity(patches: Float[Tensor, "b p d"], layout: TokenLayout) -> Float[Tensor, "b p"]:
    """Mean cosine similarity of each patch to its (up to) 4 grid neighbours (Darcet et al., Fig. 5a)."""
    rows, columns = layout.grid
    grid = torch.nn.functional.normalize(patches.float(), dim=-1).unflatten(1, (rows, columns))
    total, count = grid.new_zeros(grid.shape[:3]), grid.new_zeros(rows, columns)
    if rows > 1:
        vertical = (grid[:, 1:] * grid[:, :-1]).sum(-1)
        total[:, 1:] += vertical
        total[:, :-1] += vertical
        count[1:] += 1
        count[:-1] += 1
    if columns > 1:
        horizontal = (grid[:, :, 1:] * grid[:, :, :-1]).sum(-1)
        total[:, :, 1:] += horizontal
        total[:, :, :-1] += horizontal
        count[:, 1:] += 1
        count[:, :-1] += 1
    return (total / count.clamp(min=1)).flatten(1)


def _groups_of(pixels: Float[Tensor, "b 3 h w"]) -> Int[Tensor, " b"]:
    """A group for each photo, by some of its pixels: in any order of photos, and the same for copies."""
    some = (pixels.flatten(1)[:, ::7] * 256).round().nan_to_num().long()
    return some.sum(1) % GROUPS


def ordinary_norm(norms: Float[Tensor, "b p"]) -> Float[Tensor, "b 1"]:
    """The norm that a photo's patches are compared with: their lower quartile.

    Not their median, for in a photo with large flat areas most patches may be outliers.
    """
    rank = max(norms.shape[1] // 4, 1)
    return norms.kthvalue(rank, 1, keepdim=True).values.clamp(min=1e-30)


def _binned(bins: Tensor, values: Tensor) -> Tensor:
    return torch.bincount(bins.flatten(), weights=values.flatten().double(), minlength=BINS)
