"""`vitreg diagnose`, `vitreg doctor` and `vitreg registers`: look at a model."""

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated

import typer

from vitreg.cli.next_steps import after_diagnosis
from vitreg.cli.options import (
    IMAGES_HELP,
    ImagesArgument,
    ModelArgument,
    ModelOptions,
    PhotoOptions,
    SavedFix,
    with_options,
    words_of,
    working,
)
from vitreg.cli.output import AllOutputOptions, FigureOptions, OutputOptions
from vitreg.cli.roles import check_order
from vitreg.models.names import SCHEMES
from vitreg.printing import Step

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
    output: AllOutputOptions,
    loading: ModelOptions,
    reading: PhotoOptions,
    fix: SavedFix = None,
) -> None:
    """Does a model have attention artifacts? Where, from which layer on, and what do they do?"""
    import vitreg
    from vitreg.distributed import process_group

    if len(inputs) < 2:
        raise typer.BadParameter("expected a model and images: vitreg diagnose MODEL IMAGES")
    *models, images = inputs
    check_order("diagnose", {"MODEL": models[0], "IMAGES": images}, between=models[1:])
    with process_group() as ranks:
        output.check()
        loaded = vitreg.load_fix(fix) if fix else None
        diagnoses: list[Diagnosis] = []
        for model in models:
            vit = loading.load(model)
            if loaded:
                loaded.apply(vit)
                vit = replace(vit, name=f"{vit.name}, fixed ({loaded.type})")
            diagnoses.append(vitreg.diagnose(vit, reading.read(images, vit, ranks)))
        result = diagnoses[0] if len(diagnoses) == 1 else vitreg.Emergence(diagnoses)
        if ranks.first:
            output.tell(result, after_diagnosis(models, images, diagnoses, words_of(loading, reading), fix))
            output.write(result)


@with_options
def doctor(model: ModelArgument, output: OutputOptions, loading: ModelOptions) -> None:
    """What was found in a model, what works on it and what does not; with --full, a page for a bug report."""
    import vitreg

    output.check()
    with working(f"examining {model}"):
        examination = vitreg.doctor(model, **asdict(loading))
    page = ("vitreg", "doctor", model, "--full", *words_of(loading))
    output.tell(examination, [] if output.full else [Step("the whole page, for a bug report.", page)])
    output.write(examination)


@with_options
def registers(
    model: ModelArgument,
    images: ImagesArgument,
    output: FigureOptions,
    loading: ModelOptions,
    reading: PhotoOptions,
    fix: SavedFix = None,
    layer: Annotated[
        int | None, typer.Option(metavar="L", min=0, help="Block, from 0; default: the last.")
    ] = None,
) -> None:
    """What do registers learn? Where each of them looks, and how alike they are."""
    import vitreg

    check_order("registers", {"MODEL": model, "IMAGES": images})
    output.check()
    loaded = vitreg.load_fix(fix) if fix else None
    vit = loading.load(model)
    if loaded:
        loaded.apply(vit)
    study = vitreg.what_registers_learn(vit, reading.read(images, vit), layer=layer)
    drawn = ["vitreg", "registers", model, images, "--figure", "registers.png", *words_of(loading, reading)]
    drawn += ["--fix", fix] if fix else []
    drawn += ["--layer", str(layer)] if layer is not None else []
    output.tell(study, [] if output.figure else [Step("see where each of them looks.", tuple(drawn))])
    output.write(study)
