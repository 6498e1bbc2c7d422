"""What `vitreg.verify` says: the verdict, its reason and what was measured, as a table, JSON or figure."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from vitreg.diagnosis.result import Diagnosis
from vitreg.fixes.base import Fix
from vitreg.intervals import Estimate
from vitreg.printing import Presented, Summary, called, one_of, text_table
from vitreg.verification.measures import MEASURES
from vitreg.version import versions


@dataclass(frozen=True)
class Measure:
    """One measure before and after a fix. What compares the two models has no `before` and `difference`.

    `difference` is after less before, its interval that of paired images.
    """

    name: str
    before: Estimate | None
    after: Estimate
    difference: Estimate | None


@dataclass(frozen=True)
class Control:
    """A version of the model (unfixed, with the fix, or otherwise changed), on the images of the controls.

    `outliers_more` is its outlier fraction less that under the fix.
    """

    name: str
    measures: dict[str, Estimate]
    outliers_more: Estimate


@dataclass(frozen=True, repr=False)
class Verdict(Presented):
    """What `verify` found. Print it (`full()` says more), `.to_json()` it, draw it with `.figure()`.

    `verdict` is "helps", "no effect", "harms" or "no artifacts" ("no fix" where `find_fix` finds none),
    `reason` says why. Without artifacts or fix nothing is measured and `after` is None. `labelled` counts the
    images whose class is known.
    """

    verdict: str
    reason: str
    model: str
    fix: Fix
    before: Diagnosis
    after: Diagnosis | None = None
    measures: tuple[Measure, ...] = ()
    controls: tuple[Control, ...] = ()
    images: int = 0
    control_images: int = 0
    labelled: int = 0
    notes: tuple[str, ...] = ()
    seed: int = 0
    versions: dict[str, str] = field(default_factory=versions)

    @property
    def planted(self) -> bool:
        """Whether the model's artifacts were planted."""
        return self.before.planted

    def __getitem__(self, name: str) -> Measure:
        """A measure by its name in `vitreg.verification.measures.MEASURES`."""
        by_name = {measure.name: measure for measure in self.measures}
        if name not in by_name:
            raise KeyError(f"there is no measure {name!r}. {one_of(name, by_name)}")
        return by_name[name]

    def to_json(self) -> dict[str, Any]:
        """Neurons with their evidence, both diagnoses, measures and controls; NaN becomes None."""
        own = {k: v for k, v in vars(self).items() if k not in ("fix", "before", "after")}
        neurons = self.fix.neurons.to_json()
        found = {k: v for k, v in neurons.items() if k not in ("search", "reached")} | own
        found |= {
            "planted": self.planted,
            "fix": self.fix.type,
            "before": self.before.to_json(),
            "after": None if self.after is None else self.after.to_json(),
            "measures": [asdict(x) | {"label": MEASURES[x.name].label.strip()} for x in self.measures],
            "controls": [asdict(control) for control in self.controls],
        }
        plain: dict[str, Any] = _plain(found)
        return plain

    def figure(self) -> Any:
        """Outliers, attention and predictions of every version of the model, with their intervals.

        Where nothing was measured, that of the diagnosis.
        """
        if not self.measures:
            return self.before.figure()
        from vitreg.verification.figure import versions_figure

        return versions_figure(self)

    def summary(self) -> Summary:
        """The verdict, and the measures that it rests on, before and after."""
        from vitreg.verification.summary import summary_of

        return summary_of(self)

    def full(self) -> str:
        """The verdict with its reason, all measures with their intervals and the controls."""
        model = called(self.model, self.planted)
        lines = [f"{model} with fix of type {self.fix.type!r}: {self.verdict}", self.reason]
        if self.measures:
            lines += ["", _table(self).rstrip(), "", *self.footnotes()]
        return "\n".join(lines)

    def footnotes(self) -> list[str]:
        """What the numbers are of."""
        seen = f"{self.images} images"
        if self.labelled:
            seen += f", {self.images - self.labelled} of them without a known class"
        seen += "; in brackets, 95% bootstrap intervals over images, paired."
        if self.controls:
            seen += f" Controls: {self.control_images} of them."
        left = self.fix.does_not_cure
        return [seen, *self.notes, *([f"What it does not cure: {left}"] if left else [])]


def _plain(value: Any) -> Any:
    """JSON-ready: NaN, which JSON does not know, becomes None."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def measure_table(verdict: Verdict) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of texts: measures down, versions of the model across."""
    others = [control for control in verdict.controls if control.name not in ("unfixed", "fix")]
    rows = []
    for measure in verdict.measures:
        change = measure.difference or measure.after
        row = [
            MEASURES[measure.name].label,
            written(measure.name, measure.before),
            written(measure.name, measure.after),
            _with_interval(measure.name, change, signed=measure.difference is not None),
        ]
        rows.append(row + [written(measure.name, x.measures.get(measure.name)) for x in others])
    return ["", "before", "after", "change", *(control.name for control in others)], rows


def _table(verdict: Verdict) -> str:
    heads, rows = measure_table(verdict)
    return text_table(rows, heads)


def written(name: str, estimate: Estimate | None) -> str:
    """An estimate without its interval; a dash for none."""
    return "-" if estimate is None else format(estimate.value, MEASURES[name].format)


def _with_interval(name: str, estimate: Estimate, signed: bool) -> str:
    spec = ("+" if signed else "") + MEASURES[name].format
    interval = "" if estimate.low is None else f" [{estimate.low:{spec}}, {estimate.high:{spec}}]"
    # What compares the two models stands under "after" already.
    return f"{estimate.value:{spec}}{interval}" if signed else interval.strip()
