"""A billion images, without one: the arithmetic of docs/archive.md, and a small simulation that checks it.

    python benchmarks/archive_simulation.py

1. Storage: real files with random features of a small number of images, per token choice and dtype; their
   bytes per image against the formula.
2. The books: a plan of 100,000 tar shards is written and read, their entries are written (as an extraction
   leaves them), and the driver's own functions list and gather them: what a restart and the manifest cost.
3. Ray: as many shards that need no work, through the very call that hands out real ones: what Ray costs.
4. A fleet: shards over workers that die at a given rate, event by event; the work that is lost and the time
   at the end when some workers have nothing to do, against the formula.

Nothing here runs a model, and nothing has run on a GPU: images per second and GPU are an assumption.
"""

import argparse
import heapq
import json
import random
import resource
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vitreg.archive.manifest import Extraction, finished
from vitreg.archive.plan import ArchiveSettings, read_shard, write_or_check_plan
from vitreg.archive.ray_engine import hand_out, ray_session
from vitreg.archive.shard_files import Parts
from vitreg.archive.sources import Archive
from vitreg.archive.stopwatch import Stopwatch
from vitreg.archive.storage import Storage
from vitreg.archive.worker import DONE

IMAGES = 10**9
MODELS = {  # width, patches at 224 px, registers, blocks
    "ViT-B/16": (768, 196, 4, 12),
    "ViT-L/14": (1024, 256, 4, 24),
    "ViT-g/14": (1536, 256, 4, 40),
}
PHOTO = 110e3  # bytes of an encoded one: the mean of ImageNet's


def bytes_per_image(width: int, patches: int, registers: int, size: int) -> dict[str, int]:
    """The formula: numbers times their size."""
    tokens = {"cls": 1, "cls,mean": 2, "cls,mean,registers": 2 + registers, "cls,mean,patches": 2 + patches}
    return {name: width * count * size for name, count in tokens.items()}


