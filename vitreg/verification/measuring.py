"""Does a fix help? The same images before and after, against controls, with a verdict that may be "no".

    verdict = verify(vit, fix, photos)
    print(verdict)                    # helps, no effect, harms or no artifacts: why, and one table

Images stream; one number per image and measure is kept.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitreg.data.batches import Batch, indices_of
from vitreg.data.first_images import ranks_of
from vitreg.data.imagenet import class_of, wordnet_classes
from vitreg.diagnosis.diagnosing import diagnose
from vitreg.diagnosis.result import Diagnosis
from vitreg.distributed import Ranks
from vitreg.errors import ImageError
from vitreg.fixes.base import Fix
from vitreg.intervals import Estimate
from vitreg.models.backbone import Backbone
from vitreg.models.head import find_readout
from vitreg.models.headless import without_output
from vitreg.printing import Stages, Told
from vitreg.verification.controls import ABLATIONS, PLACEBOS, controls_of
from vitreg.verification.measures import MEASURES, ForwardSummary, Reference, summarise
from vitreg.verification.resampling import Resampled
from vitreg.verification.verdict import Control, Measure, Verdict

# Artifacts are said to be removed, not only reduced, if at most this share of the outliers is left.
GONE = 0.05
# Controls are run on this many images at most, spread evenly.
CONTROL_IMAGES = 256
# How far a fix may fall short: in top-1; in equal predictions, in cosines of CLS and of normal patches.
TOP1_MARGIN = 0.005
AS_IS = "diagnosing the model as it is"  # the first stage
FLOORS = {"agreement": 0.95, "cls": 0.95, "patches": 0.95}


def verify(
    vit: Backbone,
    fix: Fix,
    images: Iterable[Batch] | Iterable[Tensor],
    *,
    report: Diagnosis | None = None,
    controls: bool = True,
    labels: Mapping[str, int] | bool = True,
    seed: int = 0,
    progress: Told | Stages = None,
) -> Verdict:
    """Measure a model without and with a fix on the same images, and its controls on some of them.

    `images` are read several times. `report` is the unfixed model's diagnosis, made here if not given.
    `labels`: whether to read classes off the images' names (WordNet ids, ImageNet heads), or {WordNet id:
    class}. `progress`: True says on stderr what is being done, a function is told it. The rules, each by a
    95% interval over images:

    - "no artifacts": the diagnosis of the unfixed model finds none, or none of these images has any.
    - "harms": with the fix top-1 falls, by more than half a point. Without labels: fewer than 95% of the
      predictions stay; without a head: the cosine of CLS before and after is under 0.95 (without CLS: that
      of normal patches). Also if the artifacts vanish.
    - "helps": no harm, and fewer patches are outliers, at the detect layer and at the worst layer, than
      without the fix and than under any placebo (an inert token; as many random neurons, or where the fix
      has none, its own kind where nothing is wrong).
    - "no effect": anything else.

    Raises ImageError for a report of another model or image size, ValueError for images that can be read
    only once.
    """
    if iter(images) is images:
        raise ValueError("images: expected what can be read more than once (a list, or read_images(...)).")
    names = stages_of(controls)
    stages = (
        progress if isinstance(progress, Stages) else Stages(progress, names if report else [AS_IS, *names])
    )
    if report is None:
        stages(AS_IS)
    before = report or diagnose(vit, images)
    if not before.has_artifacts:
        return Verdict("no artifacts", before.reason, vit.name, fix, before, images=before.images, seed=seed)
    chosen = controls_of(fix, vit, seed) if controls else None
    stages(names[0])
    with fix.applied_to(vit):
        after = diagnose(vit, images)
    stages(names[1])
    table = VersionMeasures(vit, before, labels, after.images)
    for batch in images:
        table.add(batch, {"fix": fix} | (chosen.fixes if chosen else {}))
    table.put_together(ranks_of(images))
    notes = chosen.left_out if chosen else ()
    if why := without_output(vit):
        notes += (f"{why}. Predictions were not compared.",)
    return _concluded(vit, fix, before, after, table, notes, seed)


def stages_of(controls: bool) -> tuple[str, str]:
    """What `verify` does once the model as it is has been diagnosed."""
    return "diagnosing the model with the fix", f"measuring both{', and the controls' if controls else ''}"


class VersionMeasures:
    """The measures of each version of the model, one number per image: {version: {measure: (b,)}}."""

    def __init__(
        self, vit: Backbone, report: Diagnosis, labels: Mapping[str, int] | bool, images: int
    ) -> None:
        self._vit, self._report = vit, report
        self.stride = -(-images // CONTROL_IMAGES)
        self._readout = find_readout(vit)
        self._classes: Mapping[str, int] = labels if isinstance(labels, Mapping) else {}
        if labels is True and self._readout.classes:
            self._classes = wordnet_classes(self._readout.classes)
        self._rows: dict[str, dict[str, list[np.ndarray]]] = {}
        self._places: dict[str, list[int]] = {}  # of the images among those of all ranks
        self._border = self._outliers = 0
        self.images = self.labelled = 0

    def add(self, batch: Batch | Tensor, versions: Mapping[str, Fix]) -> None:
        """Run every version on a batch; the controls, which are all but the "fix", on some of it."""
        pixels, names = (
            (batch.pixels, batch.names) if isinstance(batch, Batch) else (batch, ("",) * len(batch))
        )
        layout = self._vit.layout_for(pixels)
        report = self._report
        if (layout.grid, self._vit.anatomy.depth) != (report.grid, len(report.layers)):
            raise ImageError(
                f"found a patch grid of {layout.grid} and {self._vit.anatomy.depth} blocks, but the diagnosis"
                f" is of {report.grid} and {len(report.layers)}. Diagnose what you verify."
            )
        classes = [class_of(name, self._classes) for name in names]
        places = indices_of(batch, self.images)
        some = torch.arange(-places.start % self.stride, len(pixels), self.stride)  # for the controls
        plain = summarise(self._vit, pixels, self._readout)
        whole = Reference(plain, self._report, layout, classes)
        part = Reference(plain.of(some), self._report, layout, [classes[i] for i in some.tolist()])
        self._keep("unfixed", whole, plain, places)
        whole_run, control = (whole, pixels, places), (part, pixels[some], [places[i] for i in some])
        for name, fix in versions.items():
            reference, few, at = whole_run if name == "fix" else control
            if len(few):
                with fix.applied_to(self._vit):
                    self._keep(name, reference, summarise(self._vit, few, self._readout), at)
        border, outliers = whole.at_border()
        self._border, self._outliers = self._border + border, self._outliers + outliers
        self.images += len(pixels)
        self.labelled += sum(c is not None for c in classes)

    def _keep(self, version: str, reference: Reference, look: ForwardSummary, places: Sequence[int]) -> None:
        self._places.setdefault(version, []).extend(places)
        measures = self._rows.setdefault(version, {})
        for name, values in reference.measure(look).items():
            measures.setdefault(name, []).append(values.double().cpu().numpy())

    def put_together(self, ranks: Ranks) -> None:
        """The images of all ranks, in their order."""
        counts = [self.images, self.labelled, self._border, self._outliers]
        self.images, self.labelled, self._border, self._outliers = (
            sum(each) for each in zip(*ranks.gather(counts), strict=True)
        )
        parts = ranks.gather((self._rows, self._places))
        self._rows = {}
        for version in dict.fromkeys(version for rows, _ in parts for version in rows):
            here = [(rows[version], places[version]) for rows, places in parts if version in rows]
            order = np.argsort([place for _, places in here for place in places])
            for name in here[0][0]:
                joined = np.concatenate([values for rows, _ in here for values in rows[name]])
                self._rows.setdefault(version, {})[name] = [joined[order]]

    def numbers(self) -> dict[str, dict[str, np.ndarray]]:
        """One number per image, {version: {measure: (b,)}}; fewer images for controls.

        Patches at the border have other neighbours, so outliers are compared with ordinary patches of which
        as many lie there.
        """
        border = self._border / max(self._outliers, 1)
        found = {}
        for version, measures in self._rows.items():
            joined = {name: np.concatenate(parts) for name, parts in measures.items()}
            parts = [(border, joined.pop("likeness_border")), (1 - border, joined.pop("likeness_interior"))]
            joined["likeness_ordinary"] = np.sum([share * values for share, values in parts if share], 0)
            found[version] = joined
        return found


def _concluded(
    vit: Backbone,
    fix: Fix,
    before: Diagnosis,
    after: Diagnosis,
    measured: VersionMeasures,
    notes: tuple[str, ...],
    seed: int,
) -> Verdict:
    numbers, whole_runs = measured.numbers(), ("unfixed", "fix")
    whole = Resampled({version: numbers[version] for version in whole_runs}, seed)
    measures = {x.name: x for name in MEASURES if (x := _measure(whole, name)) is not None}
    few = {
        version: {k: x[:: measured.stride] if version in whole_runs else x for k, x in columns.items()}
        for version, columns in numbers.items()
    }
    controls = _controls(Resampled(few, seed), list(few)) if len(few) > 2 else ()
    verdict, reason = judge(measures, controls)
    if after.has_artifacts:
        reason += f" With the fix the diagnosis still finds artifacts: {after.reason}"
    return Verdict(
        verdict,
        reason,
        vit.name,
        fix,
        before,
        after,
        tuple(measures.values()),
        controls,
        images=measured.images,
        control_images=len(range(0, measured.images, measured.stride)),
        labelled=measured.labelled,
        notes=notes,
        seed=seed,
    )


def _measure(whole: Resampled, name: str) -> Measure | None:
    after = whole.value("fix", name)
    if after is None:
        return None
    if MEASURES[name].against:
        return Measure(name, None, after, None)
    return Measure(name, whole.value("unfixed", name), after, whole.difference("fix", "unfixed", name))


def _controls(few: Resampled, versions: list[str]) -> tuple[Control, ...]:
    found = []
    for version in versions:
        measures = {name: few.value(version, name) for name in MEASURES}
        if version == "unfixed":
            measures = {name: x for name, x in measures.items() if not MEASURES[name].against}
        more = few.difference(version, "fix", "outliers")
        assert more is not None
        found.append(Control(version, {name: x for name, x in measures.items() if x is not None}, more))
    return tuple(found)


# -- the rules -------------------------------------------------------------------------------------


def judge(measures: Mapping[str, Measure], controls: tuple[Control, ...]) -> tuple[str, str]:
    """The verdict and its reason, by the rules in `verify`."""
    outliers, worst = measures["outliers"], measures["outliers_worst_layer"]
    assert outliers.before is not None
    if not outliers.before.value:
        return "no artifacts", "none of these images has a patch beyond the diagnosis' threshold."
    change = f"{outliers.before.value:.2%} -> {outliers.after.value:.2%} of patches"
    harmed, cost = _cost(measures)
    if _rises(outliers.difference):
        return "harms", f"it makes more artifacts ({change}); {cost}."
    fewer = _falls(outliers.difference) and _falls(worst.difference)
    does = "removes" if outliers.after.value <= GONE * outliers.before.value else "reduces"
    stay = f"it does not make outlier patches surely fewer ({change})"
    if harmed:
        done = f"it {does} the artifacts ({change}), but at a cost" if fewer else f"{stay}, and has a cost"
        return "harms", f"{done}: {cost}."
    if not fewer:
        return "no effect", f"{stay}; {cost}."
    equal = [c.name for c in controls if c.name in PLACEBOS and not _rises(c.outliers_more)]
    if equal:
        return "no effect", f"{change}, but {' and '.join(equal)} did as well; {cost}."
    return "helps", f"it {does} the artifacts ({change}); {cost}.{_ablations(controls)}"


def _falls(difference: Estimate | None, margin: float = 0.0) -> bool:
    """Whether the whole interval lies below zero, by more than a margin."""
    return difference is not None and difference.high is not None and difference.high < -margin


def _rises(difference: Estimate | None) -> bool:
    return difference is not None and difference.low is not None and difference.low > 0


def _cost_measure(measures: Mapping[str, Any]) -> str:
    """What harm is judged by: the first of these that the model and the images allow."""
    return next(name for name in ("top1", *FLOORS) if name in measures)


def _cost(measures: Mapping[str, Measure]) -> tuple[bool, str]:
    """Whether the fix harms what the model says, and in words what it does to that."""
    name = _cost_measure(measures)
    measure, change = measures[name], measures[name].difference
    if name == "top1" and measure.before and change:
        text = f"top-1 {measure.before.value:.2%} -> {measure.after.value:.2%} ({_points(change)})"
        harmed, possible = _falls(change, TOP1_MARGIN), -(change.low or 0.0)
        if not harmed and possible > TOP1_MARGIN:
            text += f", so that a loss of {100 * possible:.1f} points is not ruled out"
        return harmed, text
    written, after = MEASURES[name].format, measure.after
    within = f"{after.value:{written}} (95% interval {after.low:{written}} to {after.high:{written}})"
    return after.high is not None and after.high < FLOORS[name], f"{MEASURES[name].label}: {within}"


def _points(change: Estimate) -> str:
    value, low, high = (100 * x for x in (change.value, change.low or 0.0, change.high or 0.0))
    return f"{value:+.1f} points, 95% interval {low:+.1f} to {high:+.1f}"


def _ablations(controls: tuple[Control, ...]) -> str:
    """Whether the neurons' absence alone would have done, for those who read that the fix helps."""
    fix = next((control for control in controls if control.name == "fix"), None)
    if fix is None:
        return ""
    name = _cost_measure(fix.measures)
    same = [
        f"{control.name} {control.measures[name].value:{MEASURES[name].format}}"
        for control in controls
        if control.name in ABLATIONS and not _rises(control.outliers_more)
    ]
    if not same:
        return ""
    own = f"with the fix {fix.measures[name].value:{MEASURES[name].format}}"
    what = f"{MEASURES[name].label} on the controls' images"
    return f" Ablating the neurons removes them too; {what}: {own}, {', '.join(same)}."
