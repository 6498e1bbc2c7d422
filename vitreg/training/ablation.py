"""The same recipe with several numbers of registers: what they change, and what they cost (Darcet et al.).

    found = ablate(find_recipe("ablation"), [0, 1, 2, 4, 8, 16], "run/", evals={"knn": "imagenette/"})
    print(found)             # tables
    found.save("run/")

Each run lies in a folder of its own and is resumed, or left as it is, when the same call is made again.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from vitreg.config.settings import with_settings
from vitreg.errors import DataError
from vitreg.evals.result import Result, differences, written
from vitreg.evals.tasks import Task, find_task
from vitreg.features.config import Config
from vitreg.files import check_writable, write_atomically
from vitreg.models.backbone import Backbone, wrap
from vitreg.models.loading import load
from vitreg.plots.style import png
from vitreg.printing import text_table
from vitreg.training import checkpoint
from vitreg.training.cost import CLAIMED, Cost, cost, papers_models, seconds
from vitreg.training.fabric import Machine, quiet
from vitreg.training.loop import Run, train
from vitreg.training.recipe import Recipe

# What the regimes log as the metric of the whole photo.
_GLOBAL = ("top1", "knn")
_ARTIFACTS = ("outliers", "norm_ratio", "attention_outliers")


@dataclass(frozen=True)
class Speed:
    """Photos a second of the forward pass, and over that of the fewest registers: median and best round."""

    photos_per_second: float
    ratio: float
    best_photos_per_second: float
    best_ratio: float


@dataclass(frozen=True)
class Arm:
    """One run. `logged`: the last diagnosis (see watching.py) and the global metric, by their names in the
    log; shares in per cent."""

    registers: int
    logged: dict[str, float]
    results: dict[str, Result]
    cost: Cost
    speed: Speed

    def to_json(self) -> dict[str, Any]:
        results = {task: result.to_json() for task, result in self.results.items()}
        return {
            "registers": self.registers,
            "logged": self.logged,
            "results": results,
            **asdict(self.cost),
            "speed": asdict(self.speed),
        }


@dataclass(frozen=True)
class Ablation:
    """The runs, from the fewest registers to the most; `papers` has the cost of the paper's models by name,
    with none and with each of these numbers of registers."""

    about: str
    arms: list[Arm]
    papers: dict[str, list[Cost]]

    def growth(self) -> dict[str, list[float]]:
        """By what share FLOPs grow: these runs over the first, the paper's models over 0 registers."""
        of = {name: [c.flops / costs[0].flops - 1 for c in costs[1:]] for name, costs in self.papers.items()}
        first = self.arms[0].cost.flops
        return {"here": [arm.cost.flops / first - 1 for arm in self.arms]} | of

    def to_json(self) -> dict[str, Any]:
        """Everything, with the paired differences of results to the first run's."""
        arms, first = [arm.to_json() for arm in self.arms], self.arms[0].results
        for arm, document in zip(self.arms[1:], arms[1:], strict=True):
            document["differences"] = {
                task: {name: vars(x) for name, x in differences(first[task], result).items()}
                for task, result in arm.results.items()
            }
        return {
            "about": self.about,
            "arms": arms,
            "flops_growth": self.growth(),
            "claimed_flops_growth": CLAIMED,
        }

    def figure(self) -> Any:
        """Metrics, artifacts and cost by registers, as a matplotlib Figure."""
        from vitreg.training.ablation_figure import ablation as draw

        return draw(self)

    def save(self, out: str | Path) -> list[Path]:
        """Write ablation.json and ablation.png into a folder; returns their paths. Raises OutputError."""
        folder = Path(out)
        return [
            write_atomically(folder / "ablation.json", json.dumps(self.to_json(), indent=1)),
            write_atomically(folder / "ablation.png", png(self.figure())),
        ]

    def __str__(self) -> str:
        fewest = self.arms[0].registers
        base = f"\nhere: over those with {fewest} registers" if fewest else ""
        speed = "speed: photos/s of the forward pass, median (best) of rounds in turn"
        return (
            f"{self.about}\n{self._results()}\n\nFLOPs of a forward pass, over those without registers\n"
            f"{self._costs()}\noutliers: share of patch tokens; norms: largest over median;"
            f" attention: share on outliers, last block\n{speed}{base}"
        )

    def _results(self) -> str:
        tasks = {task: next(iter(result.metrics)) for task, result in self.arms[0].results.items()}
        heads = (
            "registers", "outliers", "norms", "attention", *self._metrics(),
            *(f"{task} {metric}" for task, metric in tasks.items()),
            "GFLOPs", "parameters", "photos/s", "speed",
        )  # fmt: skip
        rows = []
        for arm in self.arms:
            scores = [
                written(arm.results[task].estimates()[metric], arm.results[task].metrics[metric].format)
                for task, metric in tasks.items()
            ]
            row = [
                str(arm.registers),
                _number(arm.logged.get("outliers"), ".2f", "%"),
                _number(arm.logged.get("norm_ratio"), ".1f", "x"),
                _number(arm.logged.get("attention_outliers"), ".1f", "%"),
                *(_number(arm.logged.get(name), ".1f", "%") for name in self._metrics()),
                *scores,
                f"{arm.cost.flops / 1e9:.4g}",
                f"{arm.cost.parameters:,}",
                f"{arm.speed.photos_per_second:.0f}",
                f"{arm.speed.ratio:.3f} ({arm.speed.best_ratio:.3f})",
            ]
            rows.append(row)
        return text_table(rows, heads, width=140)

    def _metrics(self) -> list[str]:
        return [name for name in _GLOBAL if any(name in arm.logged for arm in self.arms)]

    def _costs(self) -> str:
        rows = [[name, *(f"+{share:.2%}" for share in shares)] for name, shares in self.growth().items()]
        signs = {4: "<", 16: "<="}
        claims = [
            f"{signs[arm.registers]} {CLAIMED[arm.registers]:.0%}" if arm.registers in CLAIMED else ""
            for arm in self.arms
        ]
        heads = ["registers", *(str(arm.registers) for arm in self.arms)]
        return text_table([*rows, ["Darcet et al.", *claims]], heads, width=140)


