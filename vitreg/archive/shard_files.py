"""The files of one shard, written while the next photos run.

A part is `vectors/SHARD-PART.parquet` and, with patches, `patches/SHARD-PART.safetensors`: row i of both is
the same photo. It is closed at so many photos or bytes, so that memory does not grow with the shard.
"""

import io
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vitreg.archive.stopwatch import Stopwatch
from vitreg.archive.storage import Storage

VECTORS, PATCHES = "vectors", "patches"
_MOST_BYTES = 256 << 20


class Parts:
    """Takes rows, writes files. `grid` (gh, gw) is the shape of the dense maps."""

    def __init__(
        self,
        out: Storage,
        shard: int,
        images: int,
        grid: tuple[int, int],
        watch: Stopwatch,
        pool: ThreadPoolExecutor,
    ) -> None:
        self.files: list[dict[str, Any]] = []  # {file, rows, bytes}
        self._out, self._shard, self._most, self._grid = out, shard, images, grid
        self._watch, self._pool = watch, pool
        self._names: list[str] = []
        self._rows: list[dict[str, Tensor]] = []
        self._bytes = 0
        self._part = 0
        self._writing: Future[None] | None = None

    def add(self, names: list[str], rows: dict[str, Tensor]) -> None:
        """Rows {feature: (b, ...)} of b photos."""
        for i, name in enumerate(names):
            if len(self._names) >= self._most or self._bytes >= _MOST_BYTES:
                self._close()
            self._names.append(name)
            self._rows.append({feature: values[i] for feature, values in rows.items()})
            self._bytes += sum(values[i].nbytes for values in rows.values())

    def finish(self) -> None:
        """Wait until all is written. Raises OutputError, also of earlier parts."""
        if self._names:
            self._close()
        if self._writing:
            self._writing.result()

    def _close(self) -> None:
        if self._writing:
            with self._watch("waiting for the disk"):
                self._writing.result()
        self._writing = self._pool.submit(
            self._write, f"{self._shard:06d}-{self._part:03d}", self._names, self._rows
        )
        self._names, self._rows, self._bytes = [], [], 0
        self._part += 1

    def _write(self, part: str, names: list[str], rows: list[dict[str, Tensor]]) -> None:
        with self._watch("write"):
            dense = [name for name in rows[0] if name.partition("@")[0] == "patches"]
            if dense:
                content = _to_safetensors({name: [row[name] for row in rows] for name in dense}, self._grid)
                self._put(f"{PATCHES}/{part}.safetensors", content, len(names))
            vectors = {name: [row[name] for row in rows] for name in rows[0] if name not in dense}
            self._put(f"{VECTORS}/{part}.parquet", _to_parquet(names, vectors), len(names))

    def _put(self, name: str, content: bytes, rows: int) -> None:
        self._out.write(name, content)
        self.files.append({"file": name, "rows": rows, "bytes": len(content)})


def _to_safetensors(maps: dict[str, list[Tensor]], grid: tuple[int, int]) -> bytes:
    from safetensors.torch import save

    stacked = {name: torch.stack(rows).unflatten(1, grid).contiguous() for name, rows in maps.items()}
    return bytes(save(stacked))


def _to_parquet(names: list[str], vectors: dict[str, list[Tensor]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {"name": pa.array(names)}
    for feature, rows in vectors.items():
        columns[feature] = _vectors(torch.stack(rows)) if rows[0].dim() == 1 else _lists(rows)
    buffer = io.BytesIO()
    # Features do not repeat and hardly compress: a dictionary or a codec would only cost time.
    pq.write_table(pa.table(columns), buffer, compression="none", use_dictionary=False)
    return buffer.getvalue()


def _vectors(rows: Float[Tensor, "n d"]) -> Any:
    """Lists of fixed size."""
    import pyarrow as pa

    return pa.FixedSizeListArray.from_arrays(pa.array(rows.flatten().numpy()), rows.shape[-1])


def _lists(rows: list[Tensor]) -> Any:
    """(r, d) each -> a list of vectors per photo; places that no token took (all NaN) are left out."""
    import pyarrow as pa

    kept = [row[~row.isnan().all(-1)] for row in rows]
    ends = torch.tensor([0, *(len(row) for row in kept)]).cumsum(0).to(torch.int32)
    return pa.ListArray.from_arrays(pa.array(ends.numpy()), _vectors(torch.cat(kept)))
