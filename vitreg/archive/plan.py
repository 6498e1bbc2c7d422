"""What is to be done, written down before it begins, so that a restart does the very same.

`plan.json` holds the settings that the features depend on, `plan.parquet` the shards. Both stay as they are
for as long as the folder exists; a run with other settings, or of an archive that has changed, is refused.
"""

import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from vitreg.archive.sources import Archive, Shard
from vitreg.archive.storage import Storage
from vitreg.data.decoding import reason
from vitreg.errors import ArchiveError

FORMAT = 1  # of the folder: raised whenever the meaning of a file changes
DOCUMENT, SHARDS = "plan.json", "plan.parquet"
_GROUP = 64  # shards that a worker reads to find its own


@dataclass(frozen=True)
class ArchiveSettings:
    """All that the features depend on beside the photos. `model` is its name; what counts is `weights`."""

    model: str
    weights: str
    fix: str
    image_size: tuple[int, int]
    precision: str
    preprocess: str
    features: dict[str, tuple[int, ...]]  # {name: shape of one photo}
    dtype: str
    batch_size: int
    shard_images: int
    column: str | None


def write_or_check_plan(out: Storage, settings: ArchiveSettings, archive: Archive) -> int:
    """Write the plan, or check that the one which is there is the same. Returns the number of shards.

    Raises ArchiveError, which names what differs, and OutputError.
    """
    if not out.has(DOCUMENT):
        return _write(out, settings, archive)
    try:
        document = json.loads(out.read(DOCUMENT))
        number, before, shards = document["format"], document["settings"], int(document["shards"])
    except (ValueError, KeyError, TypeError) as error:
        raise ArchiveError(
            f"{out.url}/{DOCUMENT} is damaged: {reason(error)}. Choose another folder."
        ) from error
    if number != FORMAT:
        raise ArchiveError(
            f"{out.url} has format {number}, this version writes {FORMAT}. Choose another folder."
        )
    now = json.loads(json.dumps(asdict(settings)))
    names = [name for name in now if name != "model" and before.get(name) != now[name]]
    if names:
        named = ["model", *names] if before["model"] != now["model"] else names
        differences = "; ".join(
            f"{name} was {_short(before.get(name))}, is {_short(now[name])}" for name in named
        )
        raise ArchiveError(
            f"{out.url} holds features made with other settings: {differences}. Choose another folder, or the"
            " same settings."
        )
    if changes := _changes(_files(out), archive.files):
        raise ArchiveError(
            f"{archive.place.url} is not the archive that {out.url} was begun with: {changes}. Choose another"
            " folder, or bring the archive back to what it was."
        )
    return shards


def read_shard(out: Storage, index: int) -> Shard:
    """One shard of the plan; only its part of the file is read."""
    import pyarrow.parquet as pq

    with out.open(SHARDS) as file:
        group = pq.ParquetFile(file).read_row_group(index // _GROUP)
    row = group.slice(index % _GROUP, 1).to_pylist()[0]
    return Shard(row["shard"], tuple(row["files"]), row["first"], row["groups"], row["row"])


def _write(out: Storage, settings: ArchiveSettings, archive: Archive) -> int:
    shards, content = _to_parquet(archive.shards(settings.shard_images), archive.files)
    out.write(SHARDS, content)
    document = {
        "format": FORMAT,
        "settings": asdict(settings),
        "data": archive.place.url,
        "kind": archive.kind,
        "files": len(archive.files),
        "bytes": sum(archive.files.values()),
        "shards": shards,
    }
    out.write(DOCUMENT, json.dumps(document, indent=1).encode())
    return shards


def _to_parquet(shards: Iterator[Shard], sizes: dict[str, int]) -> tuple[int, bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = pa.list_(pa.string())
    columns = {
        "shard": pa.int64(), "files": names, "bytes": pa.list_(pa.int64()), "first": pa.int64(),
        "groups": pa.int64(), "row": pa.int64(),
    }  # fmt: skip
    buffer, count = io.BytesIO(), 0
    with pq.ParquetWriter(buffer, pa.schema(columns.items())) as writer:
        while some := list(islice(shards, _GROUP)):
            rows = [
                {
                    "shard": s.index, "files": list(s.files), "bytes": [sizes[name] for name in s.files],
                    "first": s.first, "groups": s.groups, "row": s.row,
                }
                for s in some
            ]  # fmt: skip
            writer.write_table(pa.Table.from_pylist(rows, writer.schema), row_group_size=_GROUP)
            count += len(some)
    return count, buffer.getvalue()


def _files(out: Storage) -> dict[str, int]:
    import pyarrow.parquet as pq

    with out.open(SHARDS) as file:
        table = pq.read_table(file, columns=["files", "bytes"])
    names, sizes = (table[name].combine_chunks().flatten().to_pylist() for name in ("files", "bytes"))
    return dict(zip(names, sizes, strict=True))


def _changes(before: dict[str, int], now: dict[str, int]) -> str:
    kinds = {
        "new": now.keys() - before.keys(),
        "gone": before.keys() - now.keys(),
        "of another size": {name for name in now.keys() & before.keys() if now[name] != before[name]},
    }
    return "; ".join(f"{len(names)} {kind} ({_first(names)})" for kind, names in kinds.items() if names)


def _first(names: Iterable[str]) -> str:
    return min(names)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
