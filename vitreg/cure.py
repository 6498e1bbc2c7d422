"""From a model and photos to a fix that was chosen, calibrated and verified: what `vitreg fix` does.

    cure = find_cure(vit, photos)
    print(cure)                       # which fix, why, and whether it helps
    if cure.fix:
        cure.save("my-fix/")

No labels are needed. A model without artifacts gets no fix.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from vitreg.diagnosis import Diagnosis, diagnose
from vitreg.errors import FixError, UnsupportedModelError
from vitreg.fixes import AttentionBias, Fix, ShiftAverage, TestTimeRegisters, TokenSplitting
from vitreg.images import Batch, first_images
from vitreg.models import Backbone
from vitreg.neurons import BATCH, Method, RegisterNeurons, find_register_neurons
from vitreg.verdict import Verdict
from vitreg.verify import verify

Kind = Literal["auto", "registers", "splitting", "bias", "shift-average"]

# Images by which the kind of fix is chosen, and what a test-time register must leave as it was on them, on
# average: the cosines of CLS and of normal patches before and after; and, where there is a head, its word:
# the loss of top-1 that the unfixed model expects of the changed predictions may be half a point.
CHOOSING_IMAGES = 128
UNCHANGED = {"cls": 0.98, "patches": 0.98}
EXPECTED_LOSS = 0.005
# Rounds of find, fix and find again, for models with several populations of outliers.
ROUNDS = 4


@dataclass(frozen=True)
class Cure:
    """A fix (None without artifacts), why it is of its kind, and the verdict on it."""

    fix: Fix | None
    choice: str
    verdict: Verdict

    @property
    def report(self) -> Diagnosis:
        """The diagnosis of the model as it was."""
        return self.verdict.before

    def save(self, folder: str | Path, *, vit: Backbone | None = None) -> Path:
        """Save the fix with its evidence as a folder that `load_fix` reads."""
        if self.fix is None:
            raise FixError("there is no fix to save: the model has no artifacts.")
        before, after = self.verdict.before, self.verdict.after
        evidence = {
            "images": self.verdict.images,
            "threshold": before.threshold,
            "outlier_fraction_before": before.outlier_fraction,
            "outlier_fraction_after": None if after is None else self.verdict["outliers"].after.value,
            "verdict": self.verdict.verdict,
            "reason": self.verdict.reason,
            "choice": self.choice,
        }
        return self.fix.save(folder, vit=vit, evidence=evidence)

    def to_json(self) -> dict[str, Any]:
        """The search, both diagnoses, the verdict and its controls, and why the fix is of its kind."""
        search = {} if self.fix is None else self.fix.neurons.to_json()
        own = {"onset_layer": self.report.onset_layer, "choice": self.choice}
        if self.fix is None:
            own["fix"] = None
        return search | self.verdict.to_json() | own

    def __str__(self) -> str:
        if self.fix is None:
            return str(self.report)
        if not self.fix.neurons.chosen:
            return f"{self.choice}\n\n{self.verdict}"
        neurons = f"register neurons, found by {self.fix.neurons.method!r}:\n{self.fix.neurons}"
        return f"{neurons}\n{self.choice}\n\n{self.verdict}"


def find_cure(
    vit: Backbone,
    images: Iterable[Batch] | Iterable[Tensor],
    *,
    kind: Kind = "auto",
    method: Method = "contrast",
    top_k: int | Literal["auto"] = "auto",
    recursive: bool = False,
    report: Diagnosis | None = None,
    progress: Callable[[str], None] | None = None,
) -> Cure:
    """Find the register neurons, build the fix that suits the model, and verify it on the same images.

    `kind="auto"` takes a test-time register where it leaves predictions as they are, and token splitting
    where it does not (see `choose`). `recursive` finds, fixes and finds again, for models with several
    populations of outliers. `images` are read several times. Raises what `find_register_neurons` and the
    fixes raise.
    """
    say = progress or (lambda stage: None)
    say("diagnosing the model as it is")
    report = report or diagnose(vit, images)
    if not report.has_artifacts:
        nothing = TestTimeRegisters(RegisterNeurons(()), registers=0)
        verdict = Verdict("no artifacts", report.reason, vit.name, nothing, report, images=report.images)
        return Cure(None, "nothing to fix", verdict)
    rounds: list[RegisterNeurons] = []
    if kind != "shift-average":  # which edits no neurons
        say("finding register neurons")
        rounds = [find_register_neurons(vit, images, report, method=method, top_k=top_k)]
    if rounds and recursive:
        rounds = _again(vit, images, rounds, method, top_k, say)
    say("building the fix")
    fix, choice = build(vit, images, rounds, report, kind)
    return Cure(fix, choice, verify(vit, fix, images, report=report, progress=say))


def build(
    vit: Backbone,
    images: Iterable[Batch] | Iterable[Tensor],
    rounds: Sequence[RegisterNeurons],
    report: Diagnosis,
    kind: Kind = "auto",
) -> tuple[Fix, str]:
    """A fix of the wanted kind, calibrated, and one line that says why it is of this kind.

    `rounds` are the neurons that each search found; several with `recursive`.
    """
    asked = f"type {kind!r}, as asked for"
    if kind == "auto":
        return choose(vit, images, rounds, report)
    if kind == "registers":
        return registers_for(joined(rounds)), asked
    if kind == "splitting":
        return splitting_for(vit, images, rounds), asked
    if kind == "bias":
        return AttentionBias.calibrate(vit, images, joined(rounds)), asked
    return ShiftAverage(), asked


def joined(rounds: Sequence[RegisterNeurons]) -> RegisterNeurons:
    """The neurons of all searches, each once, with the evidence of the first."""
    neurons = rounds[0]
    for more in rounds[1:]:
        known = {(neuron.layer, neuron.index) for neuron in neurons.chosen}
        neurons = neurons.with_more([n for n in more.chosen if (n.layer, n.index) not in known])
    return neurons


def registers_for(neurons: RegisterNeurons) -> TestTimeRegisters:
    """Algorithm 2, for gated MLPs with the largest activation of either sign."""
    return TestTimeRegisters(neurons, peak=_peak(neurons))


def calibrated_registers_for(
    vit: Backbone, images: Iterable[Batch] | Iterable[Tensor], neurons: RegisterNeurons
) -> TestTimeRegisters:
    return TestTimeRegisters.calibrate(vit, images, neurons, peak=_peak(neurons))


def _peak(neurons: RegisterNeurons) -> Literal["signed", "absolute"]:
    return "absolute" if any(neuron.at_outliers < 0 for neuron in neurons.chosen) else "signed"


def splitting_for(
    vit: Backbone, images: Iterable[Batch] | Iterable[Tensor], rounds: Sequence[RegisterNeurons]
) -> TokenSplitting:
    """Token splitting, each search's neurons calibrated in the model that the search saw.

    For another search found its outliers at another layer, where those of the first were gone.
    """
    splits = [TokenSplitting.calibrate(vit, images, rounds[0])]
    for i in range(1, len(rounds)):
        with registers_for(joined(rounds[:i])).applied_to(vit):
            splits.append(TokenSplitting.calibrate(vit, images, rounds[i]))
    capacity = min(sum(split.capacity for split in splits), 1.0)
    return TokenSplitting(joined([split.neurons for split in splits]), capacity=capacity)


def choose(
    vit: Backbone,
    images: Iterable[Batch] | Iterable[Tensor],
    rounds: Sequence[RegisterNeurons],
    report: Diagnosis,
) -> tuple[Fix, str]:
    """The first of these that leaves what the model says as it was, and why.

    A test-time register cleans the attention that the model itself computes, but changes what every token
    reads. So the paper's single one is tried first, then as many as an image has outliers, with the feeding
    neurons moved too and calibrated to resemble outliers; if the model notices both, splitting, which
    changes nothing but the forked patches. Judged without labels, by the first images.
    """
    few, neurons = list(first_images(images, CHOOSING_IMAGES).split(BATCH)), joined(rounds)
    tried: list[str] = []
    candidates: tuple[tuple[str, Callable[[], Fix]], ...] = (
        ("the paper's test-time register", lambda: registers_for(neurons)),
        ("calibrated test-time registers", lambda: calibrated_registers_for(vit, few, neurons)),
    )
    for name, build_it in candidates:
        fix = build_it()
        kept, found = _kept(vit, fix, few, report)
        tried.append(f"{name}: {found}")
        if kept:
            return fix, f"{name}, for the model hardly notices: {found}" + _besides(tried[:-1])
    try:
        splitting = splitting_for(vit, few, rounds)
        splitting.edits(vit)
    except UnsupportedModelError as error:
        return fix, f"{name}, though the model notices ({'; '.join(tried)}), for: {error}"
    return (
        splitting,
        f"token splitting, for test-time registers change what the model says ({'; '.join(tried)}).",
    )


def _besides(tried: list[str]) -> str:
    return f" ({'; '.join(tried)})." if tried else "."


def _kept(vit: Backbone, fix: Fix, images: list[Tensor], report: Diagnosis) -> tuple[bool, str]:
    """Whether the model says the same with a fix, and the figures that say so."""
    tried = verify(vit, fix, images, report=report, controls=False, labels=False)
    after = {measure.name: measure.after.value for measure in tried.measures}
    names = {"cls": "cosine of CLS", "patches": "cosine of normal patches"}
    said = [f"{words} {after[name]:.4f}" for name, words in names.items() if name in after]
    kept = all(after[name] >= least for name, least in UNCHANGED.items() if name in after)
    if "expected_loss" in after:
        said.append(f"expected loss of top-1 {after['expected_loss']:.2%}")
        kept = kept and after["expected_loss"] <= EXPECTED_LOSS
    return kept, f"{', '.join(said)}, on {tried.images} images"


def _again(
    vit: Backbone,
    images: Iterable[Batch] | Iterable[Tensor],
    rounds: list[RegisterNeurons],
    method: Method,
    top_k: int | Literal["auto"],
    say: Callable[[str], None],
) -> list[RegisterNeurons]:
    """Find, fix and find again, until nothing new is found: the rounds given, and what each more found."""
    while len(rounds) < ROUNDS:
        neurons = joined(rounds)
        with registers_for(neurons).applied_to(vit):
            say(f"looking again, round {len(rounds) + 1}")
            report = diagnose(vit, images)
            if not report.has_artifacts:
                break
            more = find_register_neurons(vit, images, report, method=method, top_k=top_k)
        rounds = [*rounds, more]
        if joined(rounds).top_k == neurons.top_k:
            return rounds[:-1]
    return rounds