def written(width: int, patches: int, tokens: str, dtype: torch.dtype, images: int) -> float:
    """Bytes per image of the files that a shard of `images` leaves, names of 30 letters included."""
    rows = {"cls": (width,), "mean": (width,), "registers": (4, width), "patches": (patches, width)}
    grid = (int(patches**0.5), patches // int(patches**0.5))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as pool:
        parts = Parts(Storage.at(folder), 0, 10**9, grid, Stopwatch(), pool)
        Path(folder, "vectors").mkdir()
        Path(folder, "patches").mkdir()
        names = [f"{i:010d}.tar/{i:020d}.jpg" for i in range(images)]
        parts.add(names, {name: torch.randn(images, *rows[name]).to(dtype) for name in tokens.split(",")})
        parts.finish()
        return sum(file["bytes"] for file in parts.files) / images


def storage() -> None:
    print("bytes per image on disk / by the formula; terabytes for 10^9 images")
    for model, (width, patches, registers, _) in MODELS.items():
        for dtype in (torch.float16, torch.float32):
            for tokens, expected in bytes_per_image(width, patches, registers, dtype.itemsize).items():
                found = written(width, patches, tokens, dtype, 128 if "patches" in tokens else 1024)
                kind = str(dtype).removeprefix("torch.")
                print(
                    f"  {model} {kind} {tokens}: {found:,.0f} / {expected:,} = {found / expected:.3f};"
                    f" {found * IMAGES / 1e12:,.1f} TB"
                )


def compute(sustained: float) -> None:
    """Operations: 24 d^2 for each token and block (projections and MLP), 4 n d for its attention."""
    print(f"at {sustained / 1e12:.0f} TFLOP/s sustained (an assumption):")
    for model, (width, patches, _, depth) in MODELS.items():
        tokens = patches + 1
        operations = depth * tokens * (24 * width**2 + 4 * tokens * width)
        rate = sustained / operations
        print(
            f"  {model}: {operations / 1e9:.0f} GFLOP per image, {rate:,.0f} images/s and GPU,"
            f" {IMAGES / rate / 3600:,.0f} GPU-hours for 10^9; reads {rate * PHOTO / 1e6:,.0f} MB/s, writes"
            f" {rate * width * 4 / 1e6:,.1f} MB/s (cls,mean)"
            f" or {rate * width * (2 + patches) * 2 / 1e6:,.0f} MB/s (with patches)"
        )


def books(shards: int, images: int) -> None:
    settings = ArchiveSettings(
        "m", "w", "none", (224, 224), "float32", "p", {"cls": (1024,)}, "float16", 64, 1024, None
    )
    with tempfile.TemporaryDirectory() as folder:
        out = Storage.at(folder)
        out.make(DONE)
        archive = Archive(Storage.at("/archive"), "tar", {f"{i:06d}.tar": 10**9 for i in range(shards)})
        plan = partial(write_or_check_plan, out, settings, archive)
        print(f"{shards:,} tar shards: plan written in {timed(plan):.1f} s")
        print(f"  checked again at a restart in {timed(plan):.1f} s")
        print(f"  one worker finds its shard in {timed(lambda: read_shard(out, shards // 2)) * 1e3:.0f} ms")
        files = [
            {"file": f"vectors/000000-{part:03d}.parquet", "rows": 1024, "bytes": 2 << 20}
            for part in range(10)
        ]
        failed = [{"name": f"000000.tar/{i:09d}.jpg", "reason": "image file is truncated"} for i in range(10)]
        worker = {
            "host": "h",
            "device": "cuda",
            "peak_mib": 1000,
            "vitreg": "0",
            "torch": "2",
            "pillow": "11",
        }
        entry = {"images": images // shards, "failed": failed, "files": files, "seconds": {"all": 10.0}}
        for index in range(shards):
            text = json.dumps({"shard": index, **entry, "worker": worker})
            (Path(folder) / f"done/{index:06d}.json").write_text(text, encoding="utf-8")
        print(f"  finished shards listed in {timed(lambda: finished(out)):.1f} s")
        done = finished(out)
        print(f"  gathered into a manifest in {timed(lambda: Extraction.gather(out, done)):.1f} s", end="")
        print(f" (one failure in a thousand; {peak_mib()} MiB)")


class Idle:
    """A worker that has nothing to do."""

    def __init__(self, argument: object) -> None:
        pass

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        return {"entry": [json.dumps({"shard": int(batch["item"][0])})]}


def hand_outs(shards: int) -> None:
    with ray_session(2):
        list(hand_out(Idle, None, range(100), 2, 1, 0))  # warm
        began = time.perf_counter()
        found = sorted(entry["shard"] for entry in hand_out(Idle, None, range(shards), 2, 1, 0))
        seconds = time.perf_counter() - began
    assert found == list(range(shards))
    print(
        f"{shards:,} empty shards through Ray Data and two workers: {seconds:.0f} s; driver {peak_mib()} MiB"
    )


def fleet(shards: int, seconds: float, workers: int, mtbf_hours: float, start: float) -> None:
    """Each worker dies at random, once in `mtbf_hours`; its shard is begun again after `start` seconds."""
    runs = [one_fleet(shards, seconds, workers, mtbf_hours, start, seed) for seed in range(10)]
    hours, deaths, lost, idle = (statistics.fmean(values) for values in zip(*runs, strict=True))
    expected = (seconds / 2 + start) / (mtbf_hours * 3600)
    print(
        f"  {shards:,} shards of {seconds:.0f} s, {workers} workers, one death in {mtbf_hours:.0f} h each:"
        f" {hours:.2f} h, {deaths:.0f} deaths, lost {lost:.2%} (formula {expected:.2%}),"
        f" idle at the end {idle:.2%}"
    )


def one_fleet(
    shards: int, seconds: float, workers: int, mtbf_hours: float, start: float, seed: int
) -> tuple[float, int, float, float]:
    """(hours, deaths, share of work that is lost, share of the workers' time that is idle at the end)."""
    random_ = random.Random(seed)
    free = [(start, worker) for worker in range(workers)]
    heapq.heapify(free)
    left, lost, deaths, ends = shards, 0.0, 0, []
    while left:
        now, worker = heapq.heappop(free)
        dies = random_.expovariate(1 / (mtbf_hours * 3600))
        if dies < seconds:  # from here on: exponential times have no memory
            lost, deaths = lost + dies + start, deaths + 1
            heapq.heappush(free, (now + dies + start, worker))
            continue
        left -= 1
        ends.append(now + seconds)
        heapq.heappush(free, (now + seconds, worker))
    end = max(ends)
    idle = sum(max(0.0, end - now) for now, _ in free) / (workers * end)
    return end / 3600, deaths, lost / (shards * seconds), idle


def timed(run: object) -> float:
    began = time.perf_counter()
    run()  # type: ignore[operator]
    return time.perf_counter() - began


def peak_mib() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak >> (20 if sys.platform == "darwin" else 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument(
        "--rate", type=float, default=1000, help="images per second and worker: an assumption"
    )
    args = parser.parse_args()
    books(args.shards, IMAGES)
    hand_outs(args.shards)
    storage()
    compute(100e12)
    print(f"{args.rate:.0f} images/s and worker:")
    seconds = IMAGES / args.shards / args.rate
    for workers, mtbf in ((64, 24.0), (64, 2.0), (512, 2.0)):
        fleet(args.shards, seconds, workers, mtbf, start=60)
    fleet(args.shards // 100, seconds * 100, 64, 2.0, start=60)


if __name__ == "__main__":
    main()
