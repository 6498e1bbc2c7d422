"""`vitreg app` and `vitreg demo`: see it."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from vitreg.cli.options import IMAGES_HELP, ModelOptions, with_options, working
from vitreg.models.names import SCHEMES


@with_options
def explore(
    loading: ModelOptions,
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help=f"{SCHEMES}. Default: the bundled example, a phantom."),
    ] = None,
    images: Annotated[
        str | None, typer.Option(metavar="IMAGES", help=f"{IMAGES_HELP} Default: bundled photos.")
    ] = None,
    fix: Annotated[
        str | None, typer.Option(metavar="FIX", help="A saved fix, or a hub id; without it, one is made.")
    ] = None,
    limit: Annotated[int, typer.Option(metavar="N", min=1, help="Diagnose the first N images.")] = 64,
    host: Annotated[str, typer.Option(help="0.0.0.0 serves other machines, too.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(metavar="N", min=1, max=65535, help="Default: the first free one from 7860.")
    ] = None,
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="Open it in the browser.")] = True,
) -> None:
    """Explore a model on a local page: norms, attention, neurons, objects, before and after a fix."""
    from vitreg.app import launch

    if model is None and (images or fix):
        raise typer.BadParameter("the bundled example has its own photos and fix: name a MODEL.")
    with working("loading and diagnosing") as status:

        def ready(address: str) -> None:
            status.stop()
            typer.echo(f"the explorer is at {address} (stop it with Ctrl-C)")

        launch(
            model,
            images=images,
            fix=fix,
            limit=limit,
            host=host,
            port=port,
            open_browser=open_browser and sys.stdout.isatty(),
            ready=ready,
            **({} if model is None else asdict(loading)),
        )


def demo(
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Where the report goes.")] = Path(
        "vitreg-demo"
    ),
    real: Annotated[bool, typer.Option("--real", help="A public ViT-Ti from the hub instead.")] = False,
    images: Annotated[
        str | None, typer.Option(metavar="IMAGES", help=f"With --real, other photos. {IMAGES_HELP}")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier demo.")] = False,
) -> None:
    """The whole story, offline: artifacts planted in a small bundled ViT (a phantom), found and removed."""
    from vitreg.demo import REPORT, run, run_real
    from vitreg.files import already_there

    if not overwrite and (out / REPORT).exists():
        raise already_there(out / REPORT)
    if real:
        run_real(out, images)
    elif images is not None:
        raise typer.BadParameter("the bundled model knows its own photos only: add --real.")
    else:
        run(out)
