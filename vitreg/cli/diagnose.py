"""`vitreg diagnose`, `vitreg doctor` and `vitreg registers`: look at a model."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitreg.cli.options import (
    IMAGES_HELP,
    ImagesArgument,
    Json,
    ModelArgument,
    ModelOptions,
    PhotoOptions,
    Report,
    SavedFix,
    with_options,
    working,
)
from vitreg.cli.output import check_writable, write
from vitreg.models.names import SCHEMES

if TYPE_CHECKING:
    from vitreg.diagnosis.result import Diagnosis


@with_options
def diagnose(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL... IMAGES",
            help=f"MODEL: {SCHEMES}. Several models (checkpoints, sizes) are compared. IMAGES: {IMAGES_HELP}",
        ),
    ],
    loading: ModelOptions,
    reading: PhotoOptions,
    json_path: Json = None,
    report: Report = None,
    figure: Annotated[Path | None, typer.Option(metavar="F.png", help="Write the main figure.")] = None,
    fix: SavedFix = None,
) -> None:
    """Does a model have attention artifacts? Where, from which layer on, and what do they do?"""
    import vitreg
    from vitreg.distributed import process_group

    if len(inputs) < 2:
        raise typer.BadParameter("expected a model and images: vitreg diagnose MODEL IMAGES")
    with process_group() as ranks:
        check_writable(json_path, report, figure)
        loaded = vitreg.load_fix(fix) if fix else None
        diagnoses: list[Diagnosis] = []
        for model in inputs[:-1]:
            vit = loading.load(model)
            if loaded:
                loaded.apply(vit)
                vit = replace(vit, name=f"{vit.name}, fixed ({loaded.type})")
            diagnoses.append(vitreg.diagnose(vit, reading.read(inputs[-1], vit, ranks)))
        result = diagnoses[0] if len(diagnoses) == 1 else vitreg.Emergence(diagnoses)
        if ranks.first:
            typer.echo(str(result))
            write(result, json_path, report, figure)


@with_options
def doctor(model: ModelArgument, loading: ModelOptions, json_path: Json = None) -> None:
    """What was found in a model, what works on it and what does not, on one page for a bug report."""
    import vitreg

    check_writable(json_path)
    with working(f"examining {model}"):
        examination = vitreg.doctor(model, **asdict(loading))
    typer.echo(str(examination))
    write(examination, json_path)


@with_options
def registers(
    model: ModelArgument,
    images: ImagesArgument,
    loading: ModelOptions,
    reading: PhotoOptions,
    fix: SavedFix = None,
    layer: Annotated[
        int | None, typer.Option(metavar="L", min=0, help="Block, from 0; default: the last.")
    ] = None,
    json_path: Json = None,
    figure: Annotated[Path | None, typer.Option(metavar="F.png", help="Write attention maps.")] = None,
) -> None:
    """What do registers learn? Where each of them looks, and how alike they are."""
    import vitreg

    check_writable(json_path, figure)
    loaded = vitreg.load_fix(fix) if fix else None
    vit = loading.load(model)
    if loaded:
        loaded.apply(vit)
    study = vitreg.what_registers_learn(vit, reading.read(images, vit), layer=layer)
    typer.echo(str(study))
    write(study, json_path, figure=figure)
