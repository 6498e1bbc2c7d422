"""Which fix suits a model: what makes its outliers narrows the choice, a trial on a few photos settles it.

    fix, choice = choose(vit, images, [neurons], report)             # where neurons make them
    fix, choice = choose_without_neurons(vit, images, origin, report, search)

A trial asks two things of a fix: are the outliers gone, and does the model say what it said? No labels are
needed.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from vitreg.data.batches import BATCH, Batch
from vitreg.data.first_images import first_images
from vitreg.diagnosis.result import Diagnosis
from vitreg.errors import FixError, UnsupportedModelError
from vitreg.fixes import Fix, Inpainting, PositionRepair, Projection, TestTimeRegisters, TokenSplitting
from vitreg.fixes.neurons import RegisterNeurons
from vitreg.models.backbone import Backbone
from vitreg.search.origin import Origin
from vitreg.verification.measuring import GONE, verify

# Images by which a fix is chosen, and what it must leave as it was on them, on average: the cosines of CLS
# and of normal patches before and after; and, where there is a head, its word: the loss of top-1 that the
# unfixed model expects of the changed predictions may be half a point.
CHOOSING_IMAGES = 128
UNCHANGED = {"cls": 0.98, "patches": 0.97}
EXPECTED_LOSS = 0.005
# Numbers of common directions to in-paint, tried in this order (0: the whole patch), until the outliers are
# gone: what a patch holds along other directions is its own, and stays.
INPAINTED = (1, 4, 0)
# Findings (by their kind) that a projection takes out of what is read, and along how many directions a
# position pattern is.
PROJECTED = ("massive dimensions", "position pattern")
POSITION_DIRECTIONS = 8

Batches = Iterable[Batch] | Iterable[Tensor]


@dataclass(frozen=True)
class TriedFix:
    """What a fix did on a few photos.

    `removes`: at most 5% of the outliers are left. `unchanged`: the model says what it said (UNCHANGED,
    EXPECTED_LOSS). `helps` is the verdict, by the rules of `verify` less controls. `likeness` is the cosine
    of normal patches before and after, `said` all figures in words.
    """

    name: str
    fix: Fix
    removes: bool
    unchanged: bool
    helps: bool
    likeness: float
    said: str

    @classmethod
    def of(cls, name: str, fix: Fix, vit: Backbone, images: list[Tensor], report: Diagnosis) -> "TriedFix":
        tried = verify(vit, fix, images, report=report, controls=False, labels=False)
        after = {measure.name: measure.after.value for measure in tried.measures}
        before = tried["outliers"].before
        assert before is not None
        names = {"cls": "cosine of CLS", "patches": "cosine of normal patches"}
        said = [f"{words} {after[name]:.4f}" for name, words in names.items() if name in after]
        unchanged = all(after[name] >= least for name, least in UNCHANGED.items() if name in after)
        if "expected_loss" in after:
            said.append(f"expected loss of top-1 {after['expected_loss']:.2%}")
            unchanged = unchanged and after["expected_loss"] <= EXPECTED_LOSS and tried.verdict != "harms"
        removes = after["outliers"] <= GONE * before.value
        figures = f"{', '.join(said)}, on {tried.images} images"
        return cls(name, fix, removes, unchanged, tried.verdict == "helps", after["patches"], figures)

    @property
    def passed(self) -> bool:
        return self.removes and self.unchanged and self.helps

    def __str__(self) -> str:
        return f"{self.name}: {'' if self.removes else 'outliers stay, '}{self.said}"


def _few(images: Batches) -> list[Tensor]:
    return list(first_images(images, CHOOSING_IMAGES).split(BATCH))


# -- where neurons make the outliers -----------------------------------------------------------------


def joined(rounds: Sequence[RegisterNeurons]) -> RegisterNeurons:
    """The neurons of all searches, each once, with the evidence of the first."""
    neurons = rounds[0]
    for more in rounds[1:]:
        known = {(neuron.layer, neuron.index) for neuron in neurons.chosen}
        neurons = neurons.with_more([n for n in more.chosen if (n.layer, n.index) not in known])
    return neurons


def registers_for(vit: Backbone, neurons: RegisterNeurons) -> TestTimeRegisters:
    """Algorithm 2, for gated MLPs with the largest activation of either sign.

    Where blocks have no room for registers, the neurons are zeroed, which removes the outliers as well.
    """
    registers = 0 if vit.anatomy.no_registers else 1
    return TestTimeRegisters(neurons, registers, peak=_peak(neurons))


def calibrated_registers_for(
    vit: Backbone, images: Iterable[Batch] | Iterable[Tensor], neurons: RegisterNeurons
) -> TestTimeRegisters:
    """One register whose start is calibrated on the images: the mean of what outliers hold there."""
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
        with registers_for(vit, joined(rounds[:i])).applied_to(vit):
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
    changes nothing but the forked patches. Judged without labels, by the first images. Where blocks have no
    room for registers, the neurons at zero stand in their place.
    """
    few, neurons = _few(images), joined(rounds)
    tried: list[str] = []
    candidates: tuple[tuple[str, Callable[[], Fix]], ...] = (
        ("the paper's test-time register", lambda: registers_for(vit, neurons)),
        ("calibrated test-time registers", lambda: calibrated_registers_for(vit, few, neurons)),
    )
    if vit.anatomy.no_registers:
        tried.append(f"no registers, for {vit.anatomy.no_registers}")
        candidates = (("the register neurons at zero", lambda: registers_for(vit, neurons)),)
    for name, build_it in candidates:
        try:
            trial = TriedFix.of(name, build_it(), vit, few, report)
        except FixError as error:  # the first of these images show no outlier to calibrate on
            tried.append(f"{name}: {error}")
            continue
        if trial.unchanged:
            return (
                trial.fix,
                f"{name}, because the model's outputs hardly change: {trial.said}{_besides(tried)}",
            )
        tried.append(f"{name}: {trial.said}")
    what = "zeroed neurons" if vit.anatomy.no_registers else "test-time registers"
    try:
        splitting = splitting_for(vit, few, rounds)
        splitting.check(vit)
        splitting.edits(vit)
    except (FixError, UnsupportedModelError) as error:
        return (
            trial.fix,
            f"{trial.name}, though the model's outputs change ({'; '.join(tried)}), because {error}",
        )
    return (
        splitting,
        f"token splitting, because {what} change what the model says ({'; '.join(tried)}).",
    )


