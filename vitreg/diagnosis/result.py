"""What a diagnosis says: the verdict, its evidence layer by layer, and example photos."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from vitreg.diagnosis.judging import Evidence, Judgement
from vitreg.diagnosis.kinds import Finding
from vitreg.diagnosis.outliers import OutlierRule
from vitreg.diagnosis.statistics import EDGES, Statistics
from vitreg.diagnosis.wording import name_of_queries, words_of_sink
from vitreg.models.backbone import Backbone
from vitreg.models.probe import evaluating
from vitreg.printing import Presented, Summary, called, one_of
from vitreg.tracing.records import trace

Queries = Literal["cls", "patches"]


# The attention beyond their share that severe, and moderate, artifacts draw in some block; in words.
SEVERE, MODERATE = 0.2, 0.05


STRENGTHS = {
    "severe": f"in some block they draw {SEVERE:.0%} of the attention or more beyond their share",
    "moderate": f"in some block they draw {MODERATE:.0%} to {SEVERE:.0%} of the attention beyond their share",
    "mild": f"they draw less than {MODERATE:.0%} of the attention beyond their share",
}


# How fast the sureness of a verdict rises with the margin of its evidence (compare: benchmarks/power.py).
SURENESS_POWER = 3.0


# Without any sign of them there are artifacts all the same, too few or too faint, in one case of a hundred
# (as tried there): smaller margins than this say no more.
LEAST_MARGIN = 0.2


@dataclass(frozen=True)
class LayerDiagnosis:
    """One layer: norms of patch tokens (in units of the residual stream), outliers, attention.

    `threshold` is None where no second population of norms is an artifact. Of the second population that
    explains the norms best, whether it counts or not, `ratio` is its median norm over that of the others,
    `misjudged` the share of all patches that the threshold puts on the wrong side, and `margin` how many
    times the evidence of its shape exceeds what is needed (0: there is none). `attention_to_outliers` is the
    share of CLS-to-patch attention (mean over heads and images) on tokens that enter this block as
    outliers, `attention_by_head` the same per head. `value_norm_ratio` compares value norms at these
    tokens with those elsewhere.
    """

    layer: int
    median_norm: float
    p99_norm: float
    max_norm: float
    mean_plus_3_sigma: float
    threshold: float | None
    outlier_fraction: float
    ratio: float
    misjudged: float
    margin: float
    evidence: Evidence | None
    attention_to_outliers: float
    attention_by_head: list[float]
    value_norm_ratio: float | None
    cls_norm: float | None
    register_norm: float | None


@dataclass(frozen=True)
class Example:
    """One image as the report shows it: the photo, and per layer its norms and attention, (l, gh, gw).

    `features` are those of its patches after the final norm.
    """

    name: str
    photo: Shaped[np.ndarray, "h w 3"]
    norms: Float[np.ndarray, "l gh gw"]
    attention: Float[np.ndarray, "l gh gw"]
    features: Float[np.ndarray, "gh gw d"]


@dataclass(frozen=True)
class Sink:
    """What becomes of the attention that outliers draw (arXiv 2606.08105).

    `value_norm_ratio` is the norm of their values over that of others', the median of the blocks that read
    them. A "nop" sink has little to say (less than NOP_SINK); what a "broadcast" sink holds is read.
    """

    kind: Literal["nop", "broadcast"]
    value_norm_ratio: float


@dataclass(frozen=True, repr=False)
class Diagnosis(Presented):
    """What `diagnose` found. Print it (`full()` says more), `.to_json()` it, draw it with `figure()`.

    `verdict` is "artifacts" or "no artifacts", `sureness` (0.5 to 1) rises with the margin of its evidence
    (`benchmarks/power.py` compares it with how often it is right). Without artifacts the threshold and onset
    are None, fractions are 0, `detect_layer` is the layer that came closest, and `detectable` says what would
    have been seen: {share of patches: multiple of the median norm}, None for what would not.

    With artifacts `rule` tells outliers from others at `detect_layer`, where they stand out most; `strength`
    is "mild", "moderate" or "severe" (see `strength_of`), and `misjudged` the share of patches that no
    threshold can tell. `attention_queries` says whose attention was read: that of CLS or, without one, of
    evenly spread patches. `planted`: the model is a phantom, whose artifacts were planted.
    """

    model: str
    planted: bool
    images: int
    failed_images: list[dict[str, str]]
    image_size: tuple[int, int]
    grid: tuple[int, int]
    prefix_tokens: int
    register_tokens: int
    verdict: str
    reason: str
    sureness: float
    strength: str | None
    misjudged: float
    detectable: dict[str, float | None]
    rule: OutlierRule
    threshold: float | None
    mean_plus_3_sigma: float
    mean_plus_3_sigma_fraction: float
    detect_layer: int
    onset_layer: int | None
    outlier_fraction: float
    outliers_per_image: float
    attention_to_outliers: float
    attention_queries: Queries
    position_frequency: list[list[float]]
    neighbour_similarity: dict[str, float | None]
    sink: Sink | None
    excess_dimensions: list[dict[str, int | float]]
    layers: list[LayerDiagnosis]
    versions: dict[str, str]
    kinds: tuple[Finding, ...]
    statistics: Statistics = field(repr=False, compare=False)
    examples: list[Example] = field(repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """Everything but the histograms and examples, as JSON-ready values."""
        apart = ("statistics", "examples", "layers", "kinds")
        plain = {k: v for k, v in vars(self).items() if k not in apart}
        return plain | {
            "sink": None if self.sink is None else asdict(self.sink),
            "rule": self.rule.to_json(),
            "kinds": {finding.kind: finding.to_json() for finding in self.kinds},
            "layers": [asdict(layer) for layer in self.layers],
        }

    @property
    def has_artifacts(self) -> bool:
        return self.verdict == "artifacts"

    @property
    def other_artifacts(self) -> tuple[Finding, ...]:
        """The findings of those kinds of artifacts, beside high norms, that the model has."""
        return tuple(finding for finding in self.kinds if finding.present)

    def kind(self, name: str) -> Finding:
        """What was found of one kind, "attention sinks", say, present or not. Raises KeyError for others."""
        by_name = {finding.kind: finding for finding in self.kinds}
        if name not in by_name:
            raise KeyError(f"there is no kind of artifact {name!r}. {one_of(name, by_name)}")
        return by_name[name]

    @property
    def histograms(self) -> tuple[Float[np.ndarray, "l k"], Float[np.ndarray, " edges"]]:
        """Patch tokens per layer and norm bin, and the bins' edges."""
        return self.statistics.counts.double().numpy(), EDGES.double().numpy()

    def outliers(self, vit: Backbone, images: Float[Tensor, "b 3 h w"]) -> Bool[Tensor, "b gh gw"]:
        """Masks of the outlier patches of these images, by this diagnosis' layer and threshold."""
        with evaluating(vit.model), trace(vit, layers=[self.detect_layer]) as t:
            vit(images)
        mask = self.rule.mask(t.norms[0, :, t.layout.patch_slice])
        return t.layout.as_grid(mask)

    def figure(self) -> Any:
        """The main figure, as a matplotlib Figure."""
        from vitreg.diagnosis.figures import overview

        return overview(self)

    def summary(self) -> Summary:
        """The verdict, how many outliers there are, how large, from which block on and where."""
        from vitreg.diagnosis.summary import summary_of

        return summary_of(self)

    def full(self) -> str:
        """The verdict with its reason, all facts, every kind of artifact, and what could not be read."""
        lines = [f"{called(self.model, self.planted)}: {self.verdict}", self.reason, *self._facts()]
        lines += [f"{finding.title}: {finding}" for finding in self.other_artifacts]
        if self.failed_images:
            lines.append(f"{len(self.failed_images)} images could not be read:")
            lines += [f"  {failed['path']}: {failed['reason']}" for failed in self.failed_images]
        return "\n".join(lines)

    def _facts(self) -> list[str]:
        if not self.has_artifacts:
            seen = would_have_been_seen(self)
            return [f"sureness: {self.sureness:.1%}", f"what would have been seen in so many images: {seen}"]
        similar = self.neighbour_similarity
        lines = [
            f"sureness: {self.sureness:.1%}",
            f"strength: {self.strength} ({STRENGTHS[self.strength or 'mild']})",
            f"outliers per image: {self.outliers_per_image:.2f} of {self.grid[0] * self.grid[1]} patches",
            f"places: {describe_positions(self.position_frequency, images=self.images)}",
            f"attention on outliers in the last block: {self.attention_to_outliers:.1%}"
            f" (from {name_of_queries(self.attention_queries)})",
        ]
        if similar["outlier"] is not None and similar["normal"] is not None:
            lines.append(
                f"likeness to neighbours (cosine): outliers {similar['outlier']:.2f},"
                f" others {similar['normal']:.2f}"
            )
        if self.sink:
            lines.append(f"kind of sink: {words_of_sink(self.sink)}")
        dims = ", ".join(f"{d['dimension']} ({d['share']:.0%})" for d in self.excess_dimensions)
        lines.append(f"residual dimensions that carry the excess: {dims}")
        return lines


