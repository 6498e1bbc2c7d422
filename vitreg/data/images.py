"""Photos in, batches out: folders, globs, lists and web datasets, read so that real photos survive it.

    photos = read_images("photos/", vit, batch_size=32)
    for batch in photos:                  # again and again, always the same batches
        features = vit(batch.pixels)
    print(photos.failed)                  # what could not be read, and why

A bad file is skipped and reported, and the next good one takes its place: every batch but the last is full,
whatever the number of worker processes.

Of several processes (see distributed.py) each reads every n-th batch; there, bad files make a batch smaller.
"""

import contextlib
import itertools
import pickle
import signal
import sys
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from types import TracebackType
from typing import Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from vitreg.data.batches import Batch, to_batch
from vitreg.data.cpus import usable_cpus
from vitreg.data.decoding import check_regular, decode, reason
from vitreg.data.listing import (
    FailedImage,
    is_shard,
    printable,
)
from vitreg.data.photo_sources import Item, Source, list_source
from vitreg.data.shards import shard_members
from vitreg.distributed import ALONE, Ranks
from vitreg.errors import ImageError, UnsupportedModelError
from vitreg.hooks.weights import is_sharded
from vitreg.printing import progress_bar

Preprocess = Callable[[Image.Image], Tensor]  # RGB PIL image -> float (3, h, w)


@runtime_checkable
class HasPreprocess(Protocol):
    """Anything that carries its own preprocess, such as a Backbone."""

    @property
    def preprocess(self) -> Preprocess | None: ...


_Outcome = tuple[str, Tensor] | FailedImage


_Chunk = tuple[list[Tensor], list[str | FailedImage]]


_Read = tuple[list[tuple[str, Tensor]], range, int]  # images, their places, and how many are read by now


_CHUNK = 8  # images that travel together from a worker, in one shared memory file


