"""One function that turns photos into features, and keeps them on disk.

    found = extract_features(vit, paths, ["cls", "patches"], Config(cache=folder), preprocess)
    found["cls"]                      # (n, d)
    for patches in found.each("patches"): ...

Features are computed under whatever fix is applied, and cached in files of 64 photos each, written whole or
not at all: an interrupted run goes on where it stopped, and a changed photo costs 64 photos.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from vitreg.data.evenly_spaced import evenly_spaced
from vitreg.data.images import Preprocess, read_images
from vitreg.data.listing import FailedImage, printable
from vitreg.distributed import Ranks
from vitreg.errors import DataError, ImageError
from vitreg.features.config import Config
from vitreg.features.keys import model_key, preprocess_key
from vitreg.features.observer import FEATURES, Observer
from vitreg.files import write_atomically
from vitreg.models.backbone import Backbone
from vitreg.provenance import digest, file_key

_CHUNK = 64  # photos per cached file


_FORMAT = 1  # of the cached files: raised whenever a feature's meaning changes


Split = Callable[[Tensor], Tensor]  # an image (3, h, w) -> its windows (w, 3, h, w)


@runtime_checkable
class _Rows(Protocol):
    """One chunk: tensors named "feature/position", and "failed/position" with the reason."""

    def get_tensor(self, name: str) -> Tensor: ...
    def keys(self) -> Sequence[str]: ...


@dataclass(frozen=True, eq=False)
class Features:
    """What was kept of each photo that could be read.

    `index` (n,) are the photos' positions in the list that was asked for, `failed` those left out, and why.
    """

    index: tuple[int, ...]
    failed: tuple[FailedImage, ...]
    _places: tuple[int, ...]  # the same photos among those that were run
    _chunks: dict[int, _Rows]

    def __len__(self) -> int:
        return len(self.index)

    def of(self, name: str, i: int) -> Tensor:
        """A feature of the i-th photo that could be read."""
        position = self._places[i]
        return self._chunks[position // _CHUNK].get_tensor(f"{name}/{position}")

    def each(self, name: str) -> Iterator[Tensor]:
        """A feature of each photo in turn."""
        return (self.of(name, i) for i in range(len(self)))

    def __getitem__(self, name: str) -> Tensor:
        """A feature of all photos (n, ...), where their shapes agree."""
        return torch.stack(list(self.each(name)))

    def notes(self) -> tuple[str, ...]:
        """What a reader of the result must know: which photos could not be read."""
        if not self.failed:
            return ()
        named = "; ".join(f"{image.path}: {image.reason}" for image in self.failed[:5])
        return (f"{len(self.failed)} photos could not be read: {named}",)


def extract_features(
    vit: Backbone,
    paths: Sequence[Path],
    wanted: Sequence[str],
    config: Config | None = None,
    preprocess: Preprocess | None = None,
    split: Split | None = None,
    dtype: torch.dtype = torch.float32,
) -> Features:
    """Run the model over photos and keep the `wanted` features (see `Observer` for their names).

    `preprocess` overrides the backbone's own; photos may have different sizes. `split`, a dataclass, cuts a
    preprocessed photo into windows (w, 3, h, w): features then have a first axis w. Photos that cannot be
    read are left out and named in `failed`. Raises ImageError if none can be read.
    """
    config = config or Config()
    preprocess = preprocess or vit.preprocess
    if preprocess is None:
        raise ImageError(f"{vit.name} was wrapped without a preprocess. Pass one to vitreg.wrap.")
    if unknown := [name for name in wanted if not Observer.knows(name)]:
        raise ValueError(f"no feature is called {unknown[0]!r}: expected some of {', '.join(FEATURES)}.")
    if len(set(paths)) < len(paths):
        raise ValueError("found a photo twice in the list, but expected each once.")
    chosen = evenly_spaced(len(paths), config.limit)
    common = (model_key(vit), preprocess_key(preprocess), split, sorted(wanted), dtype, torch.__version__)
    store = _Store(config.cache, digest(_FORMAT, *common), [paths[i] for i in chosen])
    if missing := store.missing(config.ranks):
        _Extraction(Observer(vit, wanted, dtype), split, config, store).run(missing, preprocess)
    store.put_together(config.ranks)
    return store.features(chosen)


@dataclass
class _Store:
    """The chunks of one list of photos, in files named by all that their content depends on, or in memory."""

    folder: Path | None
    key: str
    paths: list[Path]
    files: list[Path] = field(default_factory=list)  # of the chunks, in order
    chunks: dict[int, _Rows] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for start in range(0, len(self.paths), _CHUNK):
            photos = [file_key(path) for path in self.paths[start : start + _CHUNK]]
            self.files.append(self.folder / f"{digest(self.key, start, photos)}.safetensors")
        self.chunks = {i: _opened(file) for i, file in enumerate(self.files) if file.exists()}

    def missing(self, ranks: Ranks) -> list[int]:
        """Positions of the photos in chunks that are not there yet, and that fall to this rank."""
        missing = (i for i in range(len(self.paths)) if i // _CHUNK not in self.chunks)
        return [i for i in missing if i // _CHUNK % ranks.size == ranks.rank]

    def put_together(self, ranks: Ranks) -> None:
        """The chunks of all ranks: from the files, which each of them must see, or from memory."""
        if ranks.size == 1:
            return
        if self.folder is None:
            for theirs in ranks.gather(self.chunks):
                self.chunks |= theirs
            return
        ranks.gather("written")
        for chunk, file in enumerate(self.files):
            if not file.exists():
                raise DataError(
                    f"process {ranks.rank} does not see features that another one wrote to {self.folder}."
                    " Give --cache a folder that all machines share, or --no-cache."
                )
            self.chunks[chunk] = self.chunks.get(chunk) or _opened(file)

    def put(self, chunk: int, rows: dict[str, Tensor]) -> None:
        if self.folder is None:
            self.chunks[chunk] = _InMemory(rows)
            return
        from safetensors.torch import save

        write_atomically(self.files[chunk], save(rows))
        self.chunks[chunk] = _opened(self.files[chunk])

    def features(self, chosen: list[int]) -> Features:
        """All of them; `chosen` are the positions of the paths in a longer list."""
        index: set[int] = set()
        failed: dict[int, FailedImage] = {}
        for rows in self.chunks.values():
            for key in rows.keys():  # noqa: SIM118 - no mapping
                name, _, position = key.rpartition("/")
                if name == "failed":
                    reason = bytes(rows.get_tensor(key).tolist()).decode()
                    failed[int(position)] = FailedImage(str(self.paths[int(position)]), reason)
                else:
                    index.add(int(position))
        if not index:
            first = "; ".join(f"{image.path}: {image.reason}" for image in list(failed.values())[:3])
            raise ImageError(
                f"none of {len(self.paths)} photos could be read: {first or 'the list is empty'}."
            )
        places = tuple(sorted(index))
        unread = tuple(failed[i] for i in sorted(failed))
        return Features(tuple(chosen[i] for i in places), unread, places, self.chunks)


def _opened(place: Path) -> _Rows:
    from safetensors import safe_open

    return safe_open(place, "pt")  # mapped into memory, read on demand


@dataclass
class _InMemory:
    rows: dict[str, Tensor]

    def get_tensor(self, name: str) -> Tensor:
        return self.rows[name]

    def keys(self) -> Sequence[str]:
        return list(self.rows)


@dataclass
class _Extraction:
    """Photos of any size -> batches of windows of one size -> rows of features, chunk by chunk."""

    observer: Observer
    split: Split | None
    config: Config
    store: _Store
    _waiting: list[tuple[int, Tensor]] = field(default_factory=list)  # (position, windows)
    _rows: dict[int, dict[str, Tensor]] = field(default_factory=dict)  # by chunk

    def run(self, missing: list[int], preprocess: Preprocess) -> None:
        """Compute and store the chunks that these positions make up."""
        paths = [self.store.paths[i] for i in missing]
        position = {printable(str(path)): i for path, i in zip(paths, missing, strict=True)}
        images = read_images(
            paths, preprocess, batch_size=1, workers=self.config.workers, progress=self.config.progress
        )
        chunks = sorted({i // _CHUNK for i in missing})
        try:
            for image in images:
                i = position[image.names[0]]
                while chunks[0] < i // _CHUNK:
                    self._finish(chunks.pop(0), images.failed, position)
                self._add(i, image.pixels[0])
        except ImageError:
            if len(images.failed) < len(paths):
                raise
        for chunk in chunks:
            self._finish(chunk, images.failed, position)

    def _add(self, position: int, pixels: Tensor) -> None:
        windows = self.split(pixels) if self.split else pixels[None]
        if self._waiting and self._waiting[0][1].shape[1:] != windows.shape[1:]:
            self._flush()
        self._waiting.append((position, windows))
        if sum(len(windows) for _, windows in self._waiting) >= self.config.batch_size:
            self._flush()

    def _flush(self) -> None:
        if not self._waiting:
            return
        everything = torch.cat([windows for _, windows in self._waiting])
        parts = [self.observer(part) for part in everything.split(self.config.batch_size)]
        for name in parts[0]:
            values = torch.cat([part[name] for part in parts])
            for (position, _), rows in zip(
                self._waiting, values.split([len(w) for _, w in self._waiting]), strict=True
            ):
                kept = rows if self.split else rows[0]
                self._rows.setdefault(position // _CHUNK, {})[f"{name}/{position}"] = kept.clone()
        self._waiting.clear()

    def _finish(self, chunk: int, failed: tuple[FailedImage, ...], position: dict[str, int]) -> None:
        self._flush()
        rows = self._rows.pop(chunk, {})
        for image in failed:
            if position[image.path] // _CHUNK == chunk:
                reason = torch.tensor(list(image.reason.encode()), dtype=torch.uint8)
                rows[f"failed/{position[image.path]}"] = reason
        self.store.put(chunk, rows)
