"""What `vitreg eval` does: check everything cheap first, evaluate, print, write."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vitreg.cli.output import check_writable
from vitreg.config.settings import pairs, with_settings
from vitreg.errors import DataError, OutputError
from vitreg.evals.result import Result, compare, comparison_json
from vitreg.evals.tasks import Task, find_task
from vitreg.features.config import Config
from vitreg.files import write_atomically
from vitreg.fixes import Fix, load_fix
from vitreg.models.backbone import Backbone
from vitreg.plots.style import png
from vitreg.reports.evaluation import write_evaluation


def run(
    task: str,
    load: Callable[[Callable[..., Backbone]], Backbone],
    data: str,
    *,
    fix: str | None = None,
    compared: bool = False,
    settings: Sequence[str] = (),
    json_path: Path | None = None,
    report: Path | None = None,
    figure: Path | None = None,
    machine: dict[str, Any] | None = None,
) -> None:
    """Evaluate a model on one task; `compared`, without the fix and with it. `machine`: fields of Config."""
    found = find_task(task)
    config = with_settings(replace(found.config(), **(machine or {})), pairs(settings))
    if compared and not fix:
        raise DataError("--compare needs --fix: without one there is nothing to compare with.")
    check_writable(json_path, report, figure)
    loaded = load_fix(fix) if fix else None
    vit = load(found.load)
    if loaded:
        loaded.check(vit)
    results = _evaluated(found, vit, data, config, loaded, compared)
    text = compare(*results) if len(results) == 2 else str(results[0])
    sys.stdout.write(f"{text}\n")
    if not config.ranks.first:
        return
    if json_path is not None:
        document = comparison_json(*results) if len(results) == 2 else results[0].to_json()
        write_atomically(json_path, json.dumps(document, indent=1))
        sys.stdout.write(f"JSON: {json_path}\n")
    if figure is not None:
        _write_figure(results[-1], figure)
    if report is not None:
        sys.stdout.write(f"report: {write_evaluation(results, vit, loaded, config, report)}\n")


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


def _write_figure(result: Result, path: Path) -> None:
    if result.picture is None:
        raise OutputError(f"the task {result.task} draws no figure. Leave out --figure.")
    write_atomically(path, png(result.picture()))
    sys.stdout.write(f"figure: {path}\n")
