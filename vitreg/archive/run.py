"""The driver: it plans, hands out shards to workers, and gathers what they have made."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from vitreg.archive.manifest import MANIFEST, Extraction, finished
from vitreg.archive.plan import ArchiveSettings, write_or_check_plan
from vitreg.archive.ray_engine import ray_session, require_ray, run_shards
from vitreg.archive.shard_files import PATCHES, VECTORS
from vitreg.archive.sources import Archive, find_archive
from vitreg.archive.storage import Storage
from vitreg.archive.worker import DONE, TRYING, Job
from vitreg.errors import DataError, ImageError, UnsupportedModelError
from vitreg.features.keys import preprocess_key
from vitreg.features.observer import Observer
from vitreg.fixes.base import applied, without_fixes
from vitreg.hooks.block_edit import without_edits
from vitreg.models.backbone import Backbone
from vitreg.printing import one_of, progress_bar
from vitreg.provenance import digest

TOKENS = ("cls", "mean", "output", "registers", "patches")
DTYPES = ("float16", "float32")  # those that Parquet has


def extract_archive(
    vit: Backbone,
    data: str | Path,
    out: str | Path,
    *,
    tokens: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    dtype: str = "float16",
    batch_size: int = 64,
    shard_images: int = 1024,
    workers: int | None = None,
    device: str = "auto",
    column: str | None = None,
    progress: bool = False,
) -> Extraction:
    """Write the features of all photos of an archive, under whatever fixes are applied, with Ray Data.

    `data`: a folder, a glob or a file, local or an fsspec URL, of photos, webdataset .tar shards or Parquet
    files with image bytes (in `column`, where it is not plain which). `out`: a folder, local or a URL. The
    same call goes on where a run was stopped.

    `tokens`: some of cls (d), mean of the patches (d), output of the model, registers (r, d; trained ones,
    and those that a fix adds) and patches (gh, gw, d), after the model's final norm; by default cls, where
    there is one, and mean. `layers` are 0-based; without them, the last. `dtype` is what is stored; the model
    computes in its own. `shard_images`: photos per file, and the work that is lost when a worker dies.
    `workers` hold a model each: by default one per GPU, else one for every 4 CPUs. Runs on the cluster of
    RAY_ADDRESS where that is set, else on this machine.

    Raises DataError (nothing to read, or out of reach), OutputError (nothing can be written), ArchiveError
    (`out` belongs to something else, or workers die), UnsupportedModelError (the model has no such token),
    ImageError (no photo could be read), MissingExtraError without Ray.
    """
    require_ray()  # before anything is written
    if dtype not in DTYPES:
        raise DataError(f"features cannot be stored as {dtype!r}. {one_of(dtype, DTYPES)}")
    for name, value in (("batch_size", batch_size), ("shard_images", shard_images), ("workers", workers)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}, but must be at least 1.")
    place = Storage.at(out)
    features = features_of(vit, tokens, layers)
    archive = find_archive(str(data))
    _refuse_inside(place, Storage.at(data))
    place.make(DONE, TRYING, VECTORS, *([PATCHES] if any("patches" in name for name in features) else []))
    settings = settings_of(vit, features, dtype, batch_size, shard_images, column)
    planned = write_or_check_plan(place, settings, archive)
    left = sorted({*range(planned)} - {*finished(place)})
    for name in place.names(TRYING):  # a new run has its tries anew
        place.remove(f"{TRYING}/{name}")
    if left:
        job = job_of(vit, settings, archive, place)
        before, images, start = planned - len(left), 0, time.perf_counter()
        bar = progress_bar(progress, planned, before)
        with ray_session(workers), without_fixes(vit.model), _gathering(place), bar as show:
            for done, entry in enumerate(run_shards(job, left, workers, device), before + 1):
                images += entry["images"]
                show(done, f"shards, {images / (time.perf_counter() - start):.0f} images/s")
    else:  # the driver may have died before it could sum up
        _gather(place)
    return _not_empty(Extraction.read(place.url))


def _not_empty(extraction: Extraction) -> Extraction:
    if not extraction.images:
        first = "; ".join(f"{image.path}: {image.reason}" for image in extraction.failed[:3])
        raise ImageError(f"none of {len(extraction.failed)} photos could be read: {first}.")
    return extraction


def _refuse_inside(out: Storage, data: Storage) -> None:
    """The next run would find this one's files in the archive."""
    if out.fs == data.fs and f"{out.path}/".startswith(f"{data.path.rstrip('/')}/"):
        raise DataError(f"{out.url} lies inside of {data.url}. Choose an output folder outside of it.")


