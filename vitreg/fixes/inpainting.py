"""In-painting: outlier patches filled in from their clean neighbours, where they appear.

    fix = Inpainting.calibrate(vit, photos, report)
    with fix.applied_to(vit):
        features = vit.model.forward_features(batch)

For those who read dense features: after the block in which outliers appear, a patch whose norm reaches the
threshold becomes the mean of the nearest clean patches around it, so that neither later blocks nor a reader
sees an outlier. No neuron has to be known. (SC-CLIP does this to the last block but one.)
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vitreg.data.batches import BATCH, Batch
from vitreg.data.first_images import first_images
from vitreg.diagnosis.diagnosing import diagnose
from vitreg.diagnosis.result import Diagnosis
from vitreg.errors import FixError
from vitreg.fixes.base import Applied, Fix, applied, same_values
from vitreg.fixes.neighbours import grid_distances, nearest_clean
from vitreg.fixes.neurons import RegisterNeurons
from vitreg.fixes.patch_edit import PatchEdit, along, refuse_skewed
from vitreg.hooks.block_edit import BlockEdit
from vitreg.models.backbone import Backbone
from vitreg.models.fingerprint import Fingerprint
from vitreg.models.probe import evaluating
from vitreg.tracing.streams import token_norms, watch

# Images that the outliers' common directions are measured on.
IMAGES = 64


@dataclass(frozen=True, eq=False)
class Inpainting(Fix):
    """Patches whose norm after block `layer` (0-based) is `threshold` or more, replaced.

    directions  (r, d), orthonormal rows: only what an outlier differs by from its neighbours along these is
                replaced, so that the rest of what it holds is kept. None (r = 0): the whole patch is.

    The neighbours are those 4 around, without outliers; where there are no others, the next ring. An image
    of nothing but outliers stays as it is.
    """

    type: ClassVar[str] = "inpainting"
    does_not_cure: ClassVar[str] = (
        "what the outlier patches no longer hold: it is guessed from their neighbours, not brought back; and"
        " what earlier blocks made of the tokens stays."
    )
    neurons: RegisterNeurons = field(default_factory=lambda: RegisterNeurons(()), repr=False)
    layer: int = field(kw_only=True)
    threshold: float = field(kw_only=True)
    directions: Tensor = field(default_factory=lambda: torch.zeros(0, 0), repr=False)

    @classmethod
    def calibrate(
        cls,
        vit: Backbone,
        images: Iterable[Batch] | Iterable[Tensor],
        diagnosis: Diagnosis | None = None,
        *,
        directions: int = 0,
    ) -> "Inpainting":
        """The fix at the onset layer of a diagnosis (made here if not given), with that layer's threshold.

        With `directions`, only so many common ones are replaced in outliers: those that hold most of how the
        outliers of the first 64 images differ from their neighbours (first right singular vectors). Raises
        FixError for a diagnosis without artifacts, and for images without outliers; ImageError without
        images; ValueError for more directions than dimensions.
        """
        report = diagnosis or diagnose(vit, images, examples=0)
        onset = report.onset_layer
        threshold = None if onset is None else report.layers[onset].threshold
        if onset is None or threshold is None:
            raise FixError(f"there is nothing to in-paint: {report.reason}")
        if not 0 <= directions < vit.anatomy.width:
            raise ValueError(f"directions={directions}: expected 0 to {vit.anatomy.width - 1}.")
        basis = common_directions(vit, images, onset, threshold, directions)
        neurons = RegisterNeurons((), fingerprint=Fingerprint.of(vit))
        return cls(neurons, basis, layer=onset, threshold=threshold)

    def __post_init__(self) -> None:
        super().__post_init__()
        count, shape = len(self.neurons.chosen), tuple(self.directions.shape)
        if count or not 0 < self.threshold < float("inf") or len(shape) != 2:
            raise ValueError(
                f"found {count} neurons, threshold {self.threshold} and directions of shape {shape}: expected"
                " no neurons, a positive norm, and (r, width)."
            )
        refuse_skewed(self.directions)

    def __eq__(self, other: object) -> bool:
        return same_values(self, other)

    def __hash__(self) -> int:
        return hash((self.neurons, self.layer, self.threshold))

    def check(self, vit: Backbone) -> None:
        """As every fix; also raises FixError for a model without this block, or of another width."""
        super().check(vit)
        anatomy, (count, width) = vit.anatomy, self.directions.shape
        if not 0 <= self.layer < anatomy.depth or (count and width != anatomy.width):
            raise FixError(
                f"the fix in-paints after block {self.layer}, {count} directions of width {width}, but the"
                f" model has {anatomy.depth} blocks of width {anatomy.width}. Calibrate with this model:"
                " Inpainting.calibrate(vit, images)."
            )

    def handle(self, vit: Backbone) -> Applied:
        """As every fix; raises FixError where token splitting is applied, whose copies stand in no grid."""
        if any(handle.fix.type == "splitting" for handle in applied(vit.model)):
            raise FixError(
                "token splitting is applied to the model, and inside the blocks its copies are not neighbours"
                " of anything. Undo it, apply this fix first, and token splitting last."
            )
        return super().handle(vit)

    def placebo(self, vit: Backbone, seed: int = 0) -> "Inpainting":
        """As many other patches of each image filled in, drawn at random; the outliers stay."""
        return _Elsewhere(**vars(self), seed=seed)

    def edits(self, vit: Backbone) -> dict[int, BlockEdit]:
        return {self.layer: _Inpaint(self, vit)}


@dataclass(frozen=True, eq=False)
class _Elsewhere(Inpainting):
    """The placebo. It is no fix to be saved."""

    seed: int = field(kw_only=True)

    def edits(self, vit: Backbone) -> dict[int, BlockEdit]:
        return {self.layer: _InpaintElsewhere(self, vit)}


class _Inpaint(PatchEdit):
    """A block whose outlier patches are replaced after it has run."""

    def __init__(self, fix: Inpainting, vit: Backbone) -> None:
        super().__init__(vit, fix.layer)
        self.threshold, self.directions = fix.threshold, fix.directions
        self.grid, self.distances = vit.layout.grid, grid_distances(vit.layout.grid)

    def change(self, patches: Float[Tensor, "b p d"]) -> Float[Tensor, "b p d"]:
        if patches.shape[1] != len(self.distances):
            raise FixError(
                f"expected the {self.grid[0]}x{self.grid[1]} patches that the model was wrapped for, found"
                f" {patches.shape[1]}: which of them are neighbours is not known. Apply the fix to"
                " vitreg.wrap(model, image_size=...) with the size of these images."
            )
        outlier = token_norms(patches) >= self.threshold
        filled = nearest_clean(patches, outlier, self.distances)
        if len(self.directions):
            filled = patches - along(patches - filled, self.directions)
        return torch.where(self.chosen(outlier)[..., None], filled, patches)

    def chosen(self, outlier: Bool[Tensor, "b p"]) -> Bool[Tensor, "b p"]:
        """The patches that are filled in: the outliers."""
        return outlier


class _InpaintElsewhere(_Inpaint):
    """A block of whose clean patches as many are filled in as it has outliers."""

    def __init__(self, fix: _Elsewhere, vit: Backbone) -> None:
        super().__init__(fix, vit)
        self.order = torch.rand(vit.layout.patches, generator=torch.Generator().manual_seed(fix.seed))

    def chosen(self, outlier: Bool[Tensor, "b p"]) -> Bool[Tensor, "b p"]:
        lots = torch.where(outlier, -torch.inf, self.order.to(outlier.device))
        rank = lots.argsort(-1, descending=True).argsort(-1)
        return (rank < outlier.sum(-1, keepdim=True)) & ~outlier


def common_directions(
    vit: Backbone, images: Iterable[Batch] | Iterable[Tensor], layer: int, threshold: float, count: int
) -> Float[Tensor, "r d"]:
    """The directions along which outliers after a block differ from their neighbours together."""
    if not count:
        return torch.zeros(0, vit.anatomy.width)
    pixels = first_images(images, IMAGES)
    distances, start = grid_distances(vit.layout_for(pixels).grid), vit.layout.patch_slice.start
    second = torch.zeros(vit.anatomy.width, vit.anatomy.width, dtype=torch.float64)

    def add(index: int, residual: Float[Tensor, "b n d"]) -> None:
        if index == layer:
            patches = residual[:, start:].float()
            outlier = token_norms(patches) >= threshold
            excess = (patches - nearest_clean(patches, outlier, distances))[outlier].double().cpu()
            second.add_(excess.T @ excess)

    with evaluating(vit.model), watch(vit, on_block=add):
        for batch in pixels.split(BATCH):
            vit(batch)
    if not second.any():
        raise FixError("none of these images has an outlier to measure. Give images that have some.")
    return torch.linalg.eigh(second).eigenvectors[:, -count:].T.flip(0).float().contiguous()
