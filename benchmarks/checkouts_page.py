"""What benchmarks/checkouts.py found, for the terminal and as a page."""

from collections.abc import Iterator, Sequence

import torch

from vitreg.printing import text_table
from vitreg.version import __version__

Row = dict[str, str]

HEAD = """# The authors' own code

What vitreg makes of models as their authors publish them: built small, three blocks deep, with random
weights, from checkouts of the public repositories.
`python benchmarks/checkouts.py FOLDER --deps DIR --write docs/authors-code.md` made this page; its docstring
says what each column asks. Versions: vitreg {vitreg}, torch {torch}.

{counts}

"""


def summary(table: Sequence[Row], checks: Sequence[str]) -> str:
    """Each row in words of one column, then everything that is no yes in full, then counts."""
    heads = ["repository", "model", "verdict", *checks]
    cells = [[row.get(head, "").partition(":")[0] for head in heads] for row in table]
    notes = [f"{row['repository']} {row['model']}, {note}" for row in table for note in _notes(row)]
    return "\n".join([text_table(cells, heads, left=3), *notes, counts(table, checks)])


def counts(table: Sequence[Row], checks: Sequence[str]) -> str:
    """How many there are of each verdict, and how many are all right."""
    kinds = [row["verdict"].partition(":")[0] for row in table]
    right = sum(all(row.get(check) == "yes" for check in checks) for row in table)
    wrong = sum(any(text.startswith(("CRASH", "NO")) for text in row.values()) for row in table)
    of_each = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
    return f"{of_each}. {right} with every check right, {wrong} with a crash or a wrong answer."


def page(table: Sequence[Row], checks: Sequence[str]) -> str:
    """The table in Markdown, and what is no yes in full."""
    heads = ["repository", "model", "verdict", *checks]
    lines = [_line(heads), _line(["---"] * len(heads))]
    for row in table:
        lines.append(_line([row.get(head, "").partition(":")[0].replace("+", "/") for head in heads]))
    notes = [
        f"- **{row['repository'].replace('+', '/')} {row['model']}**, {note.replace('|', '/')}"
        for row in table
        for note in _notes(row)
    ]
    head = HEAD.format(vitreg=__version__, torch=torch.__version__, counts=counts(table, checks))
    return head + "\n".join(lines) + "\n\n## Why\n\n" + "\n".join(notes) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _notes(row: Row) -> Iterator[str]:
    return (f"{head}: {text}" for head, text in row.items() if ":" in text)
