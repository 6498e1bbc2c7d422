"""The command line: parse, call one public function, print or write.

Exit codes: 0 done; 1 our own error, one line on stderr; 2 usage; 3 a bug, one line that names the file with
its traceback. Progress goes to stderr, results to stdout.
"""

import io
import logging
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from vitreg.cli.diagnose import diagnose, doctor, registers
from vitreg.cli.evaluate import TASKS_HELP, evaluate, papers
from vitreg.cli.explore import demo, explore
from vitreg.cli.features import features
from vitreg.cli.fix import fix, verify
from vitreg.cli.look import look
from vitreg.cli.train import train
from vitreg.errors import VitregError
from vitreg.version import __version__


class Commands(TyperGroup):
    """The commands; a photo in the place of one means `vitreg look`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in self.commands and Path(args[0]).exists():
            args = ["look", *args]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="vitreg",
    cls=Commands,
    help="Find, explain and remove attention artifacts in Vision Transformers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for _command in (look, diagnose, doctor, fix, verify):
    app.command()(_command)
app.command(name="eval", epilog=TASKS_HELP)(evaluate)
for _command in (papers, features, registers, train):
    app.command()(_command)
app.command(name="app")(explore)
app.command()(demo)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"vitreg {__version__}")
        raise typer.Exit


def _show_warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    """One line, as errors are; where in the code a warning arose is nothing to a user of the command."""
    sys.stderr.write(f"vitreg: {' '.join(str(message).split())}\n")


def main() -> None:
    """The `vitreg` command."""
    warnings.filterwarnings("ignore", module=r"(timm|transformers|open_clip|torch|huggingface_hub)(\..*)?")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a pipe on Windows cannot print every file's name
            stream.reconfigure(errors="backslashreplace")
    # What libraries log (a hub's retries, say) would bury our one line; what matters comes as an error.
    logging.disable(logging.ERROR)
    show, warnings.showwarning = warnings.showwarning, _show_warning
    try:
        app()
    except VitregError as error:
        sys.stderr.write(f"vitreg: {' '.join(str(error).split())}\n")
        sys.exit(1)
    except Exception as error:
        from vitreg.cli.unexpected import explained

        line, code = explained(error)
        sys.stderr.write(f"vitreg: {line}\n")
        sys.exit(code)
    except KeyboardInterrupt:
        sys.stderr.write("vitreg: interrupted\n")
        sys.exit(130)
    finally:
        warnings.showwarning = show
        logging.disable(logging.NOTSET)


if __name__ == "__main__":
    main()
