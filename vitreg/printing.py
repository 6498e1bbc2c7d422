"""What results print: names of models, tables, and the one progress bar."""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

PHANTOM = "a phantom: its artifacts were planted"


def called(model: str, planted: bool) -> str:
    """A model's name; a phantom, whose artifacts were planted, is called one."""
    return f"{model} ({PHANTOM})" if planted else model


def text_table(
    rows: Sequence[Sequence[str]], heads: Sequence[str] = (), *, left: int = 1, width: int = 1000
) -> str:
    """Rows of cells in aligned columns; the first `left` columns to the left, the others to the right.

    Cells that do not fit into `width` characters are wrapped. No line ends in spaces.
    """
    table = Table(box=None, pad_edge=False, header_style="", show_header=bool(heads))
    for index in range(len(heads) or max(map(len, rows), default=0)):
        heading = heads[index] if heads else ""
        table.add_column(heading, justify="left" if index < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    text = io.StringIO()
    # A notebook would show the table at once, and leave none in the text.
    console = Console(
        file=text, width=width, no_color=True, markup=False, highlight=False, force_jupyter=False
    )
    console.print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


@contextmanager
def progress_bar(
    shown: bool, total: int | None = None, done: int = 0, *, elapsed: bool = False, period: float = 30.0
) -> Iterator[Callable[..., None]]:
    """A bar on stderr, with the time that is left by the mean speed of the last `period` seconds.

    Gives `show(done, note="", total=None)`. No thread draws the bar: data workers are forked meanwhile.
    Nothing is drawn where stderr is no terminal.
    """
    console = Console(stderr=True)
    times = (TimeElapsedColumn(), TimeRemainingColumn()) if elapsed else (TimeRemainingColumn(),)
    with Progress(
        BarColumn(),
        MofNCompleteColumn(),
        *times,
        "{task.fields[note]}",
        console=console,
        transient=True,
        auto_refresh=False,
        disable=not (shown and console.is_terminal),
        speed_estimate_period=period,
    ) as bar:
        task = bar.add_task("", completed=done, total=total, note="")

        def show(done: int, note: str = "", total: int | None = None) -> None:
            if total is not None:
                bar.update(task, total=total)
            bar.update(task, completed=done, note=note, refresh=True)

        yield show
