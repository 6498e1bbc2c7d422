"""The command line: parse, call one public function, print or write.

Exit codes: 0 done; 1 our own error, one line on stderr; 2 usage; 3 a bug, one line that names the file with
its traceback. Progress goes to stderr, results to stdout.
"""

import functools
import io
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from vitreg.cli.diagnose import diagnose, doctor, registers
from vitreg.cli.evaluate import evaluate, papers
from vitreg.cli.explore import demo, explore
from vitreg.cli.features import features
from vitreg.cli.fix import fix, verify
from vitreg.cli.help import Commands, Panels, documented
from vitreg.cli.look import look
from vitreg.cli.settings_help import recipe_panels, task_panels
from vitreg.cli.train import train
from vitreg.errors import VitregError
from vitreg.version import __version__

INTERRUPTED = 130  # the exit code of what Ctrl-C has ended: 128 + SIGINT

app = typer.Typer(
    name="vitreg",
    cls=Commands,
    help="Find, explain and remove attention artifacts in Vision Transformers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
_VIT = "timm:vit_tiny_patch16_224.augreg_in21k_ft_in1k"


_REG = "timm:vit_small_patch14_reg4_dinov2.lvd142m"


def _add(
    panel: str,
    name: str,
    command: Callable[..., None],
    *examples: str,
    more: Callable[[Sequence[str]], Panels] = lambda typed: {},
) -> None:
    """A command in its panel of the help, with examples that can be copied."""
    class_ = documented(name, command, examples, more)
    app.command(name=name, cls=class_, rich_help_panel=panel)(_interruptible(command))


def _interruptible(command: Callable[..., None]) -> Callable[..., None]:
    """The command; Ctrl-C ends it in one line, before typer makes its own of it."""

    @functools.wraps(command)
    def run(**given: Any) -> None:
        try:
            command(**given)
        except KeyboardInterrupt:
            sys.stderr.write("vitreg: interrupted\n")
            raise typer.Exit(INTERRUPTED) from None

    return run


_REPORTED = "--report report.html --figure norms.pdf"
_add(
    "Look",
    "look",
    look,
    "photo.jpg",
    f"photo.jpg --model {_VIT} --model {_REG} -o look.pdf",
    "photo.jpg --layers",
)
_add("Look", "diagnose", diagnose, f"{_VIT} photos/", f"{_VIT} photos/ {_REPORTED}", f"{_VIT} {_REG} photos/")
_add("Look", "doctor", doctor, _VIT, f"{_VIT} --full")
_add("Look", "registers", registers, f"{_REG} photos/ --figure registers.png")
_add("Fix", "fix", fix, f"{_VIT} photos/ -o fix/", f"{_VIT} photos/ -o fix/ --type splitting")
_add("Fix", "verify", verify, f"{_VIT} fix/ photos/")
_COMPARED, _KNN = f"discovery {_VIT} VOC2012/ --fix fix/ --compare", f"knn {_VIT} imagenette/ --set k=10"
_add("Measure", "eval", evaluate, _KNN, _COMPARED, more=task_panels)
_add("Measure", "papers", papers, "", "TABLE", "--run TABLE --data datasets/")
_add("Measure", "features", features, f"{_VIT} photos/ -o features/ --fix fix/")
_add("Train", "train", train, "", "registers_vit_tiny --data imagenet/ --registers 4", more=recipe_panels)
_add("Explore", "app", explore, "", f"{_VIT} --images photos/")
_add("Explore", "demo", demo, "", "--real")


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
        sys.exit(INTERRUPTED)
    finally:
        warnings.showwarning = show
        logging.disable(logging.NOTSET)


if __name__ == "__main__":
    main()
