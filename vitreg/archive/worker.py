"""One worker: it holds the model and turns shards into files, one after the other.

Photos are read and decoded by threads, ahead of the forward pass unless both would share the same cores with
nothing to wait for; files are written behind it by another. What a batch holds depends on the shard alone:
neither the worker nor a restart changes the features.
"""

import json
import os
import socket
import sys
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from vitreg.archive.plan import read_shard
from vitreg.archive.shard_files import Parts
from vitreg.archive.sources import ArchiveItem, SourceKind, items
from vitreg.archive.stopwatch import Stopwatch
from vitreg.archive.storage import Storage
from vitreg.data.batches import Batch, to_batch
from vitreg.data.decoding import reason
from vitreg.data.images import read_item
from vitreg.data.listing import FailedImage, printable
from vitreg.errors import ArchiveError, ImageError
from vitreg.features.observer import Observer
from vitreg.fixes.base import Fix
from vitreg.models.backbone import Backbone
from vitreg.version import __version__

T = TypeVar("T")
TRYING = "trying"  # the folder where shards are counted whose worker may die of them
_TRIES = 4
DONE = "done"  # the folder of the shards' entries: one that is there says that all files of its shard are


@dataclass(frozen=True)
class Job:
    """All that a worker needs; it travels to every one of them. The model is without its fixes."""

    vit: Backbone
    fixes: tuple[Fix, ...]
    features: tuple[str, ...]
    dtype: torch.dtype
    batch_size: int
    images: int  # per file
    data: Storage
    kind: SourceKind
    column: str | None
    out: Storage
    device: str
    threads: int


class ShardWorker:
    """Holds the model and makes one shard's files after another."""

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.threads)
        job.vit.model.to(job.device)
        for fix in job.fixes:
            fix.apply(job.vit)
        self._job = job
        self._observe = Observer(job.vit, job.features, job.dtype)

    def run(self, index: int) -> dict[str, Any]:
        """Make one shard's files and its entry; a shard that has an entry is not made again."""
        out = self._job.out
        if out.has(entry_name(index)):
            found: dict[str, Any] = json.loads(out.read(entry_name(index)))
            return found
        self._look_around()
        self._count_try(index)
        entry = self._make(index)
        out.write(entry_name(index), json.dumps(entry).encode())
        out.remove(f"{TRYING}/{index:06d}")
        return entry

    def _look_around(self) -> None:
        """Without a shared disk no photo is there, and all would count as unreadable."""
        for place in (self._job.data, self._job.out):
            if not place.fs.exists(place.path):
                raise ArchiveError(
                    f"{place.url} is not there on {socket.gethostname()}, where a worker runs. Expected a"
                    " place that all machines see: choose a shared disk or a URL."
                )

    def _count_try(self, index: int) -> None:
        """A photo that kills every worker must not do so for ever. (Ray has no such limit that lasts.)"""
        out, name = self._job.out, f"{TRYING}/{index:06d}"
        before = json.loads(out.read(name))["tries"] if out.has(name) else 0
        if before == _TRIES:
            raise ArchiveError(
                f"shard {index} has been begun {before} times, and its worker died each time. It starts with"
                f" {printable(read_shard(out, index).files[0])}. Look at the machine's memory: take fewer"
                " workers or a smaller batch size."
            )
        here = {"tries": before + 1, "host": socket.gethostname(), "pid": os.getpid()}
        out.write(name, json.dumps(here).encode())

    def _make(self, index: int) -> dict[str, Any]:
        job, watch = self._job, Stopwatch()
        shard = read_shard(job.out, index)
        failed: list[FailedImage] = []
        with (
            watch("all"),
            ThreadPoolExecutor(job.threads) as decoders,
            ThreadPoolExecutor(1) as ahead,
            ThreadPoolExecutor(1) as behind,
        ):
            parts = Parts(job.out, index, job.images, job.vit.layout.grid, watch, behind)
            found = items(job.data, job.kind, shard, job.column)
            images = self._decoded(found, failed, decoders, watch)
            batches = _batches(images, job.batch_size)
            with closing(_one_ahead(batches, ahead) if self._gains_by_threads else batches) as upcoming:
                for batch in _timed(upcoming, watch):
                    _check_grid(job.vit, batch)
                    with watch("forward"):
                        seen = self._observe(batch.pixels)
                    rows = {feature: seen[feature] for feature in job.features}
                    parts.add(*_finite(list(batch.names), rows, failed))
            parts.finish()
        return {
            "shard": index,
            "images": sum(file["rows"] for file in parts.files if file["file"].endswith(".parquet")),
            "failed": sorted(({"name": image.path, "reason": image.reason} for image in failed), key=str),
            "files": parts.files,
            "seconds": {what: round(seconds, 3) for what, seconds in watch.seconds.items()},
            "worker": {
                "host": socket.gethostname(),
                "device": job.device,
                "peak_mib": _peak_mib(),
                **_versions(),
            },
        }

    @property
    def _gains_by_threads(self) -> bool:
        """Whether there is time to fill: an accelerator's, or that of a network.

        Else the model has all cores busy, and a thread beside it costs it more than it gains.
        """
        return self._job.device != "cpu" or not self._job.data.is_local

    def _decoded(
        self,
        found: Iterator[ArchiveItem],
        failed: list[FailedImage],
        pool: ThreadPoolExecutor,
        watch: Stopwatch,
    ) -> Iterator[tuple[str, Tensor]]:
        """The good photos in order. At most a batch of them waits, or what keeps the threads busy."""
        most = self._job.batch_size if self._gains_by_threads else 2 * self._job.threads
        waiting: deque[Future[tuple[str, Tensor] | FailedImage]] = deque()

        def next_one() -> Iterator[tuple[str, Tensor]]:
            outcome = waiting.popleft().result()
            if isinstance(outcome, FailedImage):
                failed.append(outcome)
            else:
                yield outcome

        for item in found:
            waiting.append(pool.submit(self._read, item, watch))
            if len(waiting) >= most:
                yield from next_one()
        while waiting:
            yield from next_one()

    def _read(self, item: ArchiveItem, watch: Stopwatch) -> tuple[str, Tensor] | FailedImage:
        if isinstance(item, FailedImage):
            return item
        name, content = item
        data = self._job.data
        with watch("decode"):
            if isinstance(content, str):
                try:
                    content = data.child(content) if data.is_local else data.read(content)
                except Exception as error:  # each driver has its own
                    return FailedImage(name, reason(error))
            return read_item((name, content), self._job.vit.preprocess)