def sureness(judgement: Judgement, power: float = SURENESS_POWER) -> float:
    """The probability that the verdict on a layer is right: of artifacts if they stand, else of none."""
    odds = max(judgement.margin, LEAST_MARGIN) ** power
    artifacts = odds / (1 + odds)
    return max(artifacts, 0.5) if judgement.stands else max(1 - artifacts, 0.5)


def describe_positions(frequency: list[list[float]], often: float = 0.5, *, images: int) -> str:
    """Whether outliers sit at fixed places, in words."""
    grid = torch.tensor(frequency)
    if images == 1:
        return "one photo cannot tell whether they are fixed"
    places = [(r, c) for r, c in (grid >= often).nonzero().tolist()]
    if not places:
        row, column = divmod(int(grid.argmax()), grid.shape[1])
        return f"no fixed places (most often row {row}, column {column}: {float(grid.max()):.0%} of images)"
    share = float(sum(grid[r, c] for r, c in places) / grid.sum())
    named = ", ".join(f"({r}, {c})" for r, c in places[:8]) + (", ..." if len(places) > 8 else "")
    return f"{share:.0%} of them at fixed places (row, column): {named}"


def would_have_been_seen(diagnosis: Diagnosis) -> str:
    """Which artifacts would not have been missed, in words."""
    seen = [
        f"{float(share):.1%} of the patches at {ratio:.1f}x the median norm"
        for share, ratio in diagnosis.detectable.items()
        if ratio is not None
    ]
    if not seen:
        return "too few patches: not even far outliers would have been"
    return "from " + ", or ".join(seen) + " on"
