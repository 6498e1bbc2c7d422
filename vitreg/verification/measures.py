"""What a comparison of two versions of a model measures: one number per image.

summary = summarise(vit, pixels, find_readout(vit))     # one forward pass
numbers = reference.measure(summary)                    # {measure: (b,)}, against the unfixed model's pass
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitreg.diagnosis.kinds.base import shares_of_patches
from vitreg.diagnosis.result import Diagnosis
from vitreg.diagnosis.statistics import query_tokens
from vitreg.hooks.attention import AttentionCall
from vitreg.models.backbone import Backbone
from vitreg.models.head import Readout, logits_of
from vitreg.models.layout import TokenLayout
from vitreg.models.probe import evaluating
from vitreg.tracing.streams import token_norms, watch

# In a layer without outliers of its own, a patch that reaches this many times the largest norm there is one.
RISEN = 1.5


@dataclass(frozen=True)
class MeasureSpec:
    """How a measure is called, written, and summed up over images: by their mean, if not said otherwise."""

    label: str
    format: str
    against: bool = False  # compares with the unfixed model, which has no value of its own
    largest_of: str | None = None  # the largest over images of another measure, not a mean


# In the order in which they are shown.
MEASURES = {
    "outliers": MeasureSpec("outlier patches", ".2%"),
    "outliers_worst_layer": MeasureSpec("outlier patches, worst layer", ".2%"),
    "largest_norm": MeasureSpec("largest patch norm, mean", ".1f"),
    "largest_norm_of_all": MeasureSpec("largest patch norm of all", ".1f", largest_of="largest_norm"),
    "attention": MeasureSpec("attention on former outliers", ".2%"),
    "entropy": MeasureSpec("attention entropy over patches, nats", ".3f"),
    "likeness": MeasureSpec("former outliers like neighbours", ".3f"),
    "likeness_ordinary": MeasureSpec("  ordinary patches there", ".3f"),
    "cls": MeasureSpec("CLS as before, cosine", ".4f", True),
    "patches": MeasureSpec("normal patches as before, cosine", ".4f", True),
    "agreement": MeasureSpec("same prediction", ".2%", True),
    "expected_loss": MeasureSpec("expected loss of top-1", ".2%", True),
    "logit_change": MeasureSpec("largest logit change, mean", ".3g", True),
    "logit_change_of_all": MeasureSpec("largest logit change of all", ".3g", True, largest_of="logit_change"),
    "top1": MeasureSpec("top-1", ".2%"),
}


@dataclass(frozen=True)
class ForwardSummary:
    """One forward pass: patch norms after every block, features, attention in the last block, logits.

    `features` are what the model's final norm makes of the residual stream, as users of the model get them.
    `attention` is that of the CLS token (or of spread patches) to patches in the last block, each row
    scaled to sum to 1; with several queries, their mean.
    """

    norms: Float[Tensor, "l b p"]
    features: Float[Tensor, "b n d"]
    attention: Float[Tensor, "b h p"]
    logits: Float[Tensor, "b c"] | None

    def of(self, index: Int[Tensor, " k"]) -> "ForwardSummary":
        """Some of the images only."""
        logits = None if self.logits is None else self.logits[index]
        return ForwardSummary(self.norms[:, index], self.features[index], self.attention[index], logits)


def summarise(vit: Backbone, pixels: Float[Tensor, "b 3 h w"], readout: Readout) -> ForwardSummary:
    """Run the model, with whatever fix is applied to it."""
    layout, last = vit.layout_for(pixels), vit.anatomy.depth - 1
    norms: dict[int, Tensor] = {}
    kept: list[Tensor] = []
    attention: list[Tensor] = []

    def block(layer: int, residual: Tensor) -> None:
        norms[layer] = token_norms(residual[:, layout.patch_slice])
        if layer == last:
            kept[:] = [residual if readout.norm is None else readout.norm(residual)]

    def attend(layer: int, call: AttentionCall) -> None:
        if layer == last:
            attention[:] = [_patch_attention(call, seen.inner)]

    with evaluating(vit.model), watch(vit, on_block=block, on_attention=attend) as seen:
        output = vit(pixels)
    logits = logits_of(output) if readout.classes else None
    return ForwardSummary(
        torch.stack([norms[layer] for layer in sorted(norms)]), kept[0].float(), attention[0], logits
    )


def _patch_attention(call: AttentionCall, inner: TokenLayout) -> Float[Tensor, "b h p"]:
    rows = call.rows(query_tokens(inner).to(call.k.device))
    return shares_of_patches(rows, inner.patch_slice).mean(2)


class Reference:
    """The unfixed model's pass over some images, and what others are measured by: its outliers.

    An outlier is a patch beyond the diagnosis' threshold at its detect layer. In the other layers it is one
    beyond the layer's own threshold or, where the unfixed model had none, beyond RISEN times the largest
    norm that it had there.
    """

    def __init__(
        self,
        look: ForwardSummary,
        report: Diagnosis,
        layout: TokenLayout,
        classes: list[int | None] | None = None,
    ) -> None:
        assert report.threshold is not None
        assert report.onset_layer is not None
        self._look, self._layout = look, layout
        self._rule, self._onset = report.rule, report.onset_layer
        bounds = [RISEN * x.max_norm if x.threshold is None else x.threshold for x in report.layers]
        self._bounds = look.norms.new_tensor(bounds)[:, None, None]
        self.outliers: Bool[Tensor, "b p"] = self._rule.mask(look.norms[self._rule.layer])
        self._classes = classes
        self._border = torch.ones(layout.grid, dtype=torch.bool, device=look.norms.device)
        self._border[1:-1, 1:-1] = False
        self._border = self._border.flatten()

    def at_border(self) -> tuple[int, int]:
        """Outliers on the image's border, and all."""
        return int((self.outliers & self._border).sum()), int(self.outliers.sum())

    def measure(self, look: ForwardSummary) -> dict[str, Float[Tensor, " b"]]:
        """Every measure of another pass over the same images; NaN where an image has nothing to measure.

        The likeness of ordinary patches comes in two parts, `likeness_border` and `likeness_interior`.
        """
        out, normal = self.outliers, ~self.outliers
        patches = look.features[:, self._layout.patch_slice]
        alike = neighbour_likeness(patches, self._layout)
        beyond = (look.norms >= self._bounds).float().mean(2)
        cosine = F.cosine_similarity(look.features, self._look.features, dim=-1)
        found = {
            "outliers": self._rule.mask(look.norms[self._rule.layer]).float().mean(1),
            "outliers_worst_layer": beyond.amax(0),
            "largest_norm": look.norms[self._onset :].amax((0, 2)),
            "attention": (look.attention.mean(1) * out).sum(1),
            "entropy": torch.special.entr(look.attention).sum(-1).mean(1),
            "likeness": _mean(alike, out),
            "likeness_border": _mean(alike, normal & self._border),
            "likeness_interior": _mean(alike, normal & ~self._border),
            "patches": _mean(cosine[:, self._layout.patch_slice], normal),
        }
        if self._layout.prefix:
            found["cls"] = cosine[:, 0]
        return found | self._predictions(look)

    def _predictions(self, look: ForwardSummary) -> dict[str, Float[Tensor, " b"]]:
        if look.logits is None or self._look.logits is None:
            return {}
        guess = look.logits.argmax(1)
        found = {
            "agreement": (guess == self._look.logits.argmax(1)).float(),
            "expected_loss": self._expected_loss(guess),
            "logit_change": (look.logits - self._look.logits).abs().amax(1),
        }
        if self._classes is not None:
            known = torch.tensor([-1 if c is None else c for c in self._classes], device=guess.device)
            found["top1"] = torch.where(known < 0, torch.nan, (guess == known).float())
        return found

    def _expected_loss(self, guess: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        """How much less likely the new prediction is than the old one, as the unfixed model sees it.

        Its mean is the loss of top-1 that the unfixed model itself would expect: no labels are needed.
        """
        assert self._look.logits is not None
        probabilities = self._look.logits.float().softmax(1)
        return probabilities.amax(1) - probabilities.gather(1, guess[:, None])[:, 0]


def neighbour_likeness(patches: Float[Tensor, "b p d"], layout: TokenLayout) -> Float[Tensor, "b p"]:
    """Cosine of each patch to the mean of its (up to) 4 grid neighbours."""
    cross = patches.new_tensor([[0, 1, 0], [1, 0, 1], [0, 1, 0]])
    grid = patches.unflatten(1, layout.grid).movedim(-1, 1)  # (b, d, gh, gw)
    kernel = cross.expand(grid.shape[1], 1, 3, 3)
    sums = F.conv2d(grid, kernel, padding=1, groups=grid.shape[1])  # the cosine does not mind their number
    return F.cosine_similarity(grid, sums, dim=1).flatten(1)


def _mean(values: Float[Tensor, "b p"], chosen: Bool[Tensor, "b p"]) -> Float[Tensor, " b"]:
    """Mean over the chosen patches of each image; NaN where none is."""
    return (values * chosen).sum(1) / chosen.sum(1)
