"""The command line: parse, call one public function, print or write.

Exit codes: 0 done; 1 our own error, one line on stderr; 2 usage; 3 a bug, one line that names the file with
its traceback. Progress goes to stderr, results to stdout.
"""

import io
import json
import logging
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from vitreg.distributed import joined
from vitreg.errors import VitregError
from vitreg.evals.tasks import TASKS
from vitreg.models.loading import SCHEMES
from vitreg.search.find_fix import Kind
from vitreg.search.neurons import Method
from vitreg.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable

    from vitreg.diagnosis.emergence import Emergence
    from vitreg.diagnosis.result import Diagnosis
    from vitreg.examination.doctor import Examination
    from vitreg.models.backbone import Backbone
    from vitreg.search.find_fix import Cure
    from vitreg.studies.register_maps import RegisterStudy
    from vitreg.verification.verdict import Verdict

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
        typer.echo(f"vitreg {__version__}")
        raise typer.Exit


def _size(text: str) -> tuple[int, int]:
    from vitreg.models.sizes import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


# Options that several commands share.
Json = Annotated[Path | None, typer.Option("--json", metavar="F", help="Write the result as JSON.")]
Report = Annotated[Path | None, typer.Option(metavar="F.html", help="Write a report that opens offline.")]
Size = Annotated[
    Any,
    typer.Option(
        metavar="PX", parser=_size, help="Image side, or HEIGHTxWIDTH; positions are resampled accordingly."
    ),
]
Limit = Annotated[int | None, typer.Option(metavar="N", min=1, help="Use the first N readable images.")]
Spread = Annotated[int | None, typer.Option(metavar="N", min=1, help="So many images, evenly spread.")]
BatchSize = Annotated[int, typer.Option(metavar="N", min=1)]
Workers = Annotated[int | None, typer.Option(metavar="N", min=0, help="Decoding processes.")]
Device = Annotated[str, typer.Option(metavar="D", help="cpu, cuda, cuda:1, mps or auto.")]
Dtype = Annotated[str, typer.Option(metavar="D", help="float32, bfloat16 or float16.")]
TrustRemoteCode = Annotated[
    bool, typer.Option(help="Run Python code that comes with a checkpoint of transformers.")
]
RandomWeights = Annotated[bool, typer.Option(help="Build without a download, to try things out.")]
Strict = Annotated[bool, typer.Option(help="Stop at the first image that cannot be read.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help=f"{SCHEMES}.")]
Photos = Annotated[str, typer.Argument(metavar="IMAGES", help=_IMAGES_HELP)]


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
    json_path: Json = None,
    report: Report = None,
    figure: Annotated[Path | None, typer.Option(metavar="F.png", help="Write the main figure.")] = None,
    fix: Annotated[
        str | None, typer.Option(metavar="FIX", help="Apply a saved fix (folder or hub id) first.")
    ] = None,
    size: Size = None,
    limit: Limit = None,
    batch_size: BatchSize = 32,
    workers: Workers = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    random_weights: RandomWeights = False,
    trust_remote_code: TrustRemoteCode = False,
    strict: Strict = False,
) -> None:
    """Does a model have attention artifacts? Where, from which layer on, and what do they do?"""
    import vitreg

    with joined() as ranks:
        models, images = _split(inputs)
        _check_writable(json_path, report, figure)
        loaded = vitreg.load_fix(fix) if fix else None
        found: list[Diagnosis] = []
        for model in models:
            vit = _load(model, size, random_weights, device, dtype, trust_remote_code)
            if loaded:
                loaded.apply(vit)
                vit = replace(vit, name=f"{vit.name}, fixed ({loaded.type})")
            photos = vitreg.read_images(
                images, vit, batch_size=batch_size, limit=limit, workers=workers, strict=strict,
                progress=True, ranks=ranks,
            )  # fmt: skip
            found.append(vitreg.diagnose(vit, photos))
        result = found[0] if len(found) == 1 else vitreg.Emergence(found)
        if ranks.first:
            typer.echo(str(result))
            _write(result, json_path, report)
            _write_figure(result, figure)


@app.command()
def doctor(
    model: Model,
    json_path: Json = None,
    size: Size = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    random_weights: RandomWeights = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """What was found in a model, what works on it and what does not, on one page for a bug report."""
    import vitreg

    _check_writable(json_path)
    with Console(stderr=True).status(f"examining {model}"):
        found = vitreg.doctor(
            model, size=size, random_weights=random_weights, device=device, dtype=dtype,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
    typer.echo(str(found))
    _write(found, json_path)


@app.command()
def fix(
    model: Model,
    images: Photos,
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="DIR", help="The folder that the fix is saved in.")
    ],
    kind: Annotated[
        Kind, typer.Option("--type", help="Which fix; auto: the one that suits what makes the artifacts.")
    ] = "auto",
    method: Annotated[Method, typer.Option(help="How neurons are scored.")] = "contrast",
    top_k: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="How many neurons; default: as few as suffice.")
    ] = None,
    recursive: Annotated[bool, typer.Option(help="Find, fix, and find again.")] = False,
    json_path: Json = None,
    report: Report = None,
    size: Size = None,
    limit: Limit = None,
    batch_size: BatchSize = 32,
    workers: Workers = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    random_weights: RandomWeights = False,
    trust_remote_code: TrustRemoteCode = False,
    strict: Strict = False,
) -> None:
    """Find what makes the artifacts, build the fix that suits the model, verify and save it."""
    import vitreg
    from vitreg.fixes.saving import check_target

    with joined() as ranks:
        _check_writable(json_path, report)
        check_target(out)
        vit = _load(model, size, random_weights, device, dtype, trust_remote_code)
        photos = vitreg.read_images(
            images, vit, batch_size=batch_size, limit=limit, workers=workers, strict=strict, progress=True,
            ranks=ranks,
        )  # fmt: skip
        cure = vitreg.find_cure(
            vit,
            photos,
            kind=kind,
            method=method,
            top_k=top_k or "auto",
            recursive=recursive,
            progress=_say,
        )
        if not ranks.first:
            return
        typer.echo(str(cure))
        _write(cure, json_path, report)
        if cure.fix is None:
            typer.echo("no fix was written.")
        else:
            typer.echo(f"fix: {cure.save(out, vit=vit)}")


