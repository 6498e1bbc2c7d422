"""Names of models, and tables of plain text."""

import io
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

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
    _plain(text, width).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def wrapped(text: str, width: int, indent: str = "") -> list[str]:
    """Lines of at most `width` columns, as a terminal counts them, each behind `indent`; words that are too
    long are cut."""
    room = max(width - len(indent), 1)
    lines = Text(printable(text)).wrap(_plain(io.StringIO(), room), room, overflow="fold")
    return [(indent + line.plain).rstrip() for line in lines]


def printable(text: str) -> str:
    """Text with what does not print, such as a line end in a file's name, spelled out."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _plain(file: io.StringIO, width: int) -> Console:
    """Of text alone: a notebook would show it at once, and leave none in the file."""
    return Console(file=file, width=width, no_color=True, markup=False, highlight=False, force_jupyter=False)
