"""The help of commands: options in two columns, what they are for and their defaults, and examples.

It is made from the signatures of our commands, as options.py makes them. A command that is given a wrong
choice says which one is near.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

from vitreg.cli.options import declared
from vitreg.printing import did_you_mean, shell_lines, terminal_width

Rows = Sequence[tuple[str, str]]
Panels = Mapping[str, Rows]

START = {
    "vitreg look PHOTO": "see a photo as a model does",
    "vitreg diagnose MODEL IMAGES": "does the model have artifacts?",
    "vitreg fix MODEL IMAGES -o fix/": "remove them",
    "vitreg verify MODEL fix/ IMAGES": "does the fix help?",
    "vitreg eval TASK MODEL DATA": "measure the model on a task",
}
NAMES = "MODEL: timm:NAME, hf:ID, open_clip:ARCH/TAG or a folder. IMAGES: a folder or a glob."
MORE = "vitreg COMMAND --help says more, with examples. vitreg --version prints the version."
ALWAYS = ("Options", ("--help", "Show this page and exit."))


class Commands(TyperGroup):
    """All commands of vitreg, with those that most people need first."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command; a photo in the place of one means `vitreg look`."""
        if args[0] not in self.commands and Path(args[0]).exists():
            args = ["look", *args]
        return super().resolve_command(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {}
        for name, command in self.commands.items():
            about = " ".join((command.help or "").partition("\n\n")[0].split())
            panels.setdefault(getattr(command, "rich_help_panel", None) or "More", []).append((name, about))
        start = [*_panel("Start here", list(START.items())), Padding(Text(NAMES), (1, 0, 0, 2))]
        rest = [part for title, rows in panels.items() for part in _panel(title, rows)]
        formatter.write(_rendered([Text(self.help or ""), *start, *rest, Text(f"\n{MORE}")]))


def documented(
    name: str,
    command: Callable[..., None],
    examples: Sequence[str],
    more: Callable[[Sequence[str]], Panels] = lambda typed: {},
) -> type[TyperCommand]:
    """The class of a command, for its help. `more` makes further panels of what was typed after its name."""

    class Documented(TyperCommand):
        """One command of vitreg."""

        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            self.typed = list(args)
            try:
                return super().parse_args(ctx, args)
            except typer.BadParameter as error:
                error.message = _nearer(error.message)
                raise

        def format_help(self, ctx: Any, formatter: Any) -> None:
            formatter.write(_rendered(_page(name, command, more(self.typed), examples)))

    return Documented


def _nearer(message: str) -> str:
    """What is said of a wrong choice, with the choice that is near."""
    wrong = re.search(r"'([^']*)' is not one of (.*)", message)
    if wrong is None:
        return message
    return message.removeprefix("Value error, ") + did_you_mean(wrong[1], re.findall(r"'([^']+)'", wrong[2]))


def _page(
    name: str, command: Callable[..., None], more: Panels, examples: Sequence[str]
) -> Iterator[RenderableType]:
    """The help of one command."""
    params = inspect.signature(command).parameters.values()
    shown = [param for param in params if not _info(param).hidden]
    arguments = [param for param in shown if isinstance(_info(param), typer.models.ArgumentInfo)]
    panels: dict[str, list[tuple[str, str]]] = {}
    for param in shown:
        title = "Arguments" if param in arguments else _info(param).rich_help_panel or "Options"
        panels.setdefault(title, []).append((_named(param), _said(param)))
    panels.setdefault(ALWAYS[0], []).append(ALWAYS[1])
    metavars = [f"{_info(x).metavar}" if x.default is x.empty else f"[{_info(x).metavar}]" for x in arguments]
    yield Text(" ".join(["Usage: vitreg", name, *metavars, "[OPTIONS]"]))
    for paragraph in (inspect.getdoc(command) or "").split("\n\n"):
        yield Text("\n" + " ".join(paragraph.split()))
    for title, rows in {**panels, **more}.items():
        yield from _panel(title, rows)
    yield Text("\nExamples", "bold")
    for example in examples:
        for line in shell_lines(["vitreg", name, *example.split()], terminal_width() - 2):
            yield Text(f"  {line}")


def _panel(title: str, rows: Rows) -> list[RenderableType]:
    """A heading, and a table of names and what is to be said of them."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(overflow="fold", style="cyan", max_width=32)
    table.add_column(overflow="fold")
    for name, said in rows:
        table.add_row(Text(name), Text(said))
    return [Text(f"\n{title}", "bold"), Padding(table, (0, 0, 0, 2))]


def _rendered(parts: Iterator[RenderableType] | Sequence[RenderableType]) -> str:
    """With colours where the help is printed on a terminal, as plain text elsewhere."""
    console = Console(width=terminal_width(), highlight=False, markup=False, emoji=False)
    with console.capture() as captured:
        console.print(Group(*parts))
    return "\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n"


# -- what a parameter is called, and what is to be said of it ---------------------------------------


def _info(param: inspect.Parameter) -> Any:
    """typer's own description of a parameter."""
    return get_args(param.annotation)[1]


def _named(param: inspect.Parameter) -> str:
    """An option's names with what is to be given to it, or an argument."""
    info, kind = _info(param), _kind(param)
    if isinstance(info, typer.models.ArgumentInfo):
        return str(info.metavar)
    names = ", ".join(declared(param.name, info))
    if kind is bool:
        both = param.default is True and "/" not in names
        return f"{names} / {names.replace('--', '--no-')}" if both else names.replace("/", " / ")
    return f"{names} {info.metavar or ('NAME' if get_origin(kind) is Literal else kind.__name__.upper())}"


def _said(param: inspect.Parameter) -> str:
    """The help of a parameter, its choices, its default, and whether it must be given."""
    info, kind = _info(param), _kind(param)
    parts = [info.help or ""]
    parts += [f"One of {', '.join(get_args(kind))}."] if get_origin(kind) is Literal else []
    if isinstance(info, typer.models.OptionInfo):
        if param.default is param.empty:
            parts.append("Required.")
        elif param.default is not None and not isinstance(param.default, bool):
            parts.append(f"Default: {param.default}.")
    return " ".join(part for part in parts if part)


def _kind(param: inspect.Parameter) -> Any:
    """The type of a parameter, without None."""
    kind = get_args(param.annotation)[0]
    return (
        next((one for one in get_args(kind) if one is not type(None)), kind)
        if type(None) in get_args(kind)
        else kind
    )
