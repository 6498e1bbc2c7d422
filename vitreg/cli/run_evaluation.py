"""What `vitreg eval` does: check everything cheap first, evaluate, print, write."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from vitreg.cli.output import OutputOptions
from vitreg.config.settings import pairs, with_settings
from vitreg.errors import DataError, OutputError
from vitreg.evals.result import Result, compare
from vitreg.evals.tasks import Task, find_task
from vitreg.features.config import Config
from vitreg.fixes import Fix, load_fix
from vitreg.models.backbone import Backbone
from vitreg.printing import Step
from vitreg.reports.evaluation import write_evaluation


def run(
    task: str,
    load: Callable[[Callable[..., Backbone]], Backbone],
    data: str,
    *,
    output: OutputOptions,
    fix: str | None = None,
    compared: bool = False,
    settings: Sequence[str] = (),
    steps: Sequence[Step] = (),
    machine: dict[str, Any] | None = None,
) -> None:
    """Evaluate a model on one task; `compared`, without the fix and with it. `machine`: fields of Config."""
    found = find_task(task)
    config = with_settings(replace(found.config(), **(machine or {})), pairs(settings), f"task {task}")
    if compared and not fix:
        raise DataError("--compare needs --fix: without one there is nothing to compare with.")
    if "--figure" in output.paths and not found.draws:
        raise OutputError(f"the task {task} draws no figure. Leave out --figure.")
    output.check()
    loaded = load_fix(fix) if fix else None
    vit = load(found.load)
    if loaded:
        loaded.check(vit)
    results = _evaluated(found, vit, data, config, loaded, compared)
    if config.ranks.first:
        said = compare(*results) if len(results) == 2 else results[0]
        output.tell(said, steps)
        output.write(said, lambda path: write_evaluation(results, path, vit, loaded, config))


def _evaluated(
    task: Task, vit: Backbone, data: str, config: Config, fix: Fix | None, compared: bool
) -> list[Result]:
    results = []
    if fix is None or compared:
        results.append(task.evaluate(vit, data, config))
    if fix is not None:
        with fix.applied_to(vit):
            results.append(task.evaluate(vit, data, config))
    return results