@app.command()
def verify(
    model: Model,
    fix: Annotated[str, typer.Argument(metavar="FIX", help="A folder that `vitreg fix` saved, or a hub id.")],
    images: Photos,
    controls: Annotated[bool, typer.Option(help="Run the controls too.")] = True,
    json_path: Json = None,
    report: Report = None,
    size: Size = None,
    limit: Limit = None,
    batch_size: BatchSize = 32,
    workers: Workers = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    random_weights: RandomWeights = False,
    trust_remote_code: TrustRemoteCode = False,
    strict: Strict = False,
) -> None:
    """Does a fix help? The same images before and after, against controls."""
    import vitreg

    with joined() as ranks:
        _check_writable(json_path, report)
        loaded = vitreg.load_fix(fix)  # a damaged one is an error before the model is loaded
        vit = _load(model, size, random_weights, device, dtype, trust_remote_code)
        loaded.check(vit)
        photos = vitreg.read_images(
            images, vit, batch_size=batch_size, limit=limit, workers=workers, strict=strict, progress=True,
            ranks=ranks,
        )  # fmt: skip
        verdict = vitreg.verify(vit, loaded, photos, controls=controls, progress=_say)
        if ranks.first:
            typer.echo(str(verdict))
            _write(verdict, json_path, report)


_TASKS = "\n\n".join(f"{task.name}: {task.about}. DATA: {task.data}." for task in TASKS.values())


