"""From a model and photos to a fix that was chosen, calibrated and verified: what `vitreg fix` does.

    search = find_fix(vit, photos)
    print(search)                     # which fix, why, and whether it helps
    if search.fix:
        search.save("my-fix/")

No labels are needed. A model without artifacts gets no fix.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from vitreg.data.batches import Batch
from vitreg.data.first_images import first_images
from vitreg.diagnosis.diagnosing import diagnose
from vitreg.diagnosis.result import Diagnosis
from vitreg.errors import FixError, ImageError
from vitreg.fixes import AttentionBias, Fix, PositionRepair, ShiftAverage, TestTimeRegisters
from vitreg.fixes.neurons import RegisterNeurons
from vitreg.models.backbone import Backbone
from vitreg.printing import Presented, Stages, Summary, Told, one_of
from vitreg.search.choices import FixKind, Method
from vitreg.search.choosing import (
    PROJECTED,
    choose,
    choose_without_neurons,
    inpainting_trials,
    joined,
    projection_for,
    registers_for,
    splitting_for,
)
from vitreg.search.cost import expected_cost
from vitreg.search.origin import Origin, find_origin
from vitreg.search.register_neurons import SEARCHED, find_register_neurons
from vitreg.verification.measuring import AS_IS, stages_of, verify
from vitreg.verification.verdict import Verdict

# The kinds that edit neurons, or may.
OF_NEURONS = ("auto", "registers", "splitting", "bias")
# The stages that are this module's own.
ORIGIN, NEURONS, BUILDING = "finding what makes the outliers", "finding register neurons", "building the fix"
# Rounds of find, fix and find again, for models with several populations of outliers.
ROUNDS = 4


@dataclass(frozen=True, repr=False)
class FixSearch(Presented):
    """A fix, why it is of its kind, and the verdict on it.

    `fix` is None where there is nothing to fix, or nothing that would; `origin` is what makes the outliers,
    None where that was not looked for.
    """

    fix: Fix | None
    choice: str
    verdict: Verdict
    origin: Origin | None = None

    @property
    def report(self) -> Diagnosis:
        """The diagnosis of the model as it was."""
        return self.verdict.before

    def save(self, folder: str | Path, *, vit: Backbone | None = None) -> Path:
        """Save the fix with its evidence as a folder that `load_fix` reads."""
        if self.fix is None:
            raise FixError(f"there is no fix to save ({self.verdict.verdict}): {self.choice}")
        before, after = self.verdict.before, self.verdict.after
        evidence = {
            "images": self.verdict.images,
            "threshold": before.threshold,
            "outlier_fraction_before": before.outlier_fraction,
            "outlier_fraction_after": None if after is None else self.verdict["outliers"].after.value,
            "verdict": self.verdict.verdict,
            "reason": self.verdict.reason,
            "choice": self.choice,
            "origin": None if self.origin is None else str(self.origin),
        }
        return self.fix.save(folder, vit=vit, evidence=evidence)

    def to_json(self) -> dict[str, Any]:
        """The search, the origin, both diagnoses, the verdict with controls, and why this fix."""
        search = {} if self.fix is None else self.fix.neurons.to_json()
        origin = None if self.origin is None else self.origin.to_json()
        own: dict[str, Any] = {
            "onset_layer": self.report.onset_layer,
            "choice": self.choice,
            "origin": origin,
        }
        if self.fix is None:
            own["fix"] = None
        return search | self.verdict.to_json() | own

    def figure(self) -> Any:
        """The figure of the verdict, as a matplotlib Figure."""
        return self.verdict.figure()

    def summary(self) -> Summary:
        """The verdict on the fix, what it is, and how to use it."""
        from vitreg.search.summary import summary_of

        return summary_of(self)

    def full(self) -> str:
        """The neurons, what makes the outliers, why this fix, and the whole verdict."""
        origin = [] if self.origin is None else [f"origin: {self.origin}"]
        if self.fix is None:
            return "\n".join([self.report.full(), *origin, self.choice])
        lines = [*origin, self.choice, "", self.verdict.full()]
        if self.fix.neurons.chosen:
            lines[:0] = [f"register neurons, found by {self.fix.neurons.method!r}:", str(self.fix.neurons)]
        return "\n".join(lines)


def find_fix(
    vit: Backbone,
    images: Iterable[Batch] | Iterable[Tensor],
    *,
    kind: FixKind = "auto",
    method: Method = "contrast",
    top_k: int | Literal["auto"] = "auto",
    recursive: bool = False,
    report: Diagnosis | None = None,
    progress: Told = None,
) -> FixSearch:
    """Find what makes the outliers, build the fix that suits it, and verify it on the same images.

    `kind="auto"` looks for the origin on the first 64 images. Where neurons make the outliers it takes a
    test-time register if that leaves predictions as they are, and token splitting if not (see `choose`);
    outlying positions are repaired; for the rest, see `choose_without_neurons`, which may find no fix: then
    the verdict is "no fix". Without outliers there is no fix either; "projection", asked for, is made all the
    same, for it takes out other things. `recursive` finds, fixes and finds again, for models with several
    populations of outliers. `images` are read several times. `progress`: True says on stderr what is being
    done, and at first about how many forward passes it takes; a function is told it. Raises FixError for
    another `kind`, and what `find_register_neurons` and the fixes raise.
    """
    if kind not in get_args(FixKind):
        raise FixError(f"there is no type {kind!r} of fix. {one_of(kind, get_args(FixKind))}")
    stages = _stages(progress, kind, report is None)
    stages.say(expected_cost(images))
    if report is None:
        stages(AS_IS)
    report = report or diagnose(vit, images)
    if not report.has_artifacts and kind != "projection":
        return _without_fix(vit, report, "no artifacts", report.reason, _nothing_to_fix(report))

    def search() -> list[RegisterNeurons]:
        stages(NEURONS)
        rounds = [find_register_neurons(vit, images, report, method=method, top_k=top_k)]
        return _again(vit, images, rounds, method, top_k, stages) if recursive else rounds

    origin = None
    if kind == "auto":
        stages(ORIGIN)
        origin = _origin(vit, images, report)
    if origin is not None and origin.kind != "neurons":
        fix, choice = choose_without_neurons(vit, images, origin, report, search)
    else:
        rounds = search() if kind in OF_NEURONS else []
        stages(BUILDING)
        fix, choice = build(vit, images, rounds, report, kind)
    if kind == "auto" and origin is None:
        choice += f" (What makes the outliers is not known: none of the first {SEARCHED} images has one.)"
    if fix is None:
        return _without_fix(vit, report, "no fix", choice, choice, origin)
    return FixSearch(fix, choice, verify(vit, fix, images, report=report, progress=stages), origin)


def _stages(progress: Told, kind: FixKind, diagnosing: bool) -> Stages:
    first = [AS_IS] if diagnosing else []
    origin, neurons = [ORIGIN] if kind == "auto" else [], [NEURONS] if kind in OF_NEURONS else []
    return Stages(progress, [*first, *origin, *neurons, BUILDING, *stages_of(controls=True)])


def _origin(vit: Backbone, images: Iterable[Batch] | Iterable[Tensor], report: Diagnosis) -> Origin | None:
    """What makes the outliers; None if the images that are looked at have none, which are the first."""
    try:
        return find_origin(vit, [first_images(images, SEARCHED)], report)
    except ImageError:
        return None


def _without_fix(
    vit: Backbone, report: Diagnosis, said: str, reason: str, choice: str, origin: Origin | None = None
) -> FixSearch:
    nothing = TestTimeRegisters(RegisterNeurons(()), registers=0)
    return FixSearch(
        None, choice, Verdict(said, reason, vit.name, nothing, report, images=report.images), origin
    )


def _nothing_to_fix(report: Diagnosis) -> str:
    """What there is beside outliers, and what helps those who read patches."""
    present = [finding for finding in report.kinds if finding.present]
    if not present:
        return "there is nothing to fix."
    said = f"no patch's norm is to be fixed, but there is more: {'; '.join(x.title for x in present)}."
    read = [finding.kind for finding in present if finding.kind in PROJECTED]
    if read:
        said += f" For dense reading, --type projection takes out: {', '.join(read)}."
    return said


def build(
    vit: Backbone,
    images: Iterable[Batch] | Iterable[Tensor],
    rounds: Sequence[RegisterNeurons],
    report: Diagnosis,
    kind: FixKind = "auto",
) -> tuple[Fix, str]:
    """A fix of the wanted kind, calibrated, and one line that says why it is of this kind.

    `rounds` are the neurons that each search found; several with `recursive`.
    """
    asked = f"type {kind!r}, as asked for"
    if kind == "auto":
        return choose(vit, images, rounds, report)
    if kind == "registers":
        return replace(registers_for(vit, joined(rounds)), registers=1), asked
    if kind == "splitting":
        return splitting_for(vit, images, rounds), asked
    if kind == "bias":
        return AttentionBias.calibrate(vit, images, joined(rounds)), asked
    if kind == "positions":
        return PositionRepair.calibrate(vit, images), asked
    if kind == "inpainting":
        trial = inpainting_trials(vit, images, report)[-1]
        return trial.fix, f"{asked}: {trial}"
    if kind == "projection":
        return projection_for(vit, images, report), asked
    assert kind == "shift-average", f"`build` does not know {kind!r}"
    return ShiftAverage(), asked


def _again(
    vit: Backbone,
    images: Iterable[Batch] | Iterable[Tensor],
    rounds: list[RegisterNeurons],
    method: Method,
    top_k: int | Literal["auto"],
    stages: Stages,
) -> list[RegisterNeurons]:
    """Find, fix and find again, until nothing new is found: the rounds given, and what each more found."""
    while len(rounds) < ROUNDS:
        neurons = joined(rounds)
        with registers_for(vit, neurons).applied_to(vit):
            stages(NEURONS, f": looking again, round {len(rounds) + 1}")
            report = diagnose(vit, images)
            if not report.has_artifacts:
                break
            more = find_register_neurons(vit, images, report, method=method, top_k=top_k)
        rounds = [*rounds, more]
        if joined(rounds).top_k == neurons.top_k:
            return rounds[:-1]
    return rounds
