"""A result at a glance: a verdict, the few rows that matter, and what to do next.

    summary = Summary("artifacts, severe", "timm:vit_tiny", rows=[("from block", "7")])
    print(summary.text())             # as wide as the terminal

No line is wider than the terminal, but for a word of a command that is wider itself: a command is there to be
copied.
"""

import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len

from vitreg.printing.tables import printable, text_table, wrapped

WIDTH = 80  # where the output is no terminal, and COLUMNS does not say otherwise
WIDEST, NARROWEST = 100, 30  # longer lines are hard to read; in fewer columns there is no table


@dataclass(frozen=True)
class Step:
    """What to do next: in words, and the command (its words) or the lines of Python to copy."""

    words: str
    command: tuple[str, ...] = ()
    python: tuple[str, ...] = ()


@dataclass(frozen=True)
class Summary:
    """What a result says first. `subject` is what the verdict is about: the model, the fix, the data.

    `rows` are terms and what is to be said of them; with `heads`, they are a table whose other columns are
    aligned to the right. `notes` are whole sentences: cautions, and what could not be read.
    """

    verdict: str
    subject: str
    rows: Sequence[Sequence[str]] = ()
    heads: Sequence[str] = ()
    notes: Sequence[str] = ()
    steps: Sequence[Step] = ()

    def text(self, width: int | None = None) -> str:
        """Plain text of `width` columns, or as many as the terminal has."""
        width = max(terminal_width() if width is None else width, NARROWEST)
        parts = [self._headline(width), self._table(width), self._notes(width), self._steps(width)]
        return "\n\n".join("\n".join(lines) for lines in parts if lines)

    def _headline(self, width: int) -> list[str]:
        verdict, subject = capitalised(self.verdict), printable(self.subject)
        if cell_len(f"{verdict}: {subject}") <= width:
            return [f"{verdict}: {subject}"]
        return [*wrapped(f"{verdict}:", width), *wrapped(subject, width, "  ")]

    def _table(self, width: int) -> list[str]:
        if not self.rows:
            return []
        rows = [[printable(cell) for cell in row] for row in self.rows]
        left = 1 if self.heads else len(rows[0])
        return [f"  {line}" for line in text_table(rows, self.heads, left=left, width=width - 2).splitlines()]

    def _notes(self, width: int) -> list[str]:
        return [line for note in self.notes for line in wrapped(capitalised(note), width)]

    def _steps(self, width: int) -> list[str]:
        lines = []
        for step in self.steps:
            lines += wrapped(f"Next: {step.words}", width)
            lines += [f"    {line}" for line in step.python]
            lines += [f"    {line}" for line in shell_lines(step.command, width - 4)]
        return lines


def shell_lines(words: Sequence[str], width: int) -> list[str]:
    """A command to copy into a shell, broken between words where it is wider than `width`.

    An option stays on the line of its value.
    """
    lines: list[str] = []
    line = ""
    for part in _together(list(map(shlex.quote, words))):
        longer = f"{line} {part}" if line else part
        if line and cell_len(longer) > width - 2:  # " \" has to fit behind it
            lines.append(f"{line} \\")
            longer = f"  {part}"
        line = longer
    return [*lines, line] if line else []


def _together(words: Sequence[str]) -> list[str]:
    """Words, and options with their values."""
    parts: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        if before.startswith("-") and not word.startswith("-"):
            parts[-1] += f" {word}"
        else:
            parts.append(word)
    return parts


def terminal_width() -> int:
    """Columns to print in: what COLUMNS says, or the terminal has; 80 where there is none."""
    return min(shutil.get_terminal_size((WIDTH, 24)).columns, WIDEST)


def capitalised(words: str) -> str:
    """Words with a capital letter in front; the others stay as they are."""
    return words[:1].upper() + words[1:]
