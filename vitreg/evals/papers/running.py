"""Run a table's rows: weights from a hub or its cache, data below one folder, the fix found, the result kept.

run_table("test-time-segmentation", Path("/data"), load)
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from vitreg.config.settings import with_settings
from vitreg.data.datasets.depth_pairs import nyu
from vitreg.data.datasets.foreground import foreground
from vitreg.data.evenly_spaced import evenly_spaced
from vitreg.data.images import read_images
from vitreg.data.listing import photos_in
from vitreg.diagnosis.diagnosing import diagnose
from vitreg.errors import DataError, VitregError
from vitreg.evals.papers.kept import keep, measured
from vitreg.evals.papers.printed import find_table, needs
from vitreg.evals.papers.tables import DATA, ROOT, FixRecipe, Row
from vitreg.evals.result import Result
from vitreg.evals.tasks import find_task
from vitreg.features.config import Config
from vitreg.fixes import Fix
from vitreg.fixes.attention_bias import AttentionBias
from vitreg.fixes.registers import TestTimeRegisters
from vitreg.models.backbone import Backbone
from vitreg.search.register_neurons import find_register_neurons

PHOTOS = 256  # that a fix is found on
Load = Callable[[Row, Callable[..., Backbone]], Backbone]


def run_table(name: str, root: Path | None, load: Load, *, again: bool = False, **machine: Any) -> None:
    """Measure the rows of a table that were not measured yet (`again`: all), one after the other.

    `root`: the folder of the data sets (None: $VITREG_DATA). `load(row, builder)` makes a row's model with
    its task's builder; `machine`: fields of Config. What a row lacks is printed, and the next one is run.
    Raises DataError at the end if none could be.
    """
    table = find_table(name)
    root = root or (Path(os.environ[ROOT]) if os.environ.get(ROOT) else None)
    if root is None:
        raise DataError(
            f"there is no folder of data sets: expected --data ROOT, or {ROOT} in the environment."
        )
    done = 0
    for row in table.rows:
        if not again and measured(name, row) is not None:
            sys.stdout.write(f"{row.name}: measured before\n")
            done += 1
            continue
        try:
            result = run_row(row, root, load, **machine)
        except (VitregError, RuntimeError, OSError) as error:  # out of memory, out of disk: the next may fit
            sys.stdout.write(f"{row.name}: not run: {' '.join(str(error).split())}\n")
        else:
            keep(name, row, result)
            sys.stdout.write(f"{row.name}: {result.full()}\n")
            done += 1
    if not done:
        raise DataError(f"no row of {name} could be run: the lines above say why.")


def run_row(row: Row, root: Path, load: Load, **machine: Any) -> Result:
    """Load the model, find the fix if the row has one, evaluate. Raises VitregError for what is missing."""
    if row.needs:
        raise DataError(f"needs {row.needs}.")
    task, data = find_task(row.task), root / DATA[row.data].path
    if not data.exists():
        raise DataError(f"there is no {data} ({DATA[row.data].layout}); needs {needs(row)}.")
    settings = {key: value.format(data=data) for key, value in row.settings.items()}
    config = with_settings(replace(task.config(), **machine), settings)
    vit = load(row, task.load)
    if row.recipe is None:
        return task.evaluate(vit, data, config)
    with some_photos(row, data, config) as paths:
        fix = found_fix(row.recipe, vit, paths, config)
    with fix.applied_to(vit):
        return task.evaluate(vit, data, config)


@contextmanager
def some_photos(row: Row, data: Path, config: Config) -> Iterator[list[Path]]:
    """Photos of a row's data that a fix is found on, evenly spread."""
    with ExitStack() as stack:
        if data.suffix == ".mat":
            paths = stack.enter_context(foreground(data, config.cache)).paths
        elif row.data == "nyu":
            paths = nyu(data, "test").paths
        else:
            paths = tuple(photos_in(data / DATA[row.data].photos))
        yield [paths[i] for i in evenly_spaced(len(paths), PHOTOS)]


def found_fix(recipe: FixRecipe, vit: Backbone, paths: list[Path], config: Config) -> Fix:
    """The recipe's fix for a model. Raises FixError where the model shows no artifacts on these photos."""
    photos = read_images(paths, vit, batch_size=config.batch_size, workers=config.workers)
    report = diagnose(vit, photos, examples=0)
    top = None if recipe.top_layer is None else min(recipe.top_layer, report.detect_layer)
    neurons = find_register_neurons(
        vit, photos, report, method="paper", top_k=recipe.top_k or "auto", top_layer=top
    )
    if recipe.bias:
        return AttentionBias.calibrate(vit, photos, neurons)
    return TestTimeRegisters(neurons, recipe.registers)