@app.command(name="eval", epilog=_TASKS)
def eval_(
    task: Annotated[str, typer.Argument(metavar="TASK", help="What to measure; see the list below.")],
    model: Model,
    data: Annotated[str, typer.Argument(metavar="DATA", help="The data set, in its standard layout.")],
    fix: Annotated[
        str | None, typer.Option(metavar="FIX", help="Apply a saved fix (folder or hub id).")
    ] = None,
    compare: Annotated[bool, typer.Option(help="Without and with the fix, and the difference.")] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting of the task; repeatable."),
    ] = None,
    json_path: Json = None,
    report: Report = None,
    figure: Annotated[
        Path | None, typer.Option(metavar="F.png", help="Draw what was found, if the task can.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where features are kept; default: the user's cache.")
    ] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Keep no features.")] = False,
    size: Size = None,
    limit: Spread = None,
    batch_size: BatchSize = 32,
    workers: Workers = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    random_weights: RandomWeights = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure a model, with or without a fix, on one of the papers' tasks."""
    from vitreg.cli.evaluation import run
    from vitreg.features.config import default_cache

    with joined() as ranks:
        run(
            task,
            lambda builder: _load(model, size, random_weights, device, dtype, trust_remote_code, builder),
            data,
            fix=fix,
            compared=compare,
            settings=settings or [],
            json_path=json_path,
            report=report,
            figure=figure,
            machine={
                "cache": None if no_cache else cache or default_cache(),
                "limit": limit,
                "batch_size": batch_size,
                "workers": workers,
                "progress": True,
                "ranks": ranks,
            },
        )


