"""What commands print and write."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from vitreg.diagnosis.emergence import Emergence
    from vitreg.diagnosis.result import Diagnosis
    from vitreg.examination.examine import Examination
    from vitreg.search.fix_search import FixSearch
    from vitreg.studies.register_maps import RegisterStudy
    from vitreg.verification.verdict import Verdict


def say(stage: str) -> None:
    """A line on stderr: what is done now."""
    sys.stderr.write(f"{stage}\n")


def check_writable(*paths: Path | None) -> None:
    """Before the work, so that none is lost. Raises OutputError for a path that cannot be written."""
    from vitreg.files import check_writable

    for path in paths:
        if path is not None:
            check_writable(path)


def write(
    result: "Diagnosis | Emergence | FixSearch | Verdict | RegisterStudy | Examination",
    json_path: Path | None = None,
    report: Path | None = None,
    figure: Path | None = None,
) -> None:
    """Write a result in the forms that were asked for, and say where each is."""
    from vitreg.files import write_atomically

    if json_path is not None:
        write_atomically(json_path, json.dumps(result.to_json(), indent=1))
        typer.echo(f"JSON: {json_path}")
    if report is not None:
        from vitreg.reports.report import write

        typer.echo(f"report: {write(result, report)}")
    if figure is not None:
        from vitreg.plots.style import png

        write_atomically(figure, png(result.figure()))  # type: ignore[union-attr]
        typer.echo(f"figure: {figure}")
