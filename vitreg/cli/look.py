"""`vitreg look`: a few photos as models see them, in one picture."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitreg.cli.options import IMAGES_HELP, ModelOptions, SavedFix, with_options, words_of, working
from vitreg.cli.output import PAGES, OutputOptions
from vitreg.errors import OutputError
from vitreg.files import FIGURES, check_writable
from vitreg.models.names import SCHEMES
from vitreg.printing import Step

if TYPE_CHECKING:
    from vitreg.models.backbone import Backbone
    from vitreg.viewing.result import Look

# What is drawn without -o: always the same file, which the next look replaces.
PICTURE = Path("vitreg-look.png")
PATCH_HELP = "a patch as ROW,COLUMN from 0, 'outlier' (the largest norm) or 'centre'; repeatable"


@with_options
def look(
    photos: Annotated[
        list[str], typer.Argument(metavar="PHOTO...", help=f"Up to eight photos are shown. {IMAGES_HELP}")
    ],
    output: OutputOptions,
    loading: ModelOptions,
    model: Annotated[
        list[str] | None,
        typer.Option("-m", "--model", metavar="MODEL", help=f"{SCHEMES}. Repeat it to compare models."),
    ] = None,
    fix: SavedFix = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="F", help=f".png, .pdf, .svg or .html. Default: {PICTURE}."),
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Show the photo layer by layer.")] = False,
    queries: Annotated[
        list[str] | None,
        typer.Option(metavar="TOKEN", help=f"Show where a token looks: CLS, 'register 0', {PATCH_HELP}."),
    ] = None,
    similar: Annotated[
        list[str] | None,
        typer.Option(metavar="PATCH", help=f"Show which patches are like one: {PATCH_HELP}."),
    ] = None,
    together: Annotated[
        bool, typer.Option("--together", help="One set of feature colours for all photos.")
    ] = False,
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Features of the foreground alone, by the first component.")
    ] = False,
) -> None:
    """See a photo as a model does: patch norms, features (PCA), attention, and artifacts outlined."""
    import vitreg

    views = {"--layers": layers, "--queries": bool(queries), "--similar": bool(similar)}
    if sum(views.values()) > 1:
        raise typer.BadParameter(f"one picture at a time: choose one of {', '.join(views)}.")
    if fix is not None and len(model or ()) > 1:
        raise typer.BadParameter("--fix goes with one --model.")
    output.check()
    target = _target(out, output.overwrite)
    loaded = vitreg.load_fix(fix) if fix else None
    models = [loading.load(name) for name in model or ()] or [_at_hand(loading)]
    with working("looking"):
        seen = _look(models, photos, fix=loaded, queries=queries or (), layers=layers)
        figure = _figure(seen, layers, queries, similar, {"together": together, "foreground": foreground})
    output.tell(seen, _next(model, words_of(loading)))
    _write(seen, figure, target)
    output.write(seen)


def _look(models: "list[Backbone]", photos: list[str], *, queries: Any, **options: Any) -> "Look":
    import vitreg
    from vitreg.viewing.patches import parse

    try:
        return vitreg.look(models, photos, queries=[parse(query) for query in queries], **options)
    except ValueError as error:  # a token that the model does not have
        raise typer.BadParameter(str(error)) from None


def _figure(
    seen: "Look",
    layers: bool,
    queries: list[str] | None,
    similar: list[str] | None,
    colours: dict[str, bool],
) -> Any:
    """The picture that was asked for."""
    from vitreg.viewing.patches import parse

    if (layers or queries or similar) and len(seen.names) > 1:
        typer.echo(f"showing {seen.names[0]}, the first of the photos", err=True)
    if layers:
        return seen.by_layer()
    if queries:
        return seen.attention()
    if similar:
        try:
            return seen.similar(*map(parse, similar))
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    return seen.figure(**colours)


def _at_hand(loading: ModelOptions) -> "Backbone":
    """The default model."""
    from vitreg.viewing.at_hand import model_at_hand

    with working("looking for a model"):
        vit, said = model_at_hand(loading.device)
    typer.echo(said, err=True)
    return vit


def _target(out: Path | None, overwrite: bool) -> Path:
    """The file to draw. Raises OutputError if it cannot be, or would replace what is not ours."""
    target = out or PICTURE
    known = (*FIGURES, *PAGES)
    if target.suffix.lower() not in known:
        raise OutputError(f"{target}: expected a name that ends in {', '.join(known)}.")
    check_writable(target, overwrite=overwrite or out is None)
    return target


def _next(models: list[str] | None, given: list[str]) -> list[Step]:
    """Judge a model that was named on more photos."""
    if not models:
        return []
    command = ("vitreg", "diagnose", models[0], "photos/", *given)
    return [Step("judge the model on photos of your own.", command)]


def _write(seen: "Look", figure: Any, target: Path) -> None:
    from vitreg.files import write_atomically
    from vitreg.plots.style import image

    if target.suffix.lower() in PAGES:
        from vitreg.reports.look import write_look

        write_look(seen, target, figure)
    else:
        write_atomically(target, image(figure, target.suffix))
    typer.echo(f"picture: {target}")
