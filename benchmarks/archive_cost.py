"""What `vitreg features` costs beside a bare loop: decode, forward, nothing else, over the same files.

    python benchmarks/archive_cost.py MODEL PHOTOS [--rounds 3] [--tokens cls,mean,patches]
    python benchmarks/archive_cost.py --memory

In each round the bare loop runs in this process, then `extract_archive` with one worker, as many threads and
the same batch size, on a Ray that is already there. Two ratios of throughputs, to the bare loop of the same
round: of the worker at work, and with its start. Medians over rounds, so that a machine whose speed drifts
changes both.

`--memory`: the most that driver and worker ever hold, over 100 and 10,000 small drawn photos in tar shards
and a tiny random model.
"""

import argparse
import io
import os
import resource
import statistics
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import vitreg
from vitreg.archive.ray_engine import ray_session
from vitreg.data.decoding import decode
from vitreg.models.probe import evaluating


def bare_loop(vit: vitreg.Backbone, paths: Sequence[Path], batch_size: int) -> tuple[float, float, float]:
    """(seconds, of them decoding, of them in the model) of the loop that everyone writes first."""
    decoding = forward = 0.0
    began = time.perf_counter()
    with evaluating(vit.model), torch.no_grad():
        for start in range(0, len(paths), batch_size):
            then = time.perf_counter()
            pixels = torch.stack([vit.preprocess(decode(str(p))) for p in paths[start : start + batch_size]])
            decoding += time.perf_counter() - then
            then = time.perf_counter()
            vit(pixels)
            forward += time.perf_counter() - then
    return time.perf_counter() - began, decoding, forward


def memory() -> None:
    import timm

    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    vit = vitreg.wrap(timm.create_model("vit_tiny_patch16_224", **sizes).eval())
    with tempfile.TemporaryDirectory() as folder, ray_session(1):
        for count in (100, 10_000):
            root = Path(folder, str(count))
            root.mkdir()
            for start in range(0, count, 2000):
                draw(root / f"{start:06d}.tar", range(start, min(count, start + 2000)))
            tokens, out = ["cls", "mean", "patches"], root.with_suffix(".features")
            found = vitreg.extract_archive(vit, root, out, tokens=tokens, workers=1, shard_images=500)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
            print(
                f"{found.images:,} photos: worker {found.workers[0]['peak_mib']} MiB, driver {peak} MiB,"
                f" {found.bytes / 1e6:.1f} MB written"
            )


def draw(path: Path, numbers: range) -> None:
    """Small noise pictures in a tar shard."""
    with tarfile.open(path, "w") as file:
        for number in numbers:
            noise, buffer = (
                np.random.default_rng(number).integers(0, 256, (40, 40, 3), np.uint8),
                io.BytesIO(),
            )
            Image.fromarray(noise).save(buffer, "png")
            info = tarfile.TarInfo(f"{number:06d}.png")
            info.size = buffer.tell()
            buffer.seek(0)
            file.addfile(info, buffer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("photos", type=Path, nargs="?")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--tokens", default="cls,mean")
    args = parser.parse_args()
    if args.memory:
        memory()
        return
    torch.set_num_threads(os.cpu_count() or 1)
    vit = vitreg.load(args.model)
    paths = sorted(path for path in args.photos.iterdir() if path.is_file())
    bare_loop(vit, paths[:64], args.batch_size)
    working, whole = [], []
    with tempfile.TemporaryDirectory() as folder, ray_session(1):
        for number in range(args.rounds):
            seconds, decoding, forward = bare_loop(vit, paths, args.batch_size)
            print(f"bare loop: {seconds:.1f} s (decode {decoding:.1f}, forward {forward:.1f})")
            began = time.perf_counter()
            found = vitreg.extract_archive(
                vit, args.photos, f"{folder}/{number}", tokens=args.tokens.split(","), workers=1,
                batch_size=args.batch_size,
            )  # fmt: skip
            total = time.perf_counter() - began
            working.append(seconds / found.seconds["all"])
            whole.append(seconds / total)
            print(f"features: {found.seconds['all']:.1f} s at work, {total:.1f} s with the worker's start")
            print(f"  {found.limits()}; {found.workers[0]['peak_mib']} MiB")
    rate = statistics.median(working)
    print(f"{len(paths)} photos, {args.tokens}: throughput at work {rate:.2f}x the bare loop's")
    print(f"with the start of the worker: {statistics.median(whole):.2f}x")


if __name__ == "__main__":
    main()
