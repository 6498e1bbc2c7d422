"""What the command line says of a mistake, and what it reads."""

import shlex
from typing import Any

import typer

from vitreg.cli.main import app


def fails(outcome: tuple[int, str, str], *words: str) -> None:
    """One line of ours on stderr, with these words, and exit code 1."""
    code, out, err = outcome
    assert code == 1
    assert out == ""
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    assert lines[0].startswith("vitreg: ")
    assert all(word in lines[0] for word in words), lines[0]


def parsed(line: str) -> dict[str, Any]:
    """What our own command line reads from a command, with its name."""
    program, name, *words = shlex.split(line)
    assert program == "vitreg"
    return {"command": name, **typer.main.get_command(app).commands[name].make_context(name, words).params}
