"""How small and few artifacts the diagnosis sees, how sure it is, and how often it sees what is not there.

    python benchmarks/power.py SHARED --markdown docs/power.md       # about 40 minutes of one core
    python benchmarks/power.py SHARED --quick                        # a few cases of everything

SHARED holds models/deit_tiny_patch16_224, models/vit_tiny_patch16_224.augreg_in21k_ft_in1k and
data/imagenet-sample-1000. Populations are put into clean blocks of both models, cut before their own
artifacts begin, and of three random architectures; tails of every kind are forced on the same blocks.
`--photos` says with how many photos.
"""

import argparse
import itertools
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from power_trials import (
    BATCH,
    IMAGES,
    RANDOM,
    REAL,
    TAILS,
    Injection,
    Stream,
    best_f1,
    changed,
    clean_stream,
    f1,
    inject,
    small_backbone,
    statistics_of,
)
from rich.console import Console
from torch import Tensor

import vitreg
from vitreg.diagnosis.judging import Evidence, Judgement, judge
from vitreg.diagnosis.result import SURENESS_POWER, Diagnosis, sureness

from catalog import CATALOG  # isort: skip - power_trials knows where it lies

SIZES, SPREADS, SHARES = (1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 12.0), (0.1, 0.3, 0.5), (0.002, 0.01, 0.02, 0.1)
STREAMS = (*REAL, *RANDOM)
# What the whole of the truncated models diagnoses: these sizes, at this share, with so many photos.
FULLY, FULL_SHARE, FULL_PHOTOS = (3.0, 4.0, 6.0), 0.02, 96
CONTROL_PHOTOS = (32, 96)
# With more photos than this, one spread only.
MANY, ONE_SPREAD = 200, (0.3,)
SMALL = 100  # small random models per seed
BINS = (0.5, 0.7, 0.9, 0.99, 1.0)
POWERS = np.arange(0.5, 8.1, 0.5)
Say = Callable[[str], None]


@dataclass(frozen=True)
class Trial:
    """One verdict, and what is true. `loss`: the best possible threshold's F1 less the mask's."""

    group: str
    what: str
    photos: int
    artifacts: bool
    margin: float
    ratio: float
    evidence: Evidence | None
    injection: Injection | None = None
    loss: float = 0.0
    onset_right: bool = True

    @property
    def right(self) -> bool:
        return self.artifacts == (self.injection is not None)

    def sureness(self, power: float = SURENESS_POWER) -> float:
        return sureness(Judgement(None, None, self.margin, self.artifacts), power)

    def __str__(self) -> str:
        return f"{self.what}: margin {self.margin:.2f}, ratio {self.ratio:.2f}, {self.evidence}"


# -- trials --------------------------------------------------------------------------------------------


def injected_trials(stream: Stream, photos: Sequence[int], quick: bool) -> Iterator[Trial]:
    """Populations in one block, which alone is judged."""
    for count in photos:
        spreads = ONE_SPREAD if quick or count > MANY else SPREADS
        for seed, case in enumerate(itertools.product(SIZES, spreads, SHARES)):
            yield _injected("injected", stream, count, Injection(*case), seed)


def dense_trials(stream: Stream, quick: bool) -> Iterator[Trial]:
    """Populations along a vector in all residual dimensions, in one block."""
    for seed, (size, spread) in enumerate(itertools.product(SIZES, ONE_SPREAD if quick else SPREADS)):
        injection = Injection(size, spread, FULL_SHARE, dimensions=None)
        yield _injected("injected in all dimensions", stream, FULL_PHOTOS, injection, seed)


def _injected(group: str, stream: Stream, count: int, injection: Injection, seed: int) -> Trial:
    some = _some(stream, count, seed)
    added, truth = inject(some, injection, seed)
    judgement = judge(statistics_of(some, some.patches + added), 0)
    norms = torch.linalg.vector_norm(some.patches + added, dim=-1)
    loss = best_f1(norms, truth) - f1(norms >= (judgement.threshold or torch.inf), truth)
    return replace(_judged(group, stream.name, count, judgement), injection=injection, loss=loss)


