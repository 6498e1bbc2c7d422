"""The reference of the command line, from the commands themselves: docs/reference/commands.md."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args, get_origin

import typer
from made_pages import make_before_building

if TYPE_CHECKING:
    from sphinx.application import Sphinx

PAGE = Path(__file__).resolve().parents[1] / "reference" / "commands.md"
HEAD = """# Commands

This page is made from the code, so it is complete. `vitreg COMMAND --help` prints the same in a terminal, and
`vitreg --install-completion` teaches your shell to complete commands and options.

Results go to stdout, progress goes to stderr. Exit codes:

| code | meaning |
|---|---|
| 0 | done |
| 1 | vitreg refuses or cannot go on, and says why in one line ([Errors](errors.md)) |
| 2 | the command line is wrong |
| 3 | a bug of vitreg: one line names a file with the traceback, which belongs into a bug report |
| 130 | ended by Ctrl-C |

`python -m vitreg` is the same command; `torchrun --nproc-per-node N -m vitreg COMMAND` shares the photos
among N processes ([several processes](../guides/several-processes.md)).
"""


def commands() -> dict[str, typer.core.TyperCommand]:
    """Every command by its name."""
    from vitreg.cli.main import app

    group = typer.main.get_command(app)
    return dict(group.commands)  # type: ignore[attr-defined]


def page() -> str:
    """The page: a section for each command, with its arguments and options."""
    return "\n".join([HEAD, *(_section(name, command) for name, command in commands().items())])


def _section(name: str, command: typer.core.TyperCommand) -> str:
    params = [param for param in command.params if not getattr(param, "hidden", False)]
    arguments = [param for param in params if param.param_type_name == "argument"]
    options = [param for param in params if param.param_type_name == "option" and param.name != "help"]
    usage = " ".join(_usage(param) for param in arguments)
    lines = [
        f"## vitreg {name}",
        "",
        command.help or "",
        "",
        "```text",
        f"vitreg {name} {usage} [OPTIONS]",
        "```",
        "",
    ]
    lines += ["| argument | |", "|---|---|"] if arguments else []
    lines += [f"| `{param.metavar or param.name.upper()}` | {_cell(param.help)} |" for param in arguments]
    panels: dict[str, list[str]] = {}
    for option in options:
        panels.setdefault(option.rich_help_panel or "", []).append(_option(option))
    for panel, rows in sorted(panels.items(), key=lambda item: item[0] != ""):
        lines += ["", f"| {panel or 'option'} | | default |", "|---|---|---|", *rows]
    if command.epilog:
        lines += ["", *(f"- {part}" for part in command.epilog.split("\n\n"))]
    return "\n".join([*lines, ""])


def _usage(param: typer.core.TyperArgument) -> str:
    shown = param.metavar or param.name.upper()
    return shown if param.required else f"[{shown}]"


def _option(option: typer.core.TyperOption) -> str:
    names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
    choices = _choices(option)
    value = "" if option.is_flag else f" {option.metavar or ('TYPE' if choices else option.name.upper())}"
    about = _cell(option.help) + (f" One of {', '.join(map(str, choices))}." if choices else "")
    default = "required" if option.required else _default(option)
    return f"| {names}{_cell(value)} | {about} | {default} |"


def _choices(option: typer.core.TyperOption) -> tuple[object, ...]:
    """The values that an option takes, where they are listed; typer says so otherwise before 0.25."""
    kind = getattr(option, "type_descriptor", None)
    if kind is not None:
        return get_args(kind.annotation) if get_origin(kind.annotation) is Literal else ()
    return tuple(getattr(option.type, "choices", ()))


def _default(option: typer.core.TyperOption) -> str:
    if option.default in (None, False, ()):
        return ""
    return "on" if option.default is True else f"`{option.default}`"


def _cell(text: str | None) -> str:
    return re.sub(r"\s+", " ", text or "").replace("|", "\\|")


def setup(app: "Sphinx") -> dict[str, bool]:
    return make_before_building(app, PAGE, page)
