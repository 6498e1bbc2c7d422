"""What every result can do: say itself in short and in full, in a notebook, and as a report."""

from abc import ABC, abstractmethod
from importlib import import_module
from pathlib import Path
from typing import Any

from vitreg.printing.summary import Summary


class Presented(ABC):
    """A result of vitreg.

    `print(result)` says what matters within the width of the terminal, `result.full()` all of it; in a
    notebook a result is a picture and a short table; `result.to_html(path)` writes its report.
    """

    @abstractmethod
    def summary(self) -> Summary:
        """The verdict, the rows that matter, and what to do next."""

    @abstractmethod
    def full(self) -> str:
        """All that there is to say, in words."""

    def __str__(self) -> str:
        return self.summary().text()

    def __repr__(self) -> str:
        summary = self.summary()
        return f"<{type(self).__name__}: {summary.verdict}: {summary.subject}>"

    @property
    def draws(self) -> bool:
        """Whether there is a figure() of this result."""
        return hasattr(self, "figure")

    def to_html(self, path: str | Path) -> Path:
        """Write the report, one file that opens offline, and return its path.

        Raises OutputError if it cannot be written, TypeError for a result that has no report.
        """
        written: Path = _reports("report").write(self, path)
        return written

    def _repr_html_(self) -> str:
        shown: str = _reports("notebook").shown(self)
        return shown


def _reports(module: str) -> Any:
    """Reports know every kind of result, and stand above them all: a result knows them by name alone."""
    return import_module(f"vitreg.reports.{module}")