def whole_injected_trials(stream: Stream, quick: bool) -> Iterator[Trial]:
    """Populations after one block of the whole model, which is diagnosed."""
    for seed, (size, spread) in enumerate(itertools.product(FULLY, ONE_SPREAD if quick else SPREADS)):
        some = _some(stream, FULL_PHOTOS, seed)
        injection = Injection(size, spread, FULL_SHARE)
        added, truth = inject(some, injection, seed)
        parts = iter(added.split(BATCH))
        with changed(some, lambda patches, parts=parts: patches + next(parts)):
            report = vitreg.diagnose(some.vit, some.photos.split(BATCH), examples=len(some.photos))
        shown = np.stack([example.norms[report.detect_layer] for example in report.examples])
        mask = report.rule.mask(torch.from_numpy(shown).flatten(1))
        norms = torch.linalg.vector_norm(some.patches + added, dim=-1)
        yield replace(
            _diagnosed("injected, whole model", stream.name, report),
            injection=injection,
            loss=best_f1(norms, truth) - f1(mask, truth),
            onset_right=report.onset_layer == stream.layer,
        )


def control_trials(stream: Stream, count: int) -> Iterator[Trial]:
    """The clean models as they are, on random photos."""
    for seed in range(count):
        some = _some(stream, CONTROL_PHOTOS[seed % 2], seed)
        report = vitreg.diagnose(some.vit, some.photos.split(BATCH), examples=0)
        yield _diagnosed("clean models", stream.name, report)


def tail_trials(stream: Stream, count: int) -> Iterator[Trial]:
    """Tails of every kind on the patches of one block, which alone is judged."""
    for (name, tail), seed in itertools.product(TAILS.items(), range(count)):
        rng = np.random.default_rng(seed)
        some = _some(stream, CONTROL_PHOTOS[seed % 2], seed)
        patches = some.patches * _factors(some, tail(some, rng))
        judgement = judge(statistics_of(some, patches), 0)
        yield _judged("tails", f"{name}, {stream.name}, seed {seed}", len(patches), judgement)


def whole_tail_trials(stream: Stream) -> Iterator[Trial]:
    """The same after one block of the whole model, which is diagnosed."""
    for seed, (name, tail) in enumerate(TAILS.items(), 1000):
        some = _some(stream, CONTROL_PHOTOS[seed % 2], seed)
        parts = iter(_factors(some, tail(some, np.random.default_rng(seed))).split(BATCH))
        with changed(some, lambda patches, parts=parts: patches * next(parts)):
            report = vitreg.diagnose(some.vit, some.photos.split(BATCH), examples=0)
        yield _diagnosed("tails, whole model", f"{name}, {stream.name}", report)


def random_trials(seed: int, every: int) -> Iterator[Trial]:
    """Random weights of the catalog's architectures on images of every kind."""
    for name, entry in list(CATALOG.items())[::every]:
        vit = entry.backbone(seed)
        for kind, make in IMAGES.items():
            images = make(vit, CONTROL_PHOTOS[seed % 2], np.random.default_rng(seed))
            report = vitreg.diagnose(vit, images.split(BATCH), examples=0)
            yield _diagnosed(f"random weights, {kind}", f"{name}, seed {seed}, {kind}", report)


def small_trials(seeds: Iterable[int]) -> Iterator[Trial]:
    """Small random models on photos."""
    for seed in seeds:
        vit = small_backbone(seed)
        images = IMAGES["photos"](vit, CONTROL_PHOTOS[seed % 2], np.random.default_rng(seed))
        report = vitreg.diagnose(vit, images.split(BATCH), examples=0)
        yield _diagnosed("small random models, photos", f"seed {seed}, width {vit.anatomy.width}", report)


def _some(stream: Stream, count: int, seed: int) -> Stream:
    chosen = torch.randperm(len(stream.photos), generator=torch.Generator().manual_seed(seed))[:count]
    return stream.some(chosen)


def _factors(stream: Stream, factors: np.ndarray) -> Tensor:
    whole = np.broadcast_to(factors, stream.patches.shape[:2]).astype(np.float32)
    return torch.from_numpy(whole)[..., None]


