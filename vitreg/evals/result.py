"""What an evaluation answers: metrics with 95% bootstrap intervals, and all that is needed to repeat it.

result = classification.evaluate(vit, "photos/")
print(result)
print(compare(before, after))     # paired: the same images are drawn for both
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from vitreg.features.config import Config
from vitreg.fixes.base import Fix, applied
from vitreg.hooks.block_edit import edits_of
from vitreg.intervals import Estimate, bootstrap, interval
from vitreg.models.backbone import Backbone
from vitreg.printing import Presented, Step, Summary, called, in_brief, short_name, text_table
from vitreg.version import versions

SHOWN = 6  # metrics at a glance
_WITH_A_FIX = Step("the same with a fix, and compare.", python=("with fix.applied_to(vit): ...",))

# From means over images (r, k) of what is kept of each to the metric (r,).
Reduce = Callable[[Float[np.ndarray, "r k"]], Float[np.ndarray, " r"]]


def first_column(means: Float[np.ndarray, "r k"]) -> Float[np.ndarray, " r"]:
    """The metric is itself the mean over images."""
    return means[:, 0]


def ratio(means: Float[np.ndarray, "r k"]) -> Float[np.ndarray, " r"]:
    """Two columns, such as right pixels and all, make the first over the second; NaN in a draw of none."""
    with np.errstate(invalid="ignore"):
        return means[:, 0] / means[:, 1]


@dataclass(frozen=True, eq=False)
class Metric:
    """A metric of n images: what is kept of each, and how means over images become the metric.

    Intervals come from drawing images again. `samples` (n, k) may hold NaN for images that have no say. For
    an accuracy k = 1; for mIoU they are each image's intersections and unions, and `reduce` divides.
    """

    samples: Float[np.ndarray, "n k"]
    format: str = ".4g"
    higher_is_better: bool = True
    reduce: Reduce = first_column

    @staticmethod
    def mean(values: Any, format: str = ".4g", higher_is_better: bool = True) -> "Metric":
        """The mean of one number per image."""
        return Metric(np.asarray(values, dtype=float)[:, None], format, higher_is_better)

    @property
    def value(self) -> float:
        return float(self.reduce(np.nanmean(self.samples, axis=0, keepdims=True))[0])

    def drawn(self, seed: int = 0) -> Float[np.ndarray, " r"]:
        """The metric on images drawn again; equal seeds and numbers of images make equal draws."""
        return self.reduce(bootstrap(self.samples, seed))

    def estimate(self, seed: int = 0) -> Estimate:
        return Estimate(self.value, *interval(self.drawn(seed)))

    def less(self, other: "Metric", seed: int = 0) -> Estimate:
        """This metric less another: paired where both are of as many images."""
        other_seed = seed if len(self.samples) == len(other.samples) else seed + 1
        return Estimate(self.value - other.value, *interval(self.drawn(seed) - other.drawn(other_seed)))


@dataclass(frozen=True, eq=False, repr=False)
class Result(Presented):
    """One evaluation of one model. `n` counts the images that the metrics are of.

    `fix` names the fixes that were applied, `config` all settings, `notes` say what a reader must know.
    `picture`, where a task has one, draws a matplotlib Figure; `photos` are those that were measured.
    `planted`: the model's artifacts were planted.
    """

    task: str
    model: str
    data: str
    metrics: dict[str, Metric]
    n: int
    config: dict[str, Any]
    fix: str | None = None
    seed: int = 0
    notes: tuple[str, ...] = ()
    picture: Callable[[], Any] | None = None
    photos: tuple[Path, ...] = ()
    versions: dict[str, str] = field(default_factory=versions)
    planted: bool = False

    def estimates(self) -> dict[str, Estimate]:
        return {name: metric.estimate(self.seed) for name, metric in self.metrics.items()}

    def to_json(self) -> dict[str, Any]:
        kept = {
            name: getattr(self, name)
            for name in (
                "task",
                "model",
                "planted",
                "fix",
                "data",
                "n",
                "config",
                "seed",
                "notes",
                "versions",
            )
        }
        kept["metrics"] = {name: vars(estimate) for name, estimate in self.estimates().items()}
        return json.loads(json.dumps(kept, default=str))

    @property
    def draws(self) -> bool:
        """Whether the task draws what it finds."""
        return self.picture is not None

    def figure(self) -> Any:
        """What was found, as a matplotlib Figure. Raises ValueError for a task that draws none."""
        if self.picture is None:
            raise ValueError(f"the task {self.task} draws no figure.")
        return self.picture()

    def summary(self) -> Summary:
        """The first metric as a verdict, and the others."""
        (first, value), *_ = self.rows()
        fix = f", {self.fix}" if self.fix else ""
        return Summary(
            f"{first} {value}",
            f"{self.task} of {called(short_name(self.model), self.planted)}{fix}, n = {self.n:,}",
            self.rows()[:SHOWN],
            notes=[*_and_more(len(self.metrics)), *map(in_brief, self.notes)],
            steps=[] if self.fix else [_WITH_A_FIX],
        )

    def full(self) -> str:
        """All metrics, and the notes."""
        model = called(self.model, self.planted) + (f", {self.fix}" if self.fix else "")
        head = f"{self.task} of {model} on {self.data}, n = {self.n}"
        return "\n".join([head, *_aligned(self.rows()), *self.notes])

    def rows(self) -> list[tuple[str, ...]]:
        """Each metric and its value with the interval, in words."""
        return [(name, written(x, self.metrics[name].format)) for name, x in self.estimates().items()]


def concluded(
    task: str,
    vit: Backbone,
    data: str,
    metrics: dict[str, Metric],
    config: Config,
    *,
    n: int | None = None,
    notes: tuple[str, ...] = (),
    picture: Callable[[], Any] | None = None,
    photos: Sequence[Path] = (),
) -> Result:
    """A Result that says which fixes are on the model; `n` is the first metric's number of images."""
    images = n if n is not None else len(next(iter(metrics.values())).samples)
    return Result(
        task,
        vit.name,
        data,
        metrics,
        n=images,
        config=config.settings(),
        fix=fixes_on(vit),
        seed=config.seed,
        notes=notes,
        picture=picture and partial(_marked, picture, vit.planted),
        photos=tuple(photos),
        planted=vit.planted,
    )


