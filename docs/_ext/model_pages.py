"""The table of models, from what was measured: docs/census.json and docs/authors-code.md."""

import html
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from made_pages import make_before_building

if TYPE_CHECKING:
    from sphinx.application import Sphinx

DOCS = Path(__file__).resolve().parents[1]
PAGE = DOCS / "models" / "table.md"
HEAD = """# Which models work

{counts} Type into the field to search (name, family or reason), choose a verdict, click a heading to sort.

*Supported* means that independent checks agreed on a model of random weights: depth, width, tokens, grid,
norms, neurons, and attention rows equal to the library's own. *Refused* means that vitreg says why it cannot
read the model, and never guesses. *Not built* means that the model was too large for the machine, or that its
library could not make it.

How the table was measured: [the census](../census.md) (`python benchmarks/census.py`) for timm and
transformers, [the authors' own code](../authors-code.md) (`python benchmarks/checkouts.py`) for repositories.
Versions: {versions}.
"""
Row = tuple[str, str, str, str, str]  # library, name, family, verdict, why


def rows() -> list[Row]:
    """Every model that was tried."""
    return [*_of_the_census(), *_of_the_authors()]


def _of_the_census() -> list[Row]:
    census = json.loads((DOCS / "census.json").read_text())
    reasons = census["reasons"]
    return [
        (one["library"], one["name"], one["module"], _verdict(one["verdict"]), reasons[one["reason"]])
        for one in census["results"]
    ]


def _verdict(said: str) -> str:
    return {"accepted": "supported"}.get(said, said)


def _of_the_authors() -> list[Row]:
    text = (DOCS / "authors-code.md").read_text()
    found = []
    for line in re.findall(r"^\| ([\w.-]+/[\w.-]+) \| (.+?) \| (\w[\w ]*) \|(.*)\|$", text, re.MULTILINE):
        repository, model, verdict, checks = line
        refused = [
            name for name, said in zip(_CHECKS, checks.split("|"), strict=False) if said.strip() == "refused"
        ]
        why = f"refused: {', '.join(refused)}" if refused else ""
        found.append(("authors' code", f"{repository}: {model}", repository, _verdict(verdict), why))
    return found


_CHECKS = ("norms", "rows", "registers", "splitting", "bias", "planted", "undo", "compiled")


def page() -> str:
    """The page: counts, a search field, the table."""
    found = rows()
    verdicts = sorted({row[3] for row in found})
    counts = ", ".join(f"{sum(row[3] == verdict for row in found)} {verdict}" for verdict in verdicts)
    versions = json.loads((DOCS / "census.json").read_text())["versions"]
    head = HEAD.format(
        counts=f"{len(found)} models were tried: {counts}.",
        versions=", ".join(f"{name} {number}" for name, number in versions.items()),
    )
    options = "".join(f"<option>{html.escape(verdict)}</option>" for verdict in verdicts)
    cells = "\n".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in _shown(row)) + "</tr>" for row in found
    )
    heads = "".join(
        f'<th aria-sort="none"><button type="button">{name}</button></th>'
        for name in ("library", "model", "verdict", "family", "why")
    )
    table = (
        '<div class="model-search"><label>Search '
        '<input type="search" id="model-search" placeholder="dinov2"></label>'
        f'<label>Verdict <select id="model-verdict"><option value="">any</option>{options}</select></label>'
        '<output id="model-count" aria-live="polite"></output></div>'
        f'<div class="model-scroll"><table id="model-table"><thead><tr>{heads}</tr></thead>'
        f"<tbody>\n{cells}\n</tbody></table></div>"
    )
    return f"{head}\n```{{raw}} html\n{table}\n```\n"


def _shown(row: Row) -> Row:
    """The cells in the order of the headings: the verdict beside the name, in sight on a phone."""
    library, name, family, verdict, why = row
    return library, name, verdict, family, why


def setup(app: "Sphinx") -> dict[str, bool]:
    return make_before_building(app, PAGE, page)
