"""How far a test-time register goes on a model that pays for it, against token splitting.

    python benchmarks/register_study.py MODEL PHOTOS [PHOTOS2 ...] [--markdown F]

Each PHOTOS is a folder whose file or folder names hold WordNet ids. Every row is one way to fix the model:
top-1 on each folder, predictions equal to the unfixed model's, the largest change of a logit (mean over
images), the largest patch norm from the onset layer on, the CLS attention of the last block on former
outliers, and the cosine of former outliers to the mean of their grid neighbours after the final norm.
The neurons and all that is calibrated come from the first folder's first 64 photos, without labels.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

import vitreg
from vitreg.fixes.calibration import calibrate_thresholds, mean_outliers
from vitreg.verification.measures import MEASURES
from vitreg.verification.measuring import VersionMeasures
from vitreg.verification.resampling import Resampled

HEADER = """# What a test-time register can do, and what splitting does

Every row is one way to fix a model that pays for a register. Made by `benchmarks/register_study.py` (its
first lines say what the columns are); neurons and all that is calibrated come from 64 photos without labels.

"""
SHOWN = ["agreement", "logit_change", "largest_norm_of_all", "attention", "likeness"]


@dataclass(frozen=True)
class Row:
    """One way to fix the model, and what came of it on each folder."""

    name: str
    fix: vitreg.Fix


def rows(vit: vitreg.Backbone, photos: list, neurons: vitreg.RegisterNeurons) -> list[Row]:
    """The study: what is inserted, when, holding what, and which neurons are moved."""
    registers = vitreg.TestTimeRegisters
    fed, _ = calibrate_thresholds(vit, photos, neurons)
    first = min(fed.by_layer)
    own = min(neurons.by_layer)
    at_own = {"initial": mean_outliers(vit, photos, neurons, own, 4)}
    found = [
        Row("4 inert tokens", registers({}, registers=4)),
        Row("neurons zeroed, no register", registers(neurons, registers=0)),
        Row("neurons at their mean, no register", registers(neurons, registers=0, left="mean")),
        *(Row(f"{n} register{'s' * (n > 1)} (paper)", registers(neurons, registers=n)) for n in (1, 2, 4, 8)),
        Row("1, own values left on normal tokens", registers(neurons, left="own")),
        Row("1, twice the activation", registers(neurons, scale=2.0)),
        Row("4, half the activation", registers(neurons, registers=4, scale=0.5)),
        *(
            Row(f"4, initial value: {x}", registers(neurons, registers=4, initial=x))
            for x in ("mean", "random")
        ),
        Row(f"4, entering at block {own}", registers(neurons, registers=4, entry=own)),
        Row(
            f"4, entering at block {own} as mean outliers",
            registers(neurons, registers=4, entry=own, initial="given", tensors=at_own),
        ),
    ]
    chosen = len(neurons.chosen)
    for more in range(1, len(fed.chosen) - chosen + 1):
        some = replace(fed, chosen=fed.chosen[: chosen + more])
        found.append(Row(f"4, with {more} feeding neuron{'s' * (more > 1)}", registers(some, registers=4)))
    calibrated = registers.calibrate(vit, photos, neurons)
    found += [
        Row(f"1, with all {len(fed.chosen) - chosen}", registers(fed)),
        Row(f"4, with all, entering at block {first}", registers(fed, registers=4, entry=first)),
        Row(f"{calibrated.registers}, calibrated: with all, as mean outliers", calibrated),
        Row(
            "splitting, without feeding neurons",
            vitreg.TokenSplitting.calibrate(vit, photos, neurons, feeders=False),
        ),
        Row("token splitting", vitreg.TokenSplitting.calibrate(vit, photos, neurons)),
        Row("attention bias", vitreg.AttentionBias.calibrate(vit, photos, neurons)),
    ]
    return found


def study(args: argparse.Namespace, say: Callable[[str], None]) -> tuple[list[str], list[list[str]]]:
    """(headings, lines): one line per way, the unfixed model first."""
    vit = vitreg.load(args.model)
    folders = [vitreg.read_images(every(folder, args.every), vit) for folder in args.photos]
    reports = [vitreg.diagnose(vit, folder) for folder in folders]
    neurons = vitreg.find_register_neurons(vit, folders[0], reports[0])
    few = [batch.pixels for batch in vitreg.read_images(every(args.photos[0], args.every), vit, limit=64)]
    ways = [row for row in rows(vit, few, neurons) if not args.only or row.name in args.only]
    say(f"neurons {neurons.by_layer}, {len(ways)} ways, {sum(report.images for report in reports)} photos")
    results = []
    for folder, report in zip(folders, reports, strict=True):
        measured = VersionMeasures(vit, report, labels=True, images=1)
        for batch in folder:
            measured.add(batch, {row.name: row.fix for row in ways})
            say(f"{measured.images} of {report.images} photos")
        results.append(Resampled(measured.numbers()))
    headings = ["", *(f"top-1, {Path(folder).name}" for folder in args.photos)]
    headings += [MEASURES[name].label.strip() for name in SHOWN]
    lines = []
    for version in ("unfixed", *(row.name for row in ways)):
        cells = [_written(result, version, "top1") for result in results]
        lines.append([version, *cells, *(_written(results[0], version, name) for name in SHOWN)])
    return headings, lines


def every(folder: str, step: int) -> list[str]:
    """Every step-th photo of a folder, in the order of their paths."""
    return [str(path) for path in sorted(Path(folder).rglob("*")) if path.is_file()][::step]


def _written(result: Resampled, version: str, name: str) -> str:
    estimate = result.value(version, name)
    return (
        "-" if estimate is None else f"{estimate.value:{'.1%' if name == 'top1' else MEASURES[name].format}}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("photos", nargs="+")
    parser.add_argument("--every", type=int, default=1, help="take every N-th photo")
    parser.add_argument("--only", nargs="*", help="only these rows")
    parser.add_argument("--markdown", type=Path, help="also write the table here")
    args = parser.parse_args()
    console = Console(stderr=True)
    headings, lines = study(args, lambda text: console.print(text, highlight=False, markup=False))
    table = [headings, ["---"] * len(headings), *lines]
    text = "\n".join("| " + " | ".join(line) + " |" for line in table)
    print(text)
    if args.markdown:
        args.markdown.write_text(f"{HEADER}{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