def read_images(
    source: Source,
    preprocess: Preprocess | HasPreprocess | None = None,
    *,
    batch_size: int = 32,
    limit: int | None = None,
    workers: int | None = None,
    strict: bool = False,
    progress: bool = False,
    ranks: Ranks = ALONE,
) -> "Images":
    """Find the images of `source` now; decode and preprocess them when the result is iterated.

    `source`, one or several of: a folder (searched recursively), a file, a glob, a .txt file with a path per
    line (relative to that file or to the current folder; # starts a comment), .tar shards
    ("x-{000..003}.tar", or a folder of shards without images), PIL images. Or one float tensor (b, 3, h, w)
    that is already preprocessed. What is left out of a folder (hidden files, links to folders that are read
    already, shards beside photos) is counted and named in a warning.

    `preprocess`: a function, or an object with a `.preprocess` such as a Backbone.
    `limit` counts good images. `workers`: processes; by default up to 4, or none for fewer than two batches.
    `strict`: the first unreadable image is an ImageError instead of a FailedImage.
    `progress`: a bar on stderr. `ranks`: the processes that share the images; each gets its own.

    Raises ImageError if there is nothing to read, MissingExtraError for braces without webdataset,
    UnsupportedModelError for `ranks` with a Backbone whose weights the processes hold together.
    """
    for name, value, least in (("batch_size", batch_size, 1), ("limit", limit, 1), ("workers", workers, 0)):
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}, but must be at least {least}.")
    if ranks.size > 1:
        _refuse_sharded(getattr(preprocess, "model", None))
    items = list_source(source)
    shards = any(isinstance(item, str) and is_shard(item) for item in items)
    if workers is None:
        few = not shards and min(len(items), limit or len(items)) < 2 * batch_size
        in_memory = not any(isinstance(item, str) for item in items)
        workers = 0 if few or in_memory else min(usable_cpus() // ranks.neighbours, 4)
    found = None if isinstance(source, Tensor) else _find_preprocess(preprocess)
    total = None if shards else len(items)
    return Images(items, found, total, batch_size, limit, workers, strict, progress, ranks)


def _refuse_sharded(model: object) -> None:
    """Processes that hold a model together must run as many passes, or they wait for each other for ever."""
    if isinstance(model, nn.Module) and any(map(is_sharded, model.parameters())):
        raise UnsupportedModelError(
            "the model is sharded over processes, so that all must run it on the same images. Read the"
            " images without `ranks`: each process then reads all of them, and all get the same result."
        )


def demo_photos() -> list[Path]:
    """The bundled photos, public domain or CC0 (see photos/SOURCES.md)."""
    return sorted(Path(str(files("vitreg.data") / "photos")).glob("*.jpg"))


@dataclass(repr=False, eq=False)
class Images:
    """What `read_images` found. Each iteration reads everything again, in the same order and batches.

    `len(images)` counts photos, not batches.

    `total`: how many files were found, good or bad; None for .tar shards, which only reading can count.
    """

    _items: list[Item]
    _preprocess: Preprocess | None
    total: int | None
    batch_size: int
    limit: int | None
    workers: int
    strict: bool
    progress: bool
    ranks: Ranks = ALONE
    _failed: list[FailedImage] = field(default_factory=list, init=False)

    def __len__(self) -> int:
        """How many photos there are, at most `limit`; those that were found to be unreadable do not count.

        Raises TypeError for .tar shards, which only reading can count.
        """
        if self.total is None:
            raise TypeError(".tar shards have no length: only reading can count their photos.")
        readable = self.total - len(self._failed)
        return readable if self.limit is None else min(readable, self.limit)

    def __bool__(self) -> bool:
        return True  # `read_images` refuses a source without photos; shards have no length

    def __repr__(self) -> str:
        found = "photos of .tar shards" if self.total is None else f"{len(self):,} photos"
        unread = f", {len(self._failed):,} unreadable" if self._failed else ""
        return f"<Images: {found}{unread}, in batches of {self.batch_size}>"

    @property
    def failed(self) -> tuple[FailedImage, ...]:
        """The unreadable images of the current or latest iteration."""
        return tuple(self._failed)

    def first(self, count: int) -> "Images":
        """The first good ones only."""
        return replace(self, limit=min(count, self.limit or count), progress=False)

    def __iter__(self) -> Iterator[Batch]:
        self._failed = []
        with contextlib.closing(self._outcomes()) as outcomes, progress_bar(self.progress) as show:
            read = self._alone(outcomes) if self.ranks.size == 1 else self._together(outcomes)
            done, start = 0, time.perf_counter()
            for some, places, done in read:
                left = self.total and self.total - len(self._failed)
                rate = f"{done / (time.perf_counter() - start or 1):.0f}/s"
                show(done, rate, min((n for n in (self.limit, left) if n is not None), default=None))
                if some:
                    yield to_batch(some, places)
        if not done:
            raise _nothing(self._failed)

    def _alone(self, outcomes: Iterator[_Outcome]) -> Iterator[_Read]:
        """Good images, as many as a batch holds; how many there were before them, and with them."""
        done, wanted = 0, itertools.islice(self._good_images(outcomes), self.limit)
        while some := list(itertools.islice(wanted, self.batch_size)):
            yield some, range(done, done + len(some)), done + len(some)
            done += len(some)

    def _good_images(self, outcomes: Iterator[_Outcome]) -> Iterator[tuple[str, Tensor]]:
        for outcome in outcomes:
            if isinstance(outcome, FailedImage):
                self._note(outcome)
            else:
                yield outcome

    def _together(self, outcomes: Iterator[_Outcome]) -> Iterator[_Read]:
        """The same of every rank's share, round by round: each learns what the others have read.

        So the images are counted, limited and complained about in their order, as by one process.
        """
        done, more = 0, True
        while more and (self.limit is None or done < self.limit):
            mine = list(itertools.islice(outcomes, self.batch_size))
            told = [outcome if isinstance(outcome, FailedImage) else None for outcome in mine]
            rounds = self.ranks.gather(told)
            more = all(len(theirs) == self.batch_size for theirs in rounds)  # the shares are consecutive
            start = done
            for rank, theirs in enumerate(rounds):
                if rank == self.ranks.rank:
                    start = done
                for failed in theirs:
                    if done == self.limit:
                        break
                    if failed is None:
                        done += 1
                    else:
                        self._note(failed)
            good = [outcome for outcome in mine if not isinstance(outcome, FailedImage)]
            some = good[: max(done - start, 0)]
            yield some, range(start, start + len(some)), done

    def _note(self, failed: FailedImage) -> None:
        self._failed.append(failed)
        if self.strict:
            raise ImageError(f"{failed.path}: {failed.reason}. Without strict it would be skipped.")

    def _outcomes(self) -> Generator[_Outcome, None, None]:
        try:
            for stacks, entries in self._start_loader():
                pixels = itertools.chain.from_iterable(stacks)
                for entry in entries:
                    yield entry if isinstance(entry, FailedImage) else (entry, next(pixels))
        except RuntimeError as error:  # nothing of ours raises it: a worker was killed, or could not start
            needs = (
                "a preprocess that can be pickled (no lambda), and in a script `if __name__ == '__main__':`"
            )
            advice = f"Pass workers=0 to do without them. Where processes are not forked they need {needs}"
            raise ImageError(f"the processes that read images failed: {reason(error)}. {advice}.") from error

    def _start_loader(self) -> Iterator[_Chunk]:
        reader = _Reader(self._items, self._preprocess, self.batch_size, self.ranks)
        random = torch.Generator()  # else each iteration would draw from the caller's random numbers
        with warnings.catch_warnings():
            # More workers than cores, and (Python >= 3.12) a fork of a process with threads: both are meant.
            # Workers run one torch thread each and take none of this process's locks.
            warnings.simplefilter("ignore")
            loader = DataLoader(
                reader, _CHUNK, num_workers=self.workers, collate_fn=_pack, generator=random,
                worker_init_fn=_leave_interrupts_to_the_parent,
            )  # fmt: skip
            try:
                return iter(loader)
            except (AttributeError, TypeError, pickle.PicklingError) as error:
                raise RuntimeError(str(error)) from error


def _find_preprocess(given: Preprocess | HasPreprocess | None) -> Preprocess:
    found = given.preprocess if isinstance(given, HasPreprocess) else given
    if found is not None:
        return found
    missing = "no preprocess was given"
    if given is not None:
        missing = f"the {type(given).__name__} was wrapped without a preprocess"
    how = "Pass a function (RGB PIL image -> float tensor (3, h, w)) to read_images, or to vitreg.wrap"
    raise ImageError(f"{missing}. {how}.")


class _Reader(IterableDataset[_Outcome]):
    """Every item in order, or one worker's share of them; failures come out as data.

    With n workers, each takes every n-th chunk. The loader asks the workers in turn, so the order stays.
    Each worker streams all bytes of a shard and decodes its share: reading is cheap, decoding is not. Of
    several ranks, each takes every n-th batch.
    """

    def __init__(
        self, items: list[Item], preprocess: Preprocess | None, batch_size: int, ranks: Ranks
    ) -> None:
        self.items = items
        self.preprocess = preprocess
        self._batch, self._ranks = batch_size, ranks

    def __iter__(self) -> Iterator[_Outcome]:
        info = get_worker_info()
        mine, n = (info.id, info.num_workers) if info else (0, 1)
        members = (_shard_members(i) if isinstance(i, str) and is_shard(i) else [i] for i in self.items)
        for i, item in enumerate(self._share(itertools.chain.from_iterable(members))):
            if i // _CHUNK % n == mine:
                yield read_item(item, self.preprocess)

    def _share(self, items: Iterator[Item]) -> Iterator[Item]:
        ranks = self._ranks
        return (item for i, item in enumerate(items) if i // self._batch % ranks.size == ranks.rank)


def read_item(item: Item, preprocess: Preprocess | None) -> _Outcome:
    """Decode and preprocess one image; whatever goes wrong comes out as a FailedImage."""
    if isinstance(item, FailedImage):
        return item
    name, content = (printable(item), item) if isinstance(item, str) else item
    try:
        pixels = content if isinstance(content, Tensor) else _prepare(decode(content, name=name), preprocess)
        return name, pixels.detach().cpu().float()
    except Exception as error:  # decoders raise what they like: SyntaxError, struct.error, MemoryError
        return FailedImage(name, reason(error))


def _prepare(image: Image.Image, preprocess: Preprocess | None) -> Tensor:
    assert preprocess is not None
    try:
        pixels = preprocess(image)
    except Exception as error:
        raise ImageError(f"the preprocess raised {type(error).__name__}: {error}") from error
    if isinstance(pixels, Tensor) and pixels.is_floating_point() and pixels.shape[:-2] == (3,):
        return pixels
    is_tensor = isinstance(pixels, Tensor)
    found = f"{pixels.dtype} {tuple(pixels.shape)}" if is_tensor else type(pixels).__name__
    raise ImageError(f"the preprocess gave {found}, but expected a float tensor (3, h, w)")


def _shard_members(path: str) -> Iterator[Item]:
    try:
        check_regular(path)
        with open(path, "rb") as stream:
            yield from shard_members(stream, path)
    except Exception as error:
        yield FailedImage(printable(path), f"the shard cannot be read any further: {reason(error)}")


def _leave_interrupts_to_the_parent(worker: int) -> None:
    """Ctrl-C reaches all processes of a terminal, but one of them tells: this one ends with it, silently.

    A parent that is interrupted while it takes an image from here leaves a broken connection.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, EOFError | ConnectionError):
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = report


def _pack(outcomes: list[_Outcome]) -> _Chunk:
    """Images of one size stacked, to travel as one; and all names and failures in order."""
    tensors = [outcome[1] for outcome in outcomes if not isinstance(outcome, FailedImage)]
    stacks = [torch.stack(list(same)) for _, same in itertools.groupby(tensors, lambda pixels: pixels.shape)]
    return stacks, [outcome if isinstance(outcome, FailedImage) else outcome[0] for outcome in outcomes]


def _nothing(failed: list[FailedImage]) -> ImageError:
    first = "; ".join(f"{image.path}: {image.reason}" for image in failed[:3])
    what = f"none of {len(failed)} images could be read: {first}" if failed else "no image found"
    return ImageError(f"{what}. Expected images that Pillow can read (.jpg, .png, .webp, ...).")