def _besides(tried: list[str]) -> str:
    return f" ({'; '.join(tried)})." if tried else "."


# -- where they do not -------------------------------------------------------------------------------


def choose_without_neurons(
    vit: Backbone,
    images: Batches,
    origin: Origin,
    report: Diagnosis,
    search: Callable[[], Sequence[RegisterNeurons]],
) -> tuple[Fix | None, str]:
    """The fix for outliers that no neurons make, and why; None, and why, if none does.

    Where positions make them, their repair takes away the cause, so that what else changes was its effect: it
    must help, by the rules of `verify`. For other origins, or if it does not, a fix must remove the outliers
    and leave the rest as it was: of in-painting and the neurons that `search` finds (if the outliers vanish
    with them) the one that changes normal patches least.
    """
    few, refused, trials = _few(images), list[str](), list[TriedFix]()
    cause = "no part of the model" if origin.kind == "unknown" else origin.name
    if origin.kind == "position embedding":
        try:
            repair = TriedFix.of("position repair", repair_for(vit, few, origin), vit, few, report)
            if repair.removes and repair.helps:
                return repair.fix, f"{repair.name}, because {cause} makes the outliers: {repair.said}."
            refused.append(str(repair))
        except (FixError, UnsupportedModelError) as error:
            refused.append(f"position repair: {error}")
    trials += inpainting_trials(vit, few, report)
    rounds = search()
    if all(neurons.reached for neurons in rounds):
        fix, _ = choose(vit, few, rounds, report)
        trials.append(TriedFix.of(f"{fix.type} of the neurons that fire there", fix, vit, few, report))
    best = max((trial for trial in trials if trial.passed), key=lambda trial: trial.likeness, default=None)
    others = _besides(refused + [str(trial) for trial in trials if trial is not best])
    if best is not None:
        return best.fix, f"{best.name}, because {cause} alone makes the outliers: {best.said}{others}"
    return None, (
        f"no fix, because {cause} alone makes the outliers, and all that was tried leaves them or changes"
        f" what the model says{others} To have one all the same, ask for it by its type (--type)."
    )


def repair_for(vit: Backbone, images: Batches, origin: Origin) -> PositionRepair:
    """Of the positions that stand out; if none does by its length, of those where the outliers are."""
    try:
        return PositionRepair.calibrate(vit, images)
    except FixError:
        if not origin.positions:
            raise
        columns = vit.layout.grid[1]
        patches = [row * columns + column for row, column in origin.positions]
        return PositionRepair.calibrate(vit, images, patches=patches)


def inpainting_trials(vit: Backbone, images: Batches, report: Diagnosis) -> list[TriedFix]:
    """In-painting of as few directions as pass, the last; if none do, of whole patches at last."""
    few = _few(images)
    trials: list[TriedFix] = []
    for count in INPAINTED:
        what = f"patches along {count} direction{'s'[: count > 1]}" if count else "whole patches"
        fix = Inpainting.calibrate(vit, few, report, directions=count)
        trials.append(TriedFix.of(f"in-painting of {what}", fix, vit, few, report))
        if trials[-1].passed:
            break
    return trials


def projection_for(vit: Backbone, images: Batches, report: Diagnosis) -> Projection:
    """Of the massive channels and, if the diagnosis finds a position pattern, of the position subspace."""
    pattern = any(finding.present and finding.kind == PROJECTED[1] for finding in report.kinds)
    return Projection.calibrate(vit, images, positions=POSITION_DIRECTIONS if pattern else 0)
