"""All evaluations that the shared data allow, on the two real models, as they are and fixed: one table.

    python benchmarks/evidence.py ../shared --markdown docs/evidence.md
    python benchmarks/evidence.py ../shared --only depth tokens        # some tasks, to the terminal
    python benchmarks/evidence.py ../shared --models DeiT-Ti --fixes 'calibrated registers'

Fixes are calibrated on 64 of the 1000 photos, without labels. A difference to the same model unfixed is given
where its 95% interval (paired, over images) does not hold zero. Features are cached: a run goes on where
it was stopped.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import vitreg
from vitreg.config.settings import with_settings
from vitreg.evals import Result, differences, find_task
from vitreg.evals.result import written
from vitreg.features.config import default_cache
from vitreg.files import write_atomically
from vitreg.fixes import Fix
from vitreg.fixes.neurons import RegisterNeurons
from vitreg.version import versions

MODELS = {"ViT-Ti": "vit_tiny_patch16_224.augreg_in21k_ft_in1k", "DeiT-Ti": "deit_tiny_patch16_224"}
PHOTOS = "data/imagenet-sample-1000"


@dataclass(frozen=True)
class Run:
    """A task on some data, and the metrics that the short table shows."""

    title: str
    task: str
    data: str
    settings: tuple[tuple[str, str], ...] = ()
    shown: tuple[str, ...] = ()


IMAGENETTE, VOC = "data/imagenette", "data/VOCdevkit/VOC2012"
OUTLIERS = "pixel accuracy, former outliers"
CENTRED = (("features", "values"), ("centre", "true"))
VOID = (("ignore", "11"),)
POSITION = ("top-1: normal patches", "top-1: outliers", "top-1: outliers, by usual place")
PIXELS = tuple(f"relative error: {of}" for of in ("normal patches", "outliers", "normal, alike in pixels"))
SGD = (("protocol", "dinov2"),)
CORLOC = ("LOST CorLoc", "TokenCut CorLoc")

RUNS = (
    Run("classification, 1000 photos", "classification", PHOTOS, shown=("top-1",)),
    Run("classification, Imagenette val", "classification", IMAGENETTE, shown=("top-1",)),
    Run("k-NN, Imagenette", "knn", IMAGENETTE, shown=("cls k=20", "mean k=20")),
    Run("logistic regression, Imagenette", "linear", IMAGENETTE, shown=("cls", "mean")),
    Run("DINOv2's linear protocol, Imagenette", "linear", IMAGENETTE, SGD, ("best head",)),
    Run("single tokens, Imagenette", "tokens", IMAGENETTE),
    Run("position (confounded), 1000 photos", "position", PHOTOS, shown=POSITION),
    Run("reconstruction, 1000 photos", "reconstruction", PHOTOS, shown=PIXELS),
    Run("discovery, VOC, keys", "discovery", VOC, shown=CORLOC),
    Run("discovery, VOC, values", "discovery", VOC, (("features", "values"),), CORLOC),
    Run("discovery, VOC, centred values", "discovery", VOC, CENTRED, CORLOC),
    Run("segmentation, CamVid", "segmentation", "data/camvid", VOID, ("mIoU", OUTLIERS)),
    Run("segmentation, VOC", "segmentation", VOC, shown=("mIoU", OUTLIERS)),
    Run("CLS attention as heatmap, VOC", "zero-shot-segmentation", VOC),
    Run("depth", "depth", "data/depth"),
)


# The paper's register, registers that are calibrated to resemble outliers, and token splitting.
FIXES: dict[str, Callable[[vitreg.Backbone, vitreg.Images, RegisterNeurons], Fix]] = {
    "one register": lambda vit, photos, neurons: vitreg.TestTimeRegisters(neurons),
    "calibrated registers": vitreg.TestTimeRegisters.calibrate,
    "splitting": vitreg.TokenSplitting.calibrate,
}


def fixes(vit: vitreg.Backbone, photos: vitreg.Images, names: Sequence[str]) -> dict[str, Fix]:
    neurons = vitreg.find_register_neurons(vit, photos, vitreg.diagnose(vit, photos))
    return {name: FIXES[name](vit, photos, neurons) for name in names}


def evaluated(run: Run, vit: vitreg.Backbone, shared: Path, cache: Path) -> Result:
    task = find_task(run.task)
    config = with_settings(replace(task.config(), cache=cache), dict(run.settings))
    start = time.perf_counter()
    result = task.evaluate(vit, shared / run.data, config)
    took = time.perf_counter() - start
    sys.stderr.write(
        f"{run.title}: {vit.name.rpartition('/')[2]}, {result.fix or 'as it is'}, {took:.0f} s\n"
    )
    return replace(result, model=result.model.rpartition("/")[2], data=run.data)


def columns(
    run: Run, models: dict[str, vitreg.Backbone], found: dict[str, dict[str, Fix]], shared: Path, cache: Path
) -> Iterator[tuple[str, Result]]:
    """(column, result) of a task: each model as it is, and with each of its fixes."""
    for model, vit in models.items():
        yield model, evaluated(run, vit, shared, cache)
        for name, fix in found[model].items():
            with fix.applied_to(vit):
                yield f"{model}, {name}", evaluated(run, vit, shared, cache)


# -- tables ------------------------------------------------------------------------------------------


def short(results: dict[str, dict[str, Result]], runs: tuple[Run, ...]) -> str:
    """One row for each metric that is shown: values, and the differences that are surely not zero."""
    names = list(next(iter(results.values())))
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for run in runs:
        found = results[run.title]
        metrics = dict.fromkeys(m for result in found.values() for m in result.metrics)
        for metric in run.shown or metrics:
            cells = [_cell(found[name.split(",")[0]], result, metric) for name, result in found.items()]
            lines.append(f"| {run.title}: {metric} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(plain: Result, result: Result, metric: str) -> str:
    if metric not in result.metrics:
        return ""
    form = result.metrics[metric].format
    value = f"{result.metrics[metric].value:{form}}"
    change = None if result is plain else differences(plain, result).get(metric)
    if change is None or change.low is None or change.high is None or change.low <= 0 <= change.high:
        return value
    return f"{value} ({change.value:+{form}})"


def whole(results: dict[str, dict[str, Result]], runs: tuple[Run, ...]) -> str:
    """Every metric with its interval, the command behind each task, and the notes."""
    parts = []
    for run in runs:
        found = results[run.title]
        names = list(found)
        metrics = dict.fromkeys(m for result in found.values() for m in result.metrics)
        settings = "".join(f" --set {key}={value}" for key, value in run.settings)
        n = next(iter(found.values())).n
        estimates = [result.estimates() for result in found.values()]
        parts += [
            "",
            f"## {run.title}",
            "",
            f"`vitreg eval {run.task} MODEL {run.data}{settings} [--fix DIR]`, n = {n}",
            "",
        ]
        parts += [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
        for metric in metrics:
            forms = [result.metrics[metric].format for result in found.values() if metric in result.metrics]
            cells = [written(one.get(metric), forms[0]) for one in estimates]
            parts.append(f"| {metric} | {' | '.join(cells)} |")
        said = {name: note for name, result in found.items() for note in result.notes}
        notes = {note: [name for name, r in found.items() if note in r.notes] for note in said.values()}
        parts += [""] + [f"- {note} ({', '.join(names)})" for note, names in notes.items()]
    return "\n".join(parts)


def page(results: dict[str, dict[str, Result]], runs: tuple[Run, ...], command: str) -> str:
    used = ", ".join(f"{name} {version}" for name, version in versions().items())
    return "\n".join(
        [
            "# The evidence",
            "",
            f"Made by `{command}` ({used}).",
            "In brackets: differences to the same model without a fix whose 95% interval, paired over images,"
            " does not hold zero.",
            "",
            short(results, runs),
            "",
            "Each metric with its 95% bootstrap interval over images:",
            whole(results, runs),
            "",
        ]
    )


def _option(name: str, chosen: list[str], default: Collection[str]) -> list[str]:
    """The option as it was given; nothing where it is the default."""
    return [] if chosen == list(default) else [f"--{name}", *chosen]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("shared", type=Path, help="the folder with models/ and data/")
    parser.add_argument("--only", nargs="+", metavar="TASK", help="some tasks, by name")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--fixes", nargs="+", choices=FIXES, default=list(FIXES))
    parser.add_argument("--markdown", type=Path, help="also write the page, and its JSON beside it")
    parser.add_argument("--cache", type=Path, default=default_cache())
    args = parser.parse_args()
    runs = tuple(run for run in RUNS if not args.only or run.task in args.only)
    models = {name: vitreg.load(str(args.shared / "models" / MODELS[name])) for name in args.models}
    photos = sorted((args.shared / PHOTOS).iterdir())
    some = photos[:: len(photos) // 64][:64]
    found = {name: fixes(vit, vitreg.read_images(some, vit), args.fixes) for name, vit in models.items()}
    results = {run.title: dict(columns(run, models, found, args.shared, args.cache)) for run in runs}
    print(short(results, runs))
    if args.markdown:
        options = [
            *_option("models", args.models, MODELS),
            *_option("fixes", args.fixes, FIXES),
            *_option("only", args.only or [], ()),
        ]
        written_to = ["--markdown", str(args.markdown)]
        command = shlex.join(["python", "benchmarks/evidence.py", "../shared", *options, *written_to])
        write_atomically(args.markdown, page(results, runs, command))
        document = {
            title: {name: r.to_json() for name, r in found.items()} for title, found in results.items()
        }
        write_atomically(args.markdown.with_suffix(".json"), json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
