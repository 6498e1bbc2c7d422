"""What is being done, and how far it is: stages that are counted, and the one progress bar."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

Say = Callable[[str], None]
Told = bool | Say | None  # who is told of progress: True is stderr, False and None are nobody


def say_to(told: Told) -> Say:
    """A function that says a line to whoever is to be told."""
    if callable(told):
        return told
    return _to_stderr if told else _to_nobody


def _to_stderr(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def _to_nobody(line: str) -> None:
    pass


class Stages:
    """Says each stage of long work, counted: "2/5 building the fix".

        stages = Stages(progress, ["diagnosing", "building the fix"])
        stages("diagnosing")

    The stages are named beforehand, in their order. One that turns out not to be needed is left out, and its
    number with it.
    """

    def __init__(self, told: Told, names: Sequence[str]) -> None:
        self._say, self._names = say_to(told), list(names)

    def __call__(self, name: str, more: str = "") -> None:
        """A stage begins; `more` is what to add to its name."""
        self.say(f"{self._names.index(name) + 1}/{len(self._names)} {name}{more}")

    def say(self, line: str) -> None:
        """A line between the stages."""
        self._say(line)


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
