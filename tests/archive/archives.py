"""Small archives, and a tiny model to run over them."""

import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from checkpoints import tiny_timm
from PIL import Image

import vitreg
from vitreg.archive.plan import write_or_check_plan
from vitreg.archive.run import features_of, job_of, settings_of
from vitreg.archive.shard_files import PATCHES, VECTORS
from vitreg.archive.sources import find_archive
from vitreg.archive.storage import Storage
from vitreg.archive.worker import DONE, TRYING, ShardWorker
from vitreg.fixes.base import without_fixes

BAD = {"empty.jpg": b"", "text.jpg": b"this is no photo"}


def png(number: int, side: int = 40) -> bytes:
    values = np.random.default_rng(number).integers(0, 256, (side, side + number % 7, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "png")
    return buffer.getvalue()


def photos(folder: Path, count: int, bad: bool = False) -> Path:
    """So many photos, in two subfolders, and by choice two that cannot be read."""
    for number in range(count):
        path = folder / f"{'ab'[number % 2]}/{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    for name, content in BAD.items() if bad else ():
        (folder / name).write_bytes(content)
    return folder


def tar(path: Path, contents: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def parquet(path: Path, contents: list[bytes | None], group: int, struct: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"bytes": content, "path": "x.png"} for content in contents] if struct else contents
    table = pa.table({"label": list(range(len(rows))), "image": rows})
    pq.write_table(table, path, row_group_size=group)
    return path


def tiny(**sizes: int) -> vitreg.Backbone:
    return vitreg.wrap(tiny_timm(**sizes))


def worker(vit: vitreg.Backbone, data: Path | str, out: Path, **changes: Any) -> ShardWorker:
    """A worker with its plan written, and a copy of the model: what Ray does, without Ray."""
    features = features_of(vit, changes.pop("tokens", None), changes.pop("layers", None))
    place, archive = Storage.at(out), find_archive(str(data))
    options = {"dtype": "float32", "batch_size": 4, "shard_images": 10, "column": None, **changes}
    settings = settings_of(vit, features, **options)
    place.make(DONE, TRYING, VECTORS, PATCHES)
    write_or_check_plan(place, settings, archive)
    job = job_of(vit, settings, archive, place)
    with without_fixes(vit.model):
        return ShardWorker(pickle.loads(pickle.dumps(job)))


def rows(out: Path) -> dict[str, list]:
    """The table of all Parquet files."""
    return pq.read_table(out / "vectors").to_pydict()


def contents(out) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in [*out.glob("vectors/*"), *out.glob("patches/*")]}