def _number(value: float | None, form: str, unit: str) -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def ablate(
    recipe: Recipe,
    registers: Sequence[int],
    out: str | Path,
    machine: Machine | None = None,
    evals: Mapping[str, str | Path] | None = None,
) -> Ablation | Run | None:
    """Train with each number of registers, into out/registers-N, and measure what came out.

    `evals` are tasks of `vitreg eval` with their data, and by "task.setting" what they are to do otherwise:
    {"segmentation": "camvid/", "segmentation.ignore": "11"}.

    Returns the run that SIGTERM or Ctrl-C has stopped, from where the same call goes on; and None in all
    processes but the first, which reports. Raises DataError for numbers of registers or tasks that cannot
    be, before anything is trained, and what `train` raises.
    """
    numbers, machine, folder = _checked(registers), machine or Machine(), Path(out)
    tasks = _tasks(evals or {}, machine.workers)
    with quiet():
        fabric = machine.fabric()
        fabric.launch()
    backbones, logs = [], []
    for n in numbers:
        arm = replace(recipe, registers=n)
        run = train(arm, folder / f"registers-{n}", machine)
        if run.stopped:
            return run
        if fabric.is_global_zero:
            check_writable(folder / "ablation.json")
            backbones.append(_trained(arm, run, fabric.device))
            logs.append(_last(run))
    if not fabric.is_global_zero:
        return None
    size = recipe.image_size
    speeds = _speeds(backbones, size)
    arms = [
        Arm(
            n,
            log,
            {task.name: task.evaluate(vit, data, config) for task, data, config in tasks},
            cost(vit.model, size),
            speed,
        )
        for n, vit, log, speed in zip(numbers, backbones, logs, speeds, strict=True)
    ]
    return Ablation(recipe.about, arms, papers_models([0, *numbers]))


def _checked(registers: Sequence[int]) -> list[int]:
    found = f"registers {' '.join(map(str, registers)) or '(none)'}"
    if not registers or min(registers) < 0 or len(set(registers)) < len(registers):
        raise DataError(f"{found}: expected one or more numbers, 0 or larger, each once, such as 0 1 2 4.")
    return sorted(registers)


def _tasks(evals: Mapping[str, str | Path], workers: int) -> list[tuple[Task, Path, Config]]:
    """The tasks that can be run on a trained ViT, with their data and settings."""
    found = []
    settings: dict[str, dict[str, str]] = {}
    for key in evals:
        name, _, setting = key.partition(".")
        settings.setdefault(name, {}).update({setting: str(evals[key])} if setting else {})
    for name, given in settings.items():
        task = find_task(name)
        if task.load is not load:
            raise DataError(f"the task {name} needs more than a ViT: run `vitreg eval {name}` by itself.")
        if name not in evals:
            raise DataError(f"the task {name} has settings but no data: give {name}=DIR, {task.data}.")
        if not (data := Path(evals[name])).exists():
            raise DataError(f"there is no {data}: the task {name} takes {task.data}.")
        config = with_settings(replace(task.config(), workers=workers), given, f"the task {name}")
        found.append((task, data, config))
    return found


def _trained(recipe: Recipe, run: Run, device: torch.device) -> Backbone:
    """The ViT as its checkpoint has it: also registers that the library has no form for come with it."""
    objective = recipe.objective()
    held = torch.load(run.folder / checkpoint.NAME, map_location="cpu", weights_only=True, mmap=True)
    objective.load_state_dict(held["objective"])
    vit = wrap(
        objective.vit,
        getattr(objective, "preprocess", None),
        image_size=recipe.image_size,
        name=f"{recipe.registers} registers",
    )
    vit.model.to(device).eval()
    return vit


def _last(run: Run) -> dict[str, float]:
    """What the log said last of artifacts and of the global metric."""
    names = {*_ARTIFACTS, *_GLOBAL}
    return {name: value for line in run.log for name, value in line.items() if name in names}


def _speeds(backbones: Sequence[Backbone], image_size: int) -> list[Speed]:
    batch = 32
    times = seconds([vit.model for vit in backbones], image_size, batch=batch)
    best = times.min(0)
    return [
        Speed(
            photos_per_second=batch / median(times[:, j]),
            ratio=median(times[:, 0] / times[:, j]),
            best_photos_per_second=batch / float(best[j]),
            best_ratio=float(best[0] / best[j]),
        )
        for j in range(len(backbones))
    ]
