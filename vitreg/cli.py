"""The command line: parse, call one public function, print or write.

Exit codes: 0 done; 1 our own error, one line on stderr; 2 usage. Progress goes to stderr, results to
stdout.
"""

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from vitreg.errors import VitregError
from vitreg.models import SCHEMES

if TYPE_CHECKING:
    from vitreg.diagnosis import Diagnosis
    from vitreg.emergence import Emergence

app = typer.Typer(
    name="vitreg",
    help="Find, explain and remove attention artifacts in Vision Transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_IMAGES_HELP = "A folder, a file, a glob, a .txt list of paths, or webdataset .tar shards."


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        import vitreg

        typer.echo(f"vitreg {vitreg.__version__}")
        raise typer.Exit


@app.command()
def diagnose(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL... IMAGES",
            help=f"MODEL: {SCHEMES}. Several models (checkpoints, sizes) are compared."
            f" IMAGES: {_IMAGES_HELP}",
        ),
    ],
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="F", help="Write the result as JSON.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="F.html", help="Write a report that opens offline.")
    ] = None,
    figure: Annotated[Path | None, typer.Option(metavar="F.png", help="Write the main figure.")] = None,
    size: Annotated[
        int | None, typer.Option(metavar="PX", min=1, help="Image side; positions are resampled.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Use the first N readable images.")
    ] = None,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1)] = 32,
    workers: Annotated[int | None, typer.Option(metavar="N", min=0, help="Decoding processes.")] = None,
    device: Annotated[str, typer.Option(metavar="D", help="cpu, cuda, cuda:1, mps or auto.")] = "auto",
    dtype: Annotated[str, typer.Option(metavar="D", help="float32, bfloat16 or float16.")] = "float32",
    random_weights: Annotated[
        bool, typer.Option(help="Build without a download, to try things out.")
    ] = False,
    strict: Annotated[bool, typer.Option(help="Stop at the first image that cannot be read.")] = False,
) -> None:
    """Does a model have attention artifacts? Where, from which layer on, and what do they do?"""
    import vitreg
    from vitreg.output import check_writable

    models, images = _split(inputs)
    for path in (json_path, report, figure):
        if path is not None:
            check_writable(path)  # before the work, so that none is lost
    found: list[Diagnosis] = []
    for model in models:
        with Console(stderr=True).status(f"loading {model}"):
            vit = vitreg.load(model, size=size, random_weights=random_weights, device=device, dtype=dtype)
        photos = vitreg.read_images(
            images, vit, batch_size=batch_size, limit=limit, workers=workers, strict=strict, progress=True
        )
        found.append(vitreg.diagnose(vit, photos))
    result = found[0] if len(found) == 1 else vitreg.Emergence(found)
    typer.echo(str(result))
    _write(result, json_path, report, figure)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Where the report goes.")] = Path(
        "vitreg-demo"
    ),
) -> None:
    """The whole story on a bundled example, offline: a phantom planted in a random-weight model."""
    from vitreg.demo import run

    run(out)


def _split(inputs: list[str]) -> tuple[list[str], str]:
    if len(inputs) < 2:
        raise typer.BadParameter("expected a model and images: vitreg diagnose MODEL IMAGES")
    return inputs[:-1], inputs[-1]


def _write(
    result: "Diagnosis | Emergence", json_path: Path | None, report: Path | None, figure: Path | None
) -> None:
    from vitreg.emergence import Emergence
    from vitreg.output import write_atomically
    from vitreg.report import write_comparison, write_report
    from vitreg.style import png

    if json_path is not None:
        write_atomically(json_path, json.dumps(result.to_json(), indent=1))
        typer.echo(f"JSON: {json_path}")
    if figure is not None:
        write_atomically(figure, png(result.figure()))
        typer.echo(f"figure: {figure}")
    if report is not None:
        if isinstance(result, Emergence):
            write_comparison(result.diagnoses, report)
        else:
            write_report(result, report)
        typer.echo(f"report: {report}")


def main() -> None:
    """The `vitreg` command."""
    warnings.filterwarnings("ignore", module=r"(timm|transformers|open_clip|torch|huggingface_hub)(\..*)?")
    # What libraries log (a hub's retries, say) would bury our one line; what matters comes as an error.
    logging.disable(logging.ERROR)
    try:
        app()
    except VitregError as error:
        sys.stderr.write(f"vitreg: {' '.join(str(error).split())}\n")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.stderr.write("vitreg: interrupted\n")
        sys.exit(130)
    finally:
        logging.disable(logging.NOTSET)


if __name__ == "__main__":
    main()