def _marked(picture: Callable[[], Any], planted: bool) -> Any:
    from vitreg.plots.style import mark_phantom

    figure = picture()
    mark_phantom(figure, planted)
    return figure


def fixes_on(vit: Backbone) -> str | None:
    """The fixes that act on a model, in words: "registers (5 neurons, 4 register tokens)"."""
    if not any(map(edits_of, vit.anatomy.block_modules(vit.model))):
        return None
    return " + ".join(map(_described, (handle.fix for handle in applied(vit.model)))) or None


def _described(fix: Fix) -> str:
    parts = [f"{n} neurons" for n in [fix.neurons.top_k] if n]
    parts += [f"{n} register tokens" for n in [getattr(fix, "registers", None)] if n]
    return f"{fix.type} ({', '.join(parts)})" if parts else fix.type


@dataclass(frozen=True, eq=False, repr=False)
class Comparison(Presented):
    """Two results of one task, without and with a fix: the metrics of both, and the differences, paired."""

    before: Result
    after: Result

    def differences(self) -> dict[str, Estimate]:
        """After less before, by metric; paired over images."""
        return differences(self.before, self.after)

    def to_json(self) -> dict[str, Any]:
        """Both results and the differences."""
        change = {name: vars(estimate) for name, estimate in self.differences().items()}
        return {"without": self.before.to_json(), "with": self.after.to_json(), "difference": change}

    @property
    def draws(self) -> bool:
        """Whether the task draws what it finds."""
        return self.after.draws

    def figure(self) -> Any:
        """What was found with the fix, as a matplotlib Figure. Raises ValueError where the task has none."""
        return self.after.figure()

    def conclusion(self) -> str:
        """Which metrics the fix makes better or worse, by the intervals of their differences."""
        return conclusion(self.before, self.after)

    def summary(self) -> Summary:
        """The conclusion, and the metrics before and after."""
        heads, *rows = comparison_rows(self.before, self.after, intervals=False)
        model = called(short_name(self.before.model), self.before.planted)
        notes = dict.fromkeys(map(in_brief, (*self.before.notes, *self.after.notes)))
        return Summary(
            self.conclusion(),
            f"{self.before.task} of {model}, {self.after.fix or 'as it is'}, n = {self.before.n:,}",
            rows[:SHOWN],
            heads=heads,
            notes=["brackets: 95% intervals over images, paired.", *_and_more(len(rows)), *notes],
        )

    def full(self) -> str:
        """All metrics with their intervals, and the notes."""
        before = self.before
        model = called(before.model, before.planted)
        head = f"{before.task} of {model} on {before.data}, n = {before.n}"
        notes = dict.fromkeys((*before.notes, *self.after.notes))
        return "\n".join([head, *_aligned(comparison_rows(before, self.after)), *notes])