# -- what is asked for ---------------------------------------------------------------------------------


def features_of(
    vit: Backbone, tokens: Sequence[str] | None = None, layers: Sequence[int] | None = None
) -> dict[str, tuple[int, ...]]:
    """{feature, as Observer calls it: shape for one photo}, found by running one grey image.

    Raises DataError for an unknown token or layer, UnsupportedModelError for what the model has not.
    """
    if unknown := [token for token in tokens or () if token not in TOKENS]:
        raise DataError(f"there is no token {unknown[0]!r}: expected some of {', '.join(TOKENS)}.")
    depth = vit.anatomy.depth
    if wrong := [layer for layer in layers or () if not -depth <= layer < depth]:
        raise DataError(f"there is no layer {wrong[0]}: expected numbers from 0 to {depth - 1}.")
    places = (
        [""] if layers is None else [f"@{layer}" for layer in sorted({layer % depth for layer in layers})]
    )
    wanted: list[str] = []
    for token in tokens or (["cls"] if vit.layout.prefix else []) + ["mean"]:
        if token == "registers":
            wanted += _registers(vit, places)
        else:
            wanted += [token] if token == "output" else [f"{token}{place}" for place in places]
    return _shapes(vit, list(dict.fromkeys(wanted)))


def _registers(vit: Backbone, places: list[str]) -> list[str]:
    """Trained ones of all layers, and those that a fix carries, which exist at the end only."""
    trained = [f"registers{place}" for place in places] if vit.layout.registers else []
    try:
        _shapes(vit, ["test_registers"])
    except UnsupportedModelError:
        if trained:
            return trained
        raise UnsupportedModelError(
            f"{vit.name} has no register tokens: neither trained ones nor a fix that adds some. Leave them"
            " out, or apply a fix."
        ) from None
    return [*trained, "test_registers"]


def _shapes(vit: Backbone, wanted: Sequence[str]) -> dict[str, tuple[int, ...]]:
    rows = Observer(vit, wanted)(torch.zeros(1, 3, *vit.image_size))
    grid = vit.layout.grid
    dense = {name for name in wanted if name.partition("@")[0] == "patches"}
    return {
        name: (*grid, rows[name].shape[-1]) if name in dense else (*rows[name].shape[1:],) for name in wanted
    }


def settings_of(
    vit: Backbone,
    features: dict[str, tuple[int, ...]],
    dtype: str,
    batch_size: int,
    shard_images: int,
    column: str | None,
) -> ArchiveSettings:
    """What the features depend on, for the plan: a run goes on only where all of it is the same."""
    if vit.preprocess is None:
        raise ImageError(f"{vit.name} was wrapped without a preprocess. Pass one to vitreg.wrap.")
    fixes = [f"{handle.fix.type} {digest(handle.fix)}" for handle in applied(vit.model)]
    with without_edits(vit.model):
        weights = digest(repr(vit.model), vit.model.state_dict())
    return ArchiveSettings(
        model=vit.name,
        weights=weights,
        fix=", ".join(fixes) or "none",
        image_size=vit.image_size,
        precision=str(vit.dtype).removeprefix("torch."),
        preprocess=preprocess_key(vit.preprocess),
        features=features,
        dtype=dtype,
        batch_size=batch_size,
        shard_images=shard_images,
        column=column,
    )


def job_of(vit: Backbone, settings: ArchiveSettings, archive: Archive, out: Storage) -> Job:
    """What each worker is to do; where it runs, the engine says."""
    return Job(
        vit=vit,
        fixes=tuple(handle.fix for handle in applied(vit.model)),
        features=tuple(settings.features),
        dtype=getattr(torch, settings.dtype),
        batch_size=settings.batch_size,
        images=settings.shard_images,
        data=archive.place,
        kind=archive.kind,
        column=settings.column,
        out=out,
        device="cpu",
        threads=1,
    )


# -- while it runs -------------------------------------------------------------------------------------


@contextmanager
def _gathering(out: Storage) -> Iterator[None]:
    """However the work ends, the manifest says what is there, if it can be written at all."""
    try:
        yield
    except BaseException:
        with suppress(Exception):  # a full disk, most likely: the manifest before this one stays
            _gather(out)
        raise
    _gather(out)


def _gather(out: Storage) -> None:
    for folder in ("", DONE, VECTORS, PATCHES):
        out.remove_partial(folder)
    found = Extraction.gather(out, finished(out))
    out.write(MANIFEST, json.dumps(found.to_json(), indent=1).encode())