def _judged(group: str, what: str, photos: int, judgement: Judgement) -> Trial:
    ratio = judgement.population.ratio if judgement.population else 1.0
    return Trial(group, what, photos, judgement.stands, judgement.margin, ratio, judgement.evidence)


def _diagnosed(group: str, what: str, report: Diagnosis) -> Trial:
    layer = report.layers[report.detect_layer]
    what = f"{what}, block {report.detect_layer}"
    return Trial(group, what, report.images, report.has_artifacts, layer.margin, layer.ratio, layer.evidence)


def trials_of(job: str, shared: Path, photos: Sequence[int], quick: bool) -> list[Trial]:
    """Those of one stream, or of the random weights that a seed draws."""
    torch.set_num_threads(1)
    if job not in STREAMS:
        small = range(SMALL * int(job), SMALL * (int(job) + 1))
        return [*random_trials(int(job), 8 if quick else 1), *small_trials(small[: 5 if quick else SMALL])]
    stream = clean_stream(shared, job, max(*photos, FULL_PHOTOS))
    return [
        *injected_trials(stream, photos, quick),
        *dense_trials(stream, quick),
        *whole_injected_trials(stream, quick),
        *control_trials(stream, 2 if quick else 30),
        *tail_trials(stream, 1 if quick else 14),
        *([] if quick else whole_tail_trials(stream)),
    ]


def all_trials(args: argparse.Namespace, say: Say) -> list[Trial]:
    jobs = [*STREAMS, *map(str, range(1 if args.quick else 2))]
    trials: list[Trial] = []
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        run = partial(trials_of, shared=args.shared, photos=args.photos, quick=args.quick)
        for job, found in zip(jobs, pool.map(run, jobs), strict=True):
            say(f"{job}: {len(found)} trials, {sum(not x.right for x in found)} wrong")
            trials += found
    return trials


# -- the page ------------------------------------------------------------------------------------------

HEADER = """# What the diagnosis sees, how sure it is, and what it does not take for artifacts

`python benchmarks/power.py SHARED --markdown docs/power.md`

Populations of known patches are injected into clean blocks: a DeiT-Ti's first six blocks (after block 3), a
ViT-Ti's first five (after block 2), and random ViT, DINOv2 and SigLIP shapes (after block 1), on photos of
ImageNet. An injection adds a vector in three random residual dimensions to random patches; its length is
`size` times the median norm with a lognormal spread of .1, .3 or .5 (with 1000 photos: .3). One row of each
table shows vectors in all dimensions. Below 3x the shape of the norms alone does not tell artifacts from what
photos show, and such a vector is no further evidence: the content of patches has directions like it.
"""


def page(trials: list[Trial]) -> str:
    return "\n".join([HEADER, _power(trials), _whole(trials), _calibration(trials), _alarms(trials)])


def _power(trials: list[Trial]) -> str:
    """Share found, F1 lost and sureness, by size, share and photos."""
    parts = ["## Power\n"]
    tables: dict[str, Callable[[list[Trial]], str]] = {
        "Share of the cases that are said to be artifacts": lambda x: f"{_mean(t.artifacts for t in x):.0%}",
        "F1 of the masks, less than the best possible threshold reaches (mean over those found)": _f1_lost,
        "Sureness of the verdict (mean)": lambda x: f"{_mean(t.sureness() for t in x):.2f}",
    }
    cases = [t for t in trials if t.group == "injected"]
    dense = [t for t in trials if t.group == "injected in all dimensions"]
    for title, cell in tables.items():
        rows = []
        for photos, share in itertools.product(sorted({t.photos for t in cases}), SHARES):
            row = [t for t in cases if t.photos == photos and t.injection and t.injection.share == share]
            rows.append([f"{photos}", f"{share:.1%}", "3", *_by_size(row, cell)])
        rows.append([f"{FULL_PHOTOS}", f"{FULL_SHARE:.1%}", "all", *_by_size(dense, cell)])
        headings = ["photos", "share", "dimensions", *(f"{x:g}x" for x in SIZES)]
        parts.append(f"{title}:\n\n{_table(headings, rows)}\n")
    return "\n".join(parts)


def _by_size(cases: list[Trial], cell: Callable[[list[Trial]], str]) -> list[str]:
    return [cell([t for t in cases if t.injection and t.injection.size == size]) for size in SIZES]