def compare(before: Result, after: Result) -> Comparison:
    """Two results of one task, to print, draw or write: the metrics of both, and the differences."""
    return Comparison(before, after)


def conclusion(before: Result, after: Result) -> str:
    """Which metrics a fix makes better or worse, by the intervals of their differences."""
    better, worse = list[str](), list[str]()
    change = differences(before, after)
    for name, difference in change.items():
        low, high = difference.low, difference.high
        if low is not None and high is not None and not low <= 0 <= high:
            up = after.metrics[name].higher_is_better
            (better if (difference.value > 0) == up else worse).append(name)
    said = {"better": better, "worse": worse}.items()
    words = [f"{word} in {_listed(names, len(change))}" for word, names in said if names]
    return ", ".join(words) or "no difference that can be told"


def _listed(names: Sequence[str], of: int) -> str:
    return " and ".join(names) if len(names) <= 2 else f"{len(names)} of {of} metrics"


def _and_more(metrics: int) -> list[str]:
    """A word on the metrics that are left out at a glance."""
    return [f"{metrics - SHOWN} more metrics: --full, or full()."] if metrics > SHOWN else []


def comparison_rows(before: Result, after: Result, *, intervals: bool = True) -> list[tuple[str, ...]]:
    """A head, and a row for each metric: before, after and the difference, in words.

    Without `intervals`, only the difference has one.
    """
    rows: list[tuple[str, ...]] = [("", before.fix or "as it is", after.fix or "as it is", "difference")]
    one, other, change = before.estimates(), after.estimates(), differences(before, after)
    for name in before.metrics | after.metrics:
        form = (before.metrics | after.metrics)[name].format
        values = [_written(side.get(name), form, intervals) for side in (one, other)]
        rows.append((name, *values, written(change.get(name), "+" + form)))
    return rows


def differences(before: Result, after: Result) -> dict[str, Estimate]:
    """After less before, by metric; paired over images."""
    shared = before.metrics.keys() & after.metrics.keys()
    return {
        name: after.metrics[name].less(before.metrics[name], before.seed)
        for name in before.metrics
        if name in shared
    }


def _written(estimate: Estimate | None, form: str, interval: bool) -> str:
    if interval or estimate is None:
        return written(estimate, form)
    return f"{estimate.value:{form}}"


def written(estimate: Estimate | None, form: str) -> str:
    """An estimate as `0.823 [0.799, 0.846]`; nothing for none."""
    if estimate is None:
        return ""
    return f"{estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    return [f"  {line}" for line in text_table(rows, left=len(rows[0])).splitlines()]
