"""The papers' tables as text: the command of each row, the paper's figure, and what was measured here.

print(overview())
print(table_text("test-time-segmentation"))
"""

from collections.abc import Iterator
from typing import Any

from vitreg.errors import DataError
from vitreg.evals.papers.kept import measured
from vitreg.evals.papers.tables import DATA, ROOT, TABLES, FixRecipe, Row, Table
from vitreg.evals.result import written
from vitreg.intervals import Estimate
from vitreg.printing import one_of, terminal_width, text_table, wrapped

_PLAIN = ("RMSE", "distance", "L2 error")  # metrics that are no shares


def find_table(name: str) -> Table:
    """Raises DataError for an unknown name, with the nearest."""
    if name not in TABLES:
        raise DataError(f"there is no table {name!r}. {one_of(name, TABLES)}")
    return TABLES[name]


def overview() -> str:
    """All tables by paper, within the width of the terminal."""
    lines, width = [], terminal_width()
    for paper in dict.fromkeys(table.paper for table in TABLES.values()):
        rows = [
            (name, f"{table.title} ({_counts(name, table)})")
            for name, table in TABLES.items()
            if table.paper == paper
        ]
        lines += [
            *wrapped(paper, width),
            *(f"  {x}" for x in text_table(rows, left=2, width=width - 2).splitlines()),
        ]
    how = "`vitreg papers TABLE` shows its rows, `vitreg papers --run TABLE` measures them."
    return "\n".join([*lines, "", *wrapped(how, width)])


def _counts(name: str, table: Table) -> str:
    rows, here = len(table.rows), sum(measured(name, row) is not None for row in table.rows)
    never = sum(bool(row.needs) for row in table.rows)
    parts = [f"{rows} row{'s' if rows > 1 else ''}"]
    parts += [f"{here} measured here"] if here else []
    parts += [f"{never} cannot be run" if never < rows else "cannot be run"] if never else []
    return ", ".join(parts)


def table_text(name: str) -> str:
    """A table's rows: the command, and by metric the paper's figure and what was measured here."""
    table = find_table(name)
    lines = [f"{name}: {table.title}", table.paper]
    for row in table.rows:
        lines += ["", row.name]
        lines += [f"  {text}" for text in (command(row), row.remark, *_figures(name, row)) if text]
    return "\n".join(lines)


def _figures(table: str, row: Row) -> Iterator[str]:
    here = measured(table, row)
    names = row.figures or (here or {"metrics": {}})["metrics"]
    width = max(map(len, names), default=0)
    for metric in names:
        paper = f"paper {number(metric, row.figures[metric])}" if metric in row.figures else ""
        yield f"{metric:<{width}}  {paper:<14}{_ours(metric, here)}".rstrip()
    if here is None:
        yield f"not run: needs {needs(row)}"
    else:
        yield from here["notes"]


def _ours(metric: str, here: dict[str, Any] | None) -> str:
    if here is None:
        return ""
    if metric not in here["metrics"]:
        return "here not among the results"
    return f"here {written(Estimate(**here['metrics'][metric]), here['formats'][metric])}"


def number(metric: str, value: float) -> str:
    """A figure as papers write it: a share in percent."""
    if metric.startswith(_PLAIN):
        return f"{value:.4g}"
    whole, _, decimals = f"{100 * value:.2f}".partition(".")
    return f"{whole}.{decimals.rstrip('0') or '0'}%"


def needs(row: Row) -> str:
    """What a machine must have to run a row, or why none can."""
    if row.needs:
        return row.needs
    data = DATA[row.data]
    return f"the weights of {row.model} and ${ROOT}/{data.path} ({data.layout})"


def command(row: Row) -> str:
    """The row as a `vitreg eval` command; FIX stands for the fix that is found first. Empty for others."""
    if row.needs:
        return ""
    folder = f"${ROOT}/{DATA[row.data].path}"
    parts = [f"vitreg eval {row.task} {row.model} {folder}"]
    parts += [f"--size {row.size}"] if row.size else []
    parts += [f"--set {key}={value.format(data=folder)}" for key, value in row.settings.items()]
    parts += [f"--fix FIX ({_described(row.recipe)})"] if row.recipe else []
    return " ".join(parts)


def _described(recipe: FixRecipe) -> str:
    count = f"{recipe.top_k} neurons" if recipe.top_k else "as few neurons as suffice"
    place = "" if recipe.top_layer is None else f" up to block {recipe.top_layer}"
    plural = "" if recipe.registers == 1 else "s"
    return f"{count}{place}, {'attention bias' if recipe.bias else f'{recipe.registers} register{plural}'}"