def _f1_lost(cases: list[Trial]) -> str:
    found = [t.loss for t in cases if t.artifacts]
    return f"{_mean(found):.3f}" if found else "-"


def _whole(trials: list[Trial]) -> str:
    """The same by a diagnosis of the whole truncated model."""
    cases = [t for t in trials if t.group == "injected, whole model"]
    names = dict.fromkeys(t.what.rpartition(", block")[0] for t in cases)
    rows = []
    for name in names:
        mine = [t for t in cases if t.what.startswith(f"{name}, block")]
        rows.append([
            name,
            f"{sum(t.artifacts for t in mine)} of {len(mine)}",
            f"{sum(t.onset_right for t in mine)} of {len(mine)}",
            f"{max(t.loss for t in mine):.3f}",
        ])  # fmt: skip
    sizes = ", ".join(f"{x:g}x" for x in FULLY)
    title = (
        f"## Whole models\n\n{FULL_PHOTOS} photos, {FULL_SHARE:.0%} of the patches, {sizes}, every spread:\n"
    )
    headings = ["model", "artifacts", "onset at the injected block", "most F1 lost to the best threshold"]
    return f"{title}\n{_table(headings, rows)}\n"


def _calibration(trials: list[Trial]) -> str:
    """Of the verdicts with a sureness, how many are right; and the power that fits best."""
    sides = {
        '"artifacts"': [t for t in trials if t.artifacts],
        '"no artifacts"': [t for t in trials if not t.artifacts],
        "all": trials,
        "all, nothing injected from 3x on": [
            t for t in trials if t.injection is None or t.injection.size < 3
        ],
    }
    headings = ["verdict", *(f"{a:g} to {b:g}" for a, b in itertools.pairwise(BINS))]
    rows = []
    for side, cases in sides.items():
        row = [side]
        for low, high in itertools.pairwise(BINS):
            inside = [t for t in cases if low <= t.sureness() < high + (high == 1)]
            row.append(f"{_mean(t.right for t in inside):.1%} of {len(inside)}" if inside else "-")
        rows.append(row)
    fitted = max(POWERS, key=lambda power: _log_likelihood(trials, power))
    return (
        "## Calibration\n\nOf the cases with such a sureness, how many verdicts are right (injected, clean"
        f" and with tails, as often as they were tried):\n\n{_table(headings, rows)}\n\n"
        f"The exponent that fits these verdicts best is {fitted:g}; it is set to {SURENESS_POWER:g}.\n"
    )


def _log_likelihood(trials: list[Trial], power: float) -> float:
    sure = np.clip([t.sureness(power) for t in trials], 0, 1 - 1e-4)
    right = np.array([t.right for t in trials])
    return float(np.log(np.where(right, sure, 1 - sure)).sum())


def _alarms(trials: list[Trial]) -> str:
    """False alarms, counted by what was tried, and each of them."""
    clean = [t for t in trials if t.injection is None]
    groups = dict.fromkeys(t.group for t in clean)
    rows = []
    for group in groups:
        mine = [t for t in clean if t.group == group]
        rows.append([group, f"{len(mine)}", f"{sum(t.artifacts for t in mine)}"])
    alarms = [t for t in clean if t.artifacts]
    rows.append(["all", f"{len(clean)}", f"{len(alarms)}"])
    listed = "\n".join(f"- {t}" for t in alarms) or "None."
    table = _table(["tried", "trials", "said to be artifacts"], rows)
    return f"## False alarms\n\nTails: {', '.join(TAILS)}.\n\n{table}\n\nEach of them:\n\n{listed}\n"


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / max(len(numbers), 1)


def _table(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shared", type=Path)
    parser.add_argument("--photos", type=int, nargs="+", default=[32, 96, 1000])
    parser.add_argument("--quick", action="store_true", help="a few cases of everything")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--markdown", type=Path, help="also write the page here")
    args = parser.parse_args()
    console = Console(stderr=True)
    text = page(all_trials(args, lambda line: console.print(line, highlight=False, markup=False)))
    print(text)
    if args.markdown:
        args.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
