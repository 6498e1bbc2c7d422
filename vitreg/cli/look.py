"""`vitreg look`: a few photos as models see them, in one picture."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitreg.cli.options import IMAGES_HELP, Json, ModelOptions, SavedFix, with_options, working
from vitreg.cli.output import check_writable, say
from vitreg.errors import OutputError
from vitreg.models.names import SCHEMES

if TYPE_CHECKING:
    from vitreg.models.backbone import Backbone
    from vitreg.viewing.result import Look

SUFFIXES = (".png", ".pdf", ".svg", ".html")
PATCH_HELP = "a patch as ROW,COLUMN from 0, 'outlier' (the largest norm) or 'centre'; repeatable"


@with_options
def look(
    photos: Annotated[
        list[str], typer.Argument(metavar="PHOTO...", help=f"Up to eight photos are shown. {IMAGES_HELP}")
    ],
    loading: ModelOptions,
    model: Annotated[
        list[str] | None,
        typer.Option("-m", "--model", metavar="MODEL", help=f"{SCHEMES}. Repeat it to compare models."),
    ] = None,
    fix: SavedFix = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="F", help=".png, .pdf, .svg or .html. Default: vitreg-look.png."),
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
    json_path: Json = None,
) -> None:
    """See a photo as a model does: patch norms, features (PCA), attention, and artifacts outlined."""
    import vitreg

    views = {"--layers": layers, "--queries": bool(queries), "--similar": bool(similar)}
    if sum(views.values()) > 1:
        raise typer.BadParameter(f"one picture at a time: choose one of {', '.join(views)}.")
    target = _target(out)
    check_writable(target, json_path)
    loaded = vitreg.load_fix(fix) if fix else None
    models = [loading.load(name) for name in model or ()] or [_at_hand(loading)]
    if loaded is not None and len(models) > 1:
        raise typer.BadParameter("--fix goes with one --model.")
    with working("looking"):
        seen = _look(models, photos, fix=loaded, queries=queries or (), layers=layers)
        figure = _figure(seen, layers, queries, similar, {"together": together, "foreground": foreground})
    typer.echo(str(seen))
    _write(seen, figure, target, json_path)


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

    views = layers or queries or similar
    if views and len(seen.names) > 1:
        say(f"showing {seen.names[0]}, the first of the photos")
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
    say(said)
    return vit


def _target(out: Path | None) -> Path:
    target = out or Path("vitreg-look.png")
    if target.suffix.lower() not in SUFFIXES:
        raise OutputError(f"{target}: expected a name that ends in {', '.join(SUFFIXES)}.")
    return target


def _write(seen: "Look", figure: Any, target: Path, json_path: Path | None) -> None:
    import json

    from vitreg.files import write_atomically
    from vitreg.plots.style import drawn

    if target.suffix.lower() == ".html":
        from vitreg.reports.look import write_look

        write_look(seen, target, figure)
    else:
        write_atomically(target, drawn(figure, target.suffix.lower().removeprefix(".")))
    typer.echo(f"picture: {target}")
    if json_path is not None:
        write_atomically(json_path, json.dumps(seen.to_json(), indent=1))
        typer.echo(f"JSON: {json_path}")
