"""A progress bar of a run on stderr: step, loss, photos a second and the time that is left."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

# Seconds of which the mean speed tells the time that is left: many steps, also where one takes a minute.
_PERIOD = 600.0


class Progress:
    """Drawn when a step is done, by no thread of its own: data workers are forked meanwhile.

    Nothing is drawn where stderr is no terminal.
    """

    def __init__(self, shown: bool, done: int, steps: int) -> None:
        console = Console(stderr=True)
        columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
        self._bar = Bar(
            *columns, "{task.fields[note]}", console=console, auto_refresh=False,
            disable=not (shown and console.is_terminal), transient=True, speed_estimate_period=_PERIOD,
        )  # fmt: skip
        self._task = self._bar.add_task("", completed=done, total=steps, note="")

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.stop()

    def show(self, step: int, values: Mapping[str, float]) -> None:
        note = f"loss {values['loss']:.3f}  {values['photos_per_second']:.0f} photos/s"
        self._bar.update(self._task, completed=step, note=note, refresh=True)
