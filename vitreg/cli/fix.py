"""`vitreg fix` and `vitreg verify`: make a fix, and judge one."""

from pathlib import Path
from typing import Annotated

import typer

from vitreg.cli.next_steps import after_fix, after_verify
from vitreg.cli.options import (
    ImagesArgument,
    ModelArgument,
    ModelOptions,
    PhotoOptions,
    with_options,
    words_of,
)
from vitreg.cli.output import ReportOptions
from vitreg.cli.roles import check_order
from vitreg.search.choices import FixKind, Method


@with_options
def fix(
    model: ModelArgument,
    images: ImagesArgument,
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="DIR", help="The folder that the fix is saved in.")
    ],
    output: ReportOptions,
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
) -> None:
    """Find what makes the artifacts, build the fix that suits the model, verify and save it."""
    import vitreg
    from vitreg.distributed import process_group

    check_order("fix", {"MODEL": model, "IMAGES": images})
    with process_group() as ranks:
        output.check(out)
        vit = loading.load(model)
        found = vitreg.find_fix(
            vit,
            reading.read(images, vit, ranks),
            kind=kind,
            method=method,
            top_k=top_k or "auto",
            recursive=recursive,
            progress=True,
        )
        if not ranks.first:
            return
        saved = None if found.fix is None else found.save(out, vit=vit)
        output.tell(found, after_fix(model, images, out, found, words_of(loading, reading)))
        output.write(found)
        typer.echo("no fix was written." if saved is None else f"fix: {saved}")


@with_options
def verify(
    model: ModelArgument,
    fix: Annotated[str, typer.Argument(metavar="FIX", help="A folder that `vitreg fix` saved, or a hub id.")],
    images: ImagesArgument,
    output: ReportOptions,
    loading: ModelOptions,
    reading: PhotoOptions,
    controls: Annotated[bool, typer.Option(help="Run the controls too.")] = True,
) -> None:
    """Does a fix help? The same images before and after, against controls."""
    import vitreg
    from vitreg.distributed import process_group

    check_order("verify", {"MODEL": model, "FIX": fix, "IMAGES": images})
    with process_group() as ranks:
        output.check()
        loaded = vitreg.load_fix(fix)  # a damaged one is an error before the model is loaded
        vit = loading.load(model)
        loaded.check(vit)
        verdict = vitreg.verify(
            vit, loaded, reading.read(images, vit, ranks), controls=controls, progress=True
        )
        if ranks.first:
            given = words_of(loading, reading)
            output.tell(verdict, after_verify(model, images, fix, loaded.type, verdict.verdict, given))
            output.write(verdict)
