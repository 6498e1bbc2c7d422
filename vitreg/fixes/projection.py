"""Projection: massive channels and the position subspace, taken out of the patches that are read.

    fix = Projection.calibrate(vit, photos, massive=True, positions=8)
    with fix.applied_to(vit):
        features = vit.model.forward_features(batch)

After the last block a patch x becomes x - (x - mean) B^T B, with the rows of B (r, d) orthonormal. Massive
channels dominate every token, and with them every similarity between tokens (Sun et al., 2024); what the
mean over photos still tells of a place is position, not content (INSID3 finds it on a blank image).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vitreg.data.batches import Batch, pixels_of
from vitreg.data.first_images import ranks_of
from vitreg.distributed import Ranks
from vitreg.errors import FixError, ImageError
from vitreg.fixes.base import Fix, same_values
from vitreg.fixes.neurons import RegisterNeurons
from vitreg.fixes.patch_edit import PatchEdit, along, refuse_skewed
from vitreg.hooks.block_edit import BlockEdit
from vitreg.models.backbone import Backbone
from vitreg.models.fingerprint import Fingerprint
from vitreg.models.probe import evaluating
from vitreg.tracing.streams import watch

# A channel is massive if its typical absolute value is so many times the median channel's, and it holds so
# large a share of the patches' typical energy.
FACTOR, SHARE = 5.0, 0.05


@dataclass(frozen=True, eq=False)
class Projection(Fix):
    """Directions of the last block's patches that nobody shall read.

    basis   (r, d), orthonormal rows
    mean    (d,), what stays in their place: 0 in massive channels, the photos' mean along positions

    It holds for every image size. A head that reads patches (by their mean, say) reads what is left.
    """

    type: ClassVar[str] = "projection"
    does_not_cure: ClassVar[str] = (
        "anything before the end of the last block: attention, CLS and the outliers themselves stay; what"
        " content shares the removed directions goes with them."
    )
    basis: Tensor = field(repr=False)
    mean: Tensor = field(repr=False)

    @classmethod
    def calibrate(
        cls,
        vit: Backbone,
        images: Iterable[Batch] | Iterable[Tensor],
        *,
        massive: bool = True,
        positions: int = 0,
    ) -> "Projection":
        """The massive channels, and the `positions` directions that tell most of a patch's place.

        A channel is massive if its absolute value (the median over an image's patches, averaged over images)
        is at least 5 times the median channel's, and the square of that at least 5% of all channels'. The
        position subspace is spanned by the first right singular vectors of the mean patches over images,
        less their mean over positions: give many more images than an object could be in one place of. One
        pass. Raises ImageError without images, FixError where nothing is asked for or found, ValueError for
        more positions than there are directions.
        """
        sums = _DirectionSums(vit)
        with evaluating(vit.model), watch(vit, on_block=sums.add):
            for batch in images:
                vit(pixels_of(batch))
        mean, typical = sums.means(ranks_of(images))
        channels = massive_channels(typical) if massive else torch.zeros_like(typical, dtype=torch.bool)
        most = min(mean.shape[0] - 1, mean.shape[1] - int(channels.sum()))
        if not 0 <= positions <= most:
            raise ValueError(f"positions={positions}: expected 0 to {most} directions.")
        if not positions and not channels.any():
            largest = float(typical.max() / typical.median())
            raise FixError(
                f"there is nothing to project out: the largest channel is {largest:.1f}x the median one"
                f" (massive: {FACTOR:g}x, and {SHARE:.0%} of the energy), and no positions were asked for."
                " Ask for some: positions=8."
            )
        middle = mean.mean(0)
        places = torch.linalg.svd((mean - middle) * ~channels, full_matrices=False).Vh[:positions]
        basis = torch.cat([torch.eye(len(typical), dtype=mean.dtype)[channels], places])
        neurons = RegisterNeurons((), fingerprint=Fingerprint.of(vit))
        return cls(neurons, basis.float(), (middle * ~channels).float())

    def __post_init__(self) -> None:
        super().__post_init__()
        shape = tuple(self.basis.shape)
        if self.neurons.chosen or len(shape) != 2 or not shape[0] or tuple(self.mean.shape) != shape[1:]:
            raise ValueError(
                f"found a basis of shape {shape} and a mean of shape {tuple(self.mean.shape)}: expected"
                " (r, d), r at least 1, and (d,), and no neurons. Use Projection.calibrate(vit, images)."
            )
        refuse_skewed(self.basis)

    def __eq__(self, other: object) -> bool:
        return same_values(self, other)

    def __hash__(self) -> int:
        return hash((self.neurons, tuple(self.basis.shape)))

    def check(self, vit: Backbone) -> None:
        """As every fix; also raises FixError for a model of another width."""
        super().check(vit)
        if self.basis.shape[1] != vit.anatomy.width:
            raise FixError(
                f"the directions have {self.basis.shape[1]} dimensions, and the model's tokens"
                f" {vit.anatomy.width}. Calibrate with this model: Projection.calibrate(vit, images)."
            )

    def placebo(self, vit: Backbone, seed: int = 0) -> "Projection":
        """As many directions, drawn at random."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(self.basis.T.shape, generator=generator)
        return replace(self, basis=torch.linalg.qr(drawn).Q.T.contiguous())

    def edits(self, vit: Backbone) -> dict[int, BlockEdit]:
        last = vit.anatomy.depth - 1
        return {last: _Project(vit, last, self.basis, self.mean)}


class _Project(PatchEdit):
    """The last block without these directions in its patches."""

    def __init__(
        self, vit: Backbone, layer: int, basis: Float[Tensor, "r d"], mean: Float[Tensor, " d"]
    ) -> None:
        super().__init__(vit, layer)
        self.basis, self.mean = basis, mean

    def change(self, patches: Float[Tensor, "b p d"]) -> Float[Tensor, "b p d"]:
        return patches - along(patches - self.mean.to(patches), self.basis)


def massive_channels(typical: Float[Tensor, " d"]) -> Bool[Tensor, " d"]:
    """The channels whose typical absolute value is massive (see `Projection.calibrate`)."""
    energy = typical.square()
    return (typical >= FACTOR * typical.median()) & (energy >= SHARE * energy.sum())


class _DirectionSums:
    """Sums over images of the last block's patches and of their channels' typical size, in float64."""

    def __init__(self, vit: Backbone) -> None:
        self._last, self._start = vit.anatomy.depth - 1, vit.layout.patch_slice.start
        self._images = 0
        self._sums: tuple[Tensor, Tensor] | None = None  # (p, d) and (d,)

    def add(self, layer: int, residual: Float[Tensor, "b n d"]) -> None:
        if layer != self._last:
            return
        patches = residual[:, self._start :].double()
        new = patches.sum(0).cpu(), patches.abs().median(1).values.sum(0).cpu()
        self._images += len(patches)
        self._sums = new if self._sums is None else _added(self._sums, new)

    def means(self, ranks: Ranks) -> tuple[Float[Tensor, "p d"], Float[Tensor, " d"]]:
        """The mean patch of each position, and the channels' typical sizes, over the images of all ranks."""
        images = sum(ranks.gather(self._images))
        if not images:
            raise ImageError("there are no images to calibrate with; expected at least one batch.")
        patches, typical = reduce(_added, (sums for sums in ranks.gather(self._sums) if sums is not None))
        return patches / images, typical / images


def _added(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    if one[0].shape != other[0].shape:
        raise ImageError("images have different patch grids. Calibrate with images of one size.")
    return one[0] + other[0], one[1] + other[1]