def _batches(images: Iterator[tuple[str, Tensor]], size: int) -> Generator[Batch, None, None]:
    while some := list(islice(images, size)):
        yield to_batch(some)


def _check_grid(vit: Backbone, batch: Batch) -> None:
    """All maps of an archive have one shape."""
    grid = vit.layout_for(batch.pixels).grid
    if grid != vit.layout.grid:
        raise ImageError(
            f"the preprocess gave {tuple(batch.pixels.shape[1:])} for {batch.names[0]}, which is a grid"
            f" of {grid} patches, not of {vit.layout.grid}. Crop to one size in the preprocess."
        )


def _one_ahead(found: Iterator[T], pool: ThreadPoolExecutor) -> Generator[T, None, None]:
    """The next one is made while the caller works on this one."""
    upcoming = pool.submit(next, found, None)
    while (item := upcoming.result()) is not None:
        upcoming = pool.submit(next, found, None)
        yield item


def _timed(found: Iterator[T], watch: Stopwatch) -> Iterator[T]:
    while True:
        with watch("waiting for photos"):
            item = next(found, None)
        if item is None:
            return
        yield item


def _finite(
    names: list[str], rows: dict[str, Tensor], failed: list[FailedImage]
) -> tuple[list[str], dict[str, Tensor]]:
    """Without the photos that have a feature which is no number, or too large a one for the dtype."""
    good = torch.ones(len(names), dtype=torch.bool)
    for feature, values in rows.items():
        finite = values.isfinite()
        if feature == "test_registers":
            finite |= values.isnan().all(-1, keepdim=True)  # places that no token took
        good &= finite.flatten(1).all(1)
    if good.all():
        return names, rows
    dtype = str(next(iter(rows.values())).dtype).removeprefix("torch.")
    why = f"its features are not finite in {dtype}"
    failed += [FailedImage(name, why) for name, fine in zip(names, good.tolist(), strict=True) if not fine]
    kept = [name for name, fine in zip(names, good.tolist(), strict=True) if fine]
    return kept, {feature: values[good] for feature, values in rows.items()}


def entry_name(index: int) -> str:
    """The file that says that a shard is done."""
    return f"{DONE}/{index:06d}.json"


def _peak_mib() -> int | None:
    """The most memory that this process has held, in MiB; None on Windows, where Python cannot tell."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak >> (20 if sys.platform == "darwin" else 10)  # bytes there, KiB elsewhere


def _versions() -> dict[str, str]:
    import PIL

    return {"vitreg": __version__, "torch": torch.__version__, "pillow": PIL.__version__}