@app.command()
def papers(
    table: Annotated[str | None, typer.Argument(metavar="TABLE", help="Show one table's rows.")] = None,
    run: Annotated[
        str | None, typer.Option("--run", metavar="TABLE", help="Measure one table's rows, where it can be.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="ROOT", help="The folder of all data sets; default: $VITREG_DATA.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Also rows that were measured before.")] = False,
    batch_size: BatchSize = 32,
    workers: Workers = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
) -> None:
    """List the papers' tables beside what was measured here, or measure them."""
    from vitreg.evals.papers import overview, run_table, table_text
    from vitreg.features.config import default_cache

    if run is None:
        typer.echo(overview() if table is None else table_text(table))
        return
    run_table(
        run,
        data,
        lambda row, builder: _load(row.model, row.size, False, device, dtype, False, builder),
        again=again,
        batch_size=batch_size,
        workers=workers,
        cache=default_cache(),
        progress=True,
    )


@app.command()
def features(
    model: Model,
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA", help="A folder, glob or URL of photos, .tar shards or Parquet with image bytes."
        ),
    ],
    out: Annotated[
        str, typer.Option("-o", "--out", metavar="OUT", help="A folder or URL; the same one goes on.")
    ],
    fix: Annotated[
        str | None, typer.Option(metavar="FIX", help="Apply a saved fix (folder or hub id) first.")
    ] = None,
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
    size: Size = None,
    batch_size: BatchSize = 64,
    shard_size: Annotated[int, typer.Option(metavar="N", min=1, help="Photos per file.")] = 1024,
    workers: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Ray actors; default: one per GPU or 4 CPUs.")
    ] = None,
    device: Annotated[str, typer.Option(metavar="D", help="cpu, cuda, mps or auto.")] = "auto",
    column: Annotated[
        str | None, typer.Option(metavar="C", help="The Parquet column with image bytes.")
    ] = None,
    random_weights: RandomWeights = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write the features of a whole archive as Parquet and safetensors, on Ray. The same command goes on."""
    import vitreg

    chosen = _numbers(layers)
    loaded = vitreg.load_fix(fix) if fix else None
    # Workers move it to their device.
    vit = _load(model, size, random_weights, "cpu", precision, trust_remote_code)
    if loaded:
        loaded.apply(vit)
    found = vitreg.extract_archive(
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
    typer.echo(str(found))


@app.command()
def registers(
    model: Model,
    images: Photos,
    fix: Annotated[
        str | None, typer.Option(metavar="FIX", help="Apply a saved fix (folder or hub id) first.")
    ] = None,
    layer: Annotated[
        int | None, typer.Option(metavar="L", min=0, help="Block, from 0; default: the last.")
    ] = None,
    json_path: Json = None,
    figure: Annotated[Path | None, typer.Option(metavar="F.png", help="Write attention maps.")] = None,
    size: Size = None,
    limit: Limit = None,
    batch_size: BatchSize = 32,
    workers: Workers = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    random_weights: RandomWeights = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """What do registers learn? Where each of them looks, and how alike they are."""
    import vitreg

    _check_writable(json_path, figure)
    loaded = vitreg.load_fix(fix) if fix else None
    vit = _load(model, size, random_weights, device, dtype, trust_remote_code)
    if loaded:
        loaded.apply(vit)
    photos = vitreg.read_images(
        images, vit, batch_size=batch_size, limit=limit, workers=workers, progress=True
    )
    study = vitreg.what_registers_learn(vit, photos, layer=layer)
    typer.echo(str(study))
    _write(study, json_path)
    _write_figure(study, figure)


@app.command()
def train(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="A bundled recipe, or a Python file with one.")
    ] = None,
    more: Annotated[list[int] | None, typer.Argument(metavar="", hidden=True)] = None,
    data: Annotated[str | None, typer.Option(metavar="DIR", help="The training data.")] = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="DIR", help="The run's folder; default: runs/RECIPE."),
    ] = None,
    registers: Annotated[
        int | None,
        typer.Option(metavar="N...", min=0, help="Register tokens; several numbers (0 1 2 4) are compared."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Another setting of the recipe; repeatable."),
    ] = None,
    evals: Annotated[
        list[str] | None,
        typer.Option(
            "--eval", metavar="TASK=DIR", help="Compare also on a task of `vitreg eval`; repeatable."
        ),
    ] = None,
    accelerator: Annotated[str, typer.Option(metavar="A", help="cpu, cuda, mps or auto.")] = "auto",
    devices: Annotated[int, typer.Option(metavar="N", min=1, help="Processes; torchrun has the say.")] = 1,
    nodes: Annotated[int, typer.Option(metavar="N", min=1)] = 1,
    strategy: Annotated[str, typer.Option(metavar="S", help="auto, ddp or fsdp.")] = "auto",
    precision: Annotated[str, typer.Option(metavar="P", help="32-true or bf16-mixed.")] = "32-true",
    workers: Annotated[int, typer.Option(metavar="N", min=0, help="Data loading processes, each.")] = 0,
    tensorboard: Annotated[bool, typer.Option(help="Write events for TensorBoard as well.")] = False,
) -> None:
    """Train with registers, from scratch or into a model that you have. Without RECIPE: list the recipes.

    The same command goes on where a run was stopped.
    """
    from vitreg.cli.training import listing, run
    from vitreg.training.loop import Machine

    if recipe is None:
        typer.echo(listing())
        return
    if more and registers is None:
        raise typer.BadParameter(f"what is {more[0]} for? expected one RECIPE, or --registers N N ...")
    run(
        recipe,
        out,
        data=data,
        settings=settings or [],
        registers=[] if registers is None else [registers, *(more or [])],
        evals=evals or [],
        machine=Machine(
            accelerator=accelerator,
            devices=devices,
            nodes=nodes,
            strategy=strategy,
            precision=precision,
            workers=workers,
            tensorboard=tensorboard,
            progress=True,
        ),
    )


@app.command(name="app")
def explorer(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help=f"{SCHEMES}. Default: the bundled example, a phantom."),
    ] = None,
    images: Annotated[
        str | None, typer.Option(metavar="IMAGES", help=f"{_IMAGES_HELP} Default: bundled photos.")
    ] = None,
    fix: Annotated[
        str | None, typer.Option(metavar="FIX", help="A saved fix, or a hub id; without it, one is made.")
    ] = None,
    size: Size = None,
    limit: Annotated[int, typer.Option(metavar="N", min=1, help="Diagnose the first N images.")] = 64,
    device: Device = "auto",
    dtype: Dtype = "float32",
    random_weights: RandomWeights = False,
    trust_remote_code: TrustRemoteCode = False,
    host: Annotated[str, typer.Option(help="0.0.0.0 serves other machines, too.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(metavar="N", min=1, max=65535, help="Default: the first free one from 7860.")
    ] = None,
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="Open it in the browser.")] = True,
) -> None:
    """Explore a model on a local page: norms, attention, neurons, objects, before and after a fix."""
    from vitreg.app import launch

    options = {
        "size": size,
        "device": device,
        "dtype": dtype,
        "random_weights": random_weights,
        "trust_remote_code": trust_remote_code,
    }
    if model is None and (images or fix):
        raise typer.BadParameter("the bundled example has its own photos and fix: name a MODEL.")
    with Console(stderr=True).status("loading and diagnosing") as status:

        def ready(address: str) -> None:
            status.stop()
            typer.echo(f"the explorer is at {address} (stop it with Ctrl-C)")

        launch(
            model, images=images, fix=fix, limit=limit, host=host, port=port,
            open_browser=open_browser and sys.stdout.isatty(), ready=ready,
            **({} if model is None else options),
        )  # fmt: skip


@app.command()
def demo(
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Where the report goes.")] = Path(
        "vitreg-demo"
    ),
    real: Annotated[bool, typer.Option("--real", help="A public ViT-Ti from the hub instead.")] = False,
    images: Annotated[
        str | None, typer.Option(metavar="IMAGES", help=f"With --real, other photos. {_IMAGES_HELP}")
    ] = None,
) -> None:
    """The whole story, offline: artifacts planted in a small bundled ViT (a phantom), found and removed."""
    from vitreg.demo import run, run_real

    if real:
        run_real(out, images)
    elif images is not None:
        raise typer.BadParameter("the bundled model knows its own photos only: add --real.")
    else:
        run(out)


def _load(
    model: str,
    size: "Size | None",
    random_weights: bool,
    device: str,
    dtype: str,
    trust_remote_code: bool,
    builder: "Callable[..., Backbone] | None" = None,
) -> "Backbone":
    import vitreg

    build = builder or vitreg.load
    with Console(stderr=True).status(f"loading {model}"):
        return build(
            model,
            size=size,
            random_weights=random_weights,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        )


def _numbers(text: str | None) -> list[int] | None:
    try:
        return [int(part) for part in text.split(",")] if text else None
    except ValueError:
        raise typer.BadParameter(f"expected numbers with commas (5,11), found {text!r}.") from None


def _say(stage: str) -> None:
    sys.stderr.write(f"{stage}\n")


def _check_writable(*paths: Path | None) -> None:
    """Before the work, so that none is lost."""
    from vitreg.files import check_writable

    for path in paths:
        if path is not None:
            check_writable(path)


def _split(inputs: list[str]) -> tuple[list[str], str]:
    if len(inputs) < 2:
        raise typer.BadParameter("expected a model and images: vitreg diagnose MODEL IMAGES")
    return inputs[:-1], inputs[-1]


def _write(
    result: "Diagnosis | Emergence | Cure | Verdict | RegisterStudy | Examination",
    json_path: Path | None,
    report: Path | None = None,
) -> None:
    from vitreg.files import write_atomically

    if json_path is not None:
        write_atomically(json_path, json.dumps(result.to_json(), indent=1))
        typer.echo(f"JSON: {json_path}")
    if report is not None:
        from vitreg.reports.report import write

        typer.echo(f"report: {write(result, report)}")


def _write_figure(result: "Diagnosis | Emergence | RegisterStudy", path: Path | None) -> None:
    from vitreg.files import write_atomically
    from vitreg.plots.style import png

    if path is not None:
        write_atomically(path, png(result.figure()))
        typer.echo(f"figure: {path}")


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
        sys.exit(130)
    finally:
        warnings.showwarning = show
        logging.disable(logging.NOTSET)


if __name__ == "__main__":
    main()
