"""What makes object discovery work: CorLoc by features, treatment, resolution and fix, as Markdown tables.

    python benchmarks/discovery_study.py MODEL VOCdevkit/VOC2012 --fix fixes/registers --fix fixes/splitting

Two tables per resolution. In the first, under each fix stands its CorLoc and, with a 95% interval
over the same photos, the difference from the model as it is. The second has LOST's CorLoc by its bias.
"""

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import vitreg
from vitreg.evals import Result, differences
from vitreg.evals.discovery import DiscoveryConfig, evaluate
from vitreg.evals.result import written
from vitreg.features.config import default_cache

TREATMENTS: dict[str, dict[str, Any]] = {
    "LOST, plain": {"method": "lost"},
    "LOST, centred": {"method": "lost", "centre": True},
    "LOST, centred and normalised": {"method": "lost", "centre": True, "normalise": True},
    "LOST, normalised, bias -0.1": {"method": "lost", "normalise": True, "bias": -0.1},
    "LOST, normalised, bias -0.2": {"method": "lost", "normalise": True, "bias": -0.2},
    "LOST, normalised, bias swept": {"method": "lost", "normalise": True, "bias": "sweep"},
    "TokenCut": {"method": "tokencut"},
    "TokenCut, centred": {"method": "tokencut", "centre": True},
}
BIASES = (0.0, -0.1, -0.2, -0.25, -0.3, -0.325, -0.35, -0.4, -0.5)
FEATURES: tuple[Literal["keys", "queries", "values"], ...] = ("keys", "queries", "values")


def evaluations(vit: vitreg.Backbone, data: str, config: DiscoveryConfig) -> Iterator[tuple[str, Result]]:
    """Every treatment of every kind of features, named."""
    for features in FEATURES:
        for name, settings in TREATMENTS.items():
            yield f"{name} | {features}", evaluate(vit, data, replace(config, features=features, **settings))


def cell(result: Result, before: Result | None) -> str:
    metric = next(iter(result.metrics))
    estimate = result.estimates()[metric]
    if before is None:
        return written(estimate, ".1%")
    return f"{estimate.value:.1%} ({written(differences(before, result)[metric], '+.1%')})"


def remark(result: Result) -> str:
    """What a figure hides: the chosen bias, the photos on which the method had nothing to go by."""
    found = [note.split(" was ")[0].replace("LOST's ", "") for note in result.notes if "was chosen" in note]
    found += [note.split(" photos")[0].partition("on ")[2] for note in result.notes if "degenerate" in note]
    return "; ".join(found)


def by_treatment(vit: vitreg.Backbone, args: argparse.Namespace, config: DiscoveryConfig) -> None:
    columns = [dict(evaluations(vit, args.data, config)) for _ in versions(vit, args)]
    first = columns[0]
    print(f"\n{args.model}, {config.resolution} resolution, n = {next(iter(first.values())).n}\n")
    print(head("method", "features", *names(args), "bias; degenerate"))
    for name, before in first.items():
        cells = [cell(column[name], None if column is first else before) for column in columns]
        print(
            f"| {name} | {' | '.join(cells)} | {' / '.join(remark(c[name]) for c in columns)} |", flush=True
        )


def by_bias(vit: vitreg.Backbone, args: argparse.Namespace, config: DiscoveryConfig) -> None:
    """LOST on normalised keys with one bias for all photos; and swept, as the mean over splits."""
    config = replace(config, method="lost", normalise=True)
    columns = []
    for _ in versions(vit, args):
        found = {f"{bias:g}": evaluate(vit, args.data, replace(config, bias=bias)) for bias in BIASES}
        swept = [evaluate(vit, args.data, replace(config, bias="sweep", seed=s)) for s in range(args.splits)]
        values = [result.metrics["LOST CorLoc"].value for result in swept]
        cells = {bias: cell(result, None) for bias, result in found.items()}
        mean = f"{statistics.mean(values):.1%} ({min(values):.1%} to {max(values):.1%})"
        columns.append(cells | {f"swept, {args.splits} splits": mean})
    print(f"\n{args.model}, LOST on normalised keys, {config.resolution} resolution\n")
    print(head("bias", *names(args)))
    for bias in columns[0]:
        print(f"| {bias} | {' | '.join(column[bias] for column in columns)} |")


def versions(vit: vitreg.Backbone, args: argparse.Namespace) -> Iterator[None]:
    """Step by step the model as it is, and with each fix."""
    yield
    for fix in args.fix:
        with vitreg.load_fix(fix).applied_to(vit):
            yield


def names(args: argparse.Namespace) -> list[str]:
    return ["as it is", *(Path(fix).name for fix in args.fix)]


def head(*columns: str) -> str:
    return f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--fix", action="append", default=[], metavar="DIR")
    parser.add_argument("--resolution", action="append", choices=["native", "model"], default=[])
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--splits", type=int, default=10, help="held-out splits that a sweep is repeated on")
    args = parser.parse_args()
    vit = vitreg.load(args.model)
    for resolution in args.resolution or ("native", "model"):
        config = DiscoveryConfig(resolution=resolution, cache=args.cache, seed=args.seed)
        by_treatment(vit, args, config)
        by_bias(vit, args, config)


if __name__ == "__main__":
    main()
