"""`vitreg eval` and `vitreg papers`: the papers' tasks and tables."""

from pathlib import Path
from typing import Annotated

import typer

from vitreg.cli.next_steps import after_evaluation
from vitreg.cli.options import (
    BatchSize,
    Device,
    Dtype,
    ModelArgument,
    ModelOptions,
    SavedFix,
    SettingsOption,
    Workers,
    with_options,
    words_of,
)
from vitreg.cli.output import AllOutputOptions
from vitreg.cli.roles import check_order
from vitreg.evals.tasks import TASKS


def _complete_task(typed: str) -> list[str]:
    return [name for name in TASKS if name.startswith(typed)]


@with_options
def evaluate(
    task: Annotated[
        str,
        typer.Argument(
            metavar="TASK",
            help="What to measure: one of the tasks below. `vitreg eval TASK --help` lists its settings.",
            autocompletion=_complete_task,
        ),
    ],
    model: ModelArgument,
    data: Annotated[str, typer.Argument(metavar="DATA", help="The data set, in its standard layout.")],
    output: AllOutputOptions,
    loading: ModelOptions,
    fix: SavedFix = None,
    compare: Annotated[bool, typer.Option(help="Without and with the fix, and the difference.")] = False,
    settings: SettingsOption = None,
    cache: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where features are kept; default: the user's cache.")
    ] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Keep no features.")] = False,
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Use N images, spread evenly over the data set.")
    ] = None,
    batch_size: BatchSize = 32,
    workers: Workers = None,
) -> None:
    """Measure a model, with or without a fix, on one of the papers' tasks."""
    from vitreg.cli.run_evaluation import run
    from vitreg.distributed import process_group
    from vitreg.features.config import default_cache

    check_order("eval", {"TASK": task, "MODEL": model, "DATA": data})
    given = [*words_of(loading), *(word for pair in settings or [] for word in ("--set", pair))]
    given += ["--limit", str(limit)] if limit else []
    with process_group() as ranks:
        run(
            task,
            lambda builder: loading.load(model, builder),
            data,
            fix=fix,
            compared=compare,
            settings=settings or [],
            output=output,
            steps=[] if compare else [after_evaluation(task, model, data, given, fix)],
            machine={
                "cache": None if no_cache else cache or default_cache(),
                "limit": limit,
                "batch_size": batch_size,
                "workers": workers,
                "progress": True,
                "ranks": ranks,
            },
        )


def papers(
    table: Annotated[str | None, typer.Argument(metavar="TABLE", help="Show one table's rows.")] = None,
    run: Annotated[
        str | None, typer.Option("--run", metavar="TABLE", help="Measure one table's rows, where it can be.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="ROOT", help="The folder of all data sets; default: $VITREG_DATA.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Also rows that were measured before.")] = False,
    batch_size: BatchSize = 32,
    workers: Workers = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
) -> None:
    """List the papers' tables beside what was measured here, or measure them."""
    from vitreg.evals.papers import overview, run_table, table_text
    from vitreg.features.config import default_cache

    if run is None:
        typer.echo(overview() if table is None else table_text(table))
        return
    run_table(
        run,
        data,
        lambda row, builder: ModelOptions(size=row.size, device=device, dtype=dtype).load(row.model, builder),
        again=again,
        batch_size=batch_size,
        workers=workers,
        cache=default_cache(),
        progress=True,
    )
