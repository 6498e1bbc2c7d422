"""`vitreg features`: the features of a whole archive."""

from typing import Annotated

import typer

from vitreg.cli.options import BatchSize, BuildOptions, ModelArgument, SavedFix, with_options


@with_options
def features(
    model: ModelArgument,
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA", help="A folder, glob or URL of photos, .tar shards or Parquet with image bytes."
        ),
    ],
    out: Annotated[
        str, typer.Option("-o", "--out", metavar="OUT", help="A folder or URL; the same one goes on.")
    ],
    building: BuildOptions,
    fix: SavedFix = None,
    tokens: Annotated[
        str | None,
        typer.Option(metavar="T,T", help="Of cls, mean, output, registers, patches. Default: cls,mean."),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(metavar="L,L", help="Blocks, from 0; default: the last.")
    ] = None,
    dtype: Annotated[str, typer.Option(metavar="D", help="Stored as float16 or float32.")] = "float16",
    precision: Annotated[
        str, typer.Option(metavar="D", help="Of the model: float32, bfloat16 or float16.")
    ] = "float32",
    batch_size: BatchSize = 64,
    shard_size: Annotated[int, typer.Option(metavar="N", min=1, help="Photos per file.")] = 1024,
    workers: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Ray actors; default: one per GPU or 4 CPUs.")
    ] = None,
    device: Annotated[str, typer.Option(metavar="D", help="cpu, cuda, mps or auto.")] = "auto",
    column: Annotated[
        str | None, typer.Option(metavar="C", help="The Parquet column with image bytes.")
    ] = None,
) -> None:
    """Write the features of a whole archive as Parquet and safetensors, on Ray. The same command goes on."""
    import vitreg

    chosen = _numbers(layers)
    loaded = vitreg.load_fix(fix) if fix else None
    vit = building.build(model, "cpu", precision)  # workers move it to their device
    if loaded:
        loaded.apply(vit)
    extraction = vitreg.extract_archive(
        vit,
        data,
        out,
        tokens=tokens.split(",") if tokens else None,
        layers=chosen,
        dtype=dtype,
        batch_size=batch_size,
        shard_images=shard_size,
        workers=workers,
        device=device,
        column=column,
        progress=True,
    )
    typer.echo(str(extraction))


def _numbers(text: str | None) -> list[int] | None:
    try:
        return [int(part) for part in text.split(",")] if text else None
    except ValueError:
        raise typer.BadParameter(f"expected numbers with commas (5,11), found {text!r}.") from None
