"""What commands print and write: the options for it, and the check of all outputs before any work."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer
from rich.console import Console
from rich.text import Text

from vitreg.errors import OutputError
from vitreg.files import FIGURES, check_writable
from vitreg.printing import Presented, Step, terminal_width, wrapped

PAGES = (".html", ".htm")


@dataclass(frozen=True)
class OutputOptions:
    """What is printed and written of a result."""

    heading: ClassVar[str] = "The result"

    full: Annotated[bool, typer.Option("--full", help="Print all there is to say.")] = False
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="F.json", help="Write the result as JSON.")
    ] = None
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False

    @property
    def paths(self) -> dict[str, Path]:
        """The files that were asked for, {option: path}."""
        asked = {"--json": self.json_path}
        asked |= {f"--{name}": getattr(self, name, None) for name in ("report", "figure")}
        return {option: path for option, path in asked.items() if path is not None}

    def check(self, out: Path | None = None) -> None:
        """Before any work: refuse what cannot be written, or would replace what exists; raises OutputError.

        `out` is the folder of a fix.
        """
        _check_suffix("--report", self.paths.get("--report"), PAGES)
        _check_suffix("--figure", self.paths.get("--figure"), FIGURES)
        seen: dict[str, str] = {}
        for option, path in self.paths.items():
            other = seen.setdefault(os.path.realpath(path), option)
            if other != option and not _is_special(path):
                raise OutputError(f"{other} and {option} name the same file, {path}. Choose two names.")
            check_writable(path, overwrite=self.overwrite)
        if out is not None:
            from vitreg.fixes.saving import check_target

            check_target(out, overwrite=self.overwrite)

    def tell(self, result: Presented, steps: Sequence[Step] = ()) -> None:
        """Print a result, in short or in full, and what to do next."""
        summary = replace(result.summary(), steps=steps)
        if self.full:
            typer.echo(result.full())
            summary = replace(summary, rows=(), notes=())
            _print("", *summary.text().split("\n\n")[1:])
        else:
            verdict, *rest = summary.text().split("\n", 1)
            _print(verdict, *rest, *wrapped(f"All of it: {self._in_full()}.", terminal_width()))

    def _in_full(self) -> str:
        """The options that say more."""
        more = [
            f"--{name} F.{kind}"
            for name, kind in (("report", "html"), ("figure", "png"))
            if hasattr(self, name)
        ]
        return ", ".join(["--full", "--json F.json", *more])

    def write(self, result: Any, page: Callable[[Path], Path] | None = None) -> None:
        """Write a result in the forms that were asked for, and say where each is.

        `page` writes the report, where that needs more than the result.
        """
        from vitreg.files import write_atomically

        paths = self.paths
        if path := paths.get("--json"):
            write_atomically(path, json.dumps(result.to_json(), indent=1))
            typer.echo(f"JSON: {path}")
        if path := paths.get("--report"):
            typer.echo(f"report: {(page or result.to_html)(path)}")
        if path := paths.get("--figure"):
            from vitreg.plots.style import image

            write_atomically(path, image(result.figure(), path.suffix))
            typer.echo(f"figure: {path}")


@dataclass(frozen=True)
class ReportOptions(OutputOptions):
    """The same for results that have a report."""

    report: Annotated[
        Path | None, typer.Option(metavar="F.html", help="Write a report that opens offline.")
    ] = None


@dataclass(frozen=True)
class FigureOptions(OutputOptions):
    """The same for results that have a figure."""

    figure: Annotated[Path | None, typer.Option(metavar="F.png", help="Draw it, as .png, .pdf or .svg.")] = (
        None
    )


@dataclass(frozen=True)
class AllOutputOptions(ReportOptions, FigureOptions):
    """The same for results that have both."""


def _check_suffix(option: str, path: Path | None, known: Sequence[str]) -> None:
    if path is not None and path.suffix.lower() not in known and not _is_special(path):
        raise OutputError(f"{option} {path}: expected a name that ends in {' or '.join(known)}.")


def _is_special(path: Path) -> bool:
    """Whether it is there, and neither a file nor a folder: /dev/stdout, a named pipe."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _print(verdict: str, *rest: str) -> None:
    """The verdict stands out on a terminal; elsewhere there is plain text."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if verdict:
        console.print(Text(verdict, "bold"))
    for text in rest:
        console.print(Text(text))
