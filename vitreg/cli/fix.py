"""`vitreg fix` and `vitreg verify`: make a fix, and judge one."""

from pathlib import Path
from typing import Annotated

import typer

from vitreg.cli.options import (
    ImagesArgument,
    Json,
    ModelArgument,
    ModelOptions,
    PhotoOptions,
    Report,
    with_options,
)
from vitreg.cli.output import check_writable, say, write
from vitreg.search.choices import FixKind, Method


@with_options
def fix(
    model: ModelArgument,
    images: ImagesArgument,
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="DIR", help="The folder that the fix is saved in.")
    ],
    loading: ModelOptions,
    reading: PhotoOptions,
    kind: Annotated[
        FixKind, typer.Option("--type", help="Which fix; auto: the one that suits what makes the artifacts.")
    ] = "auto",
    method: Annotated[Method, typer.Option(help="How neurons are scored.")] = "contrast",
    top_k: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="How many neurons; default: as few as suffice.")
    ] = None,
    recursive: Annotated[bool, typer.Option(help="Find, fix, and find again.")] = False,
    json_path: Json = None,
    report: Report = None,
) -> None:
    """Find what makes the artifacts, build the fix that suits the model, verify and save it."""
    import vitreg
    from vitreg.distributed import process_group
    from vitreg.fixes.saving import check_target

    with process_group() as ranks:
        check_writable(json_path, report)
        check_target(out)
        vit = loading.load(model)
        cure = vitreg.find_fix(
            vit,
            reading.read(images, vit, ranks),
            kind=kind,
            method=method,
            top_k=top_k or "auto",
            recursive=recursive,
            progress=say,
        )
        if not ranks.first:
            return
        typer.echo(str(cure))
        write(cure, json_path, report)
        if cure.fix is None:
            typer.echo("no fix was written.")
        else:
            typer.echo(f"fix: {cure.save(out, vit=vit)}")


@with_options
def verify(
    model: ModelArgument,
    fix: Annotated[str, typer.Argument(metavar="FIX", help="A folder that `vitreg fix` saved, or a hub id.")],
    images: ImagesArgument,
    loading: ModelOptions,
    reading: PhotoOptions,
    controls: Annotated[bool, typer.Option(help="Run the controls too.")] = True,
    json_path: Json = None,
    report: Report = None,
) -> None:
    """Does a fix help? The same images before and after, against controls."""
    import vitreg
    from vitreg.distributed import process_group

    with process_group() as ranks:
        check_writable(json_path, report)
        loaded = vitreg.load_fix(fix)  # a damaged one is an error before the model is loaded
        vit = loading.load(model)
        loaded.check(vit)
        verdict = vitreg.verify(
            vit, loaded, reading.read(images, vit, ranks), controls=controls, progress=say
        )
        if ranks.first:
            typer.echo(str(verdict))
            write(verdict, json_path, report)
