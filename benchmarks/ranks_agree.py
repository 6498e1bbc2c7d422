"""Whether several processes find what one finds: the JSON of each command, compared.

    python benchmarks/ranks_agree.py MODEL PHOTOS [--ranks 2 3] [--limit N] [--eval TASK=DATA ...]

Runs diagnose, fix and verify on the photos, and the tasks on their data, by one process and under torchrun.
Prints how many values were compared, how many of them differ where they may not (anything but a float), and
the largest difference of floats, relative to values above 1 and absolute below.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("model")
    options.add_argument("photos")
    options.add_argument("--ranks", type=int, nargs="+", default=[2, 3])
    options.add_argument("--limit")
    options.add_argument("--eval", action="append", default=[], metavar="TASK=DATA")
    options.add_argument("--only", nargs="+", metavar="COMMAND", help="diagnose, fix, verify or tasks")
    asked = options.parse_args()
    limit = ["--limit", asked.limit] if asked.limit else []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        commands = {
            "diagnose": ["diagnose", asked.model, asked.photos, *limit],
            "fix": ["fix", asked.model, asked.photos, "-o", "FIX", *limit],
            "verify": ["verify", asked.model, str(folder / "fix-1"), asked.photos, *limit],
        }
        for task, data in (text.split("=", 1) for text in asked.eval):
            commands[task] = ["eval", task, asked.model, data, "--no-cache", *limit]
        print(f"{'':22}{'processes':>10}{'seconds':>9}{'values':>9}{'differ':>8}{'floats by':>11}")
        for what, command in commands.items():
            if asked.only and what not in asked.only:
                continue
            compare(what, command, asked.ranks, folder)


def compare(what: str, command: list[str], ranks: list[int], folder: Path) -> None:
    alone, seconds = run(what, command, 1, folder)
    print(f"{what:22}{1:10}{seconds:9.0f}{len(alone):9}", flush=True)
    for size in ranks:
        found, seconds = run(what, command, size, folder)
        if [name for name, _ in found] != [name for name, _ in alone]:
            print(f"{what:22}{size:10}{seconds:9.0f}   other fields", flush=True)
            continue
        exact, largest = 0, 0.0
        for (name, a), (_, b) in zip(alone, found, strict=True):
            if isinstance(a, float) and isinstance(b, float):
                if a != b and not (a != a and b != b):
                    largest = max(largest, abs(a - b) / max(abs(a), 1))
            elif a != b:
                exact += 1
                print(f"  {name}: {a!r} and {b!r}")
        print(f"{what:22}{size:10}{seconds:9.0f}{len(found):9}{exact:8}{largest:11.1e}", flush=True)


def run(what: str, command: list[str], size: int, folder: Path) -> tuple[list[tuple[str, Any]], float]:
    """The leaves of the JSON that a command writes, and how long it took."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    before = [sys.executable] if size == 1 else launcher
    out = folder / f"{what}-{size}.json"
    told = [str(folder / f"fix-{size}") if part == "FIX" else part for part in command]
    start = time.perf_counter()
    done = subprocess.run(
        [*before, "-m", "vitreg", *told, "--json", str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{what} with {size} processes failed:\n{done.stderr[-2000:]}")
    return list(leaves(json.loads(out.read_text(encoding="utf-8")))), time.perf_counter() - start


def leaves(value: Any, name: str = "") -> Any:
    if isinstance(value, dict):
        for key, part in value.items():
            yield from leaves(part, f"{name}.{key}")
    elif isinstance(value, list):
        for i, part in enumerate(value):
            yield from leaves(part, f"{name}[{i}]")
    else:
        yield name, value


if __name__ == "__main__":
    main()
