"""What a diagnosis costs beside plain forward passes over the same images: time and memory, as ratios.

    python benchmarks/diagnosis_cost.py                # DINOv2-L shapes, random weights, CPU
    python benchmarks/diagnosis_cost.py --sizes 224 --dtype float32 --rounds 5

Time: in each round every variant runs over the same batches, one after the other, so that a machine whose
speed drifts changes all of them; the table gives medians over rounds and the median of the per-round
ratios. Memory: peak resident size, after the model is built, of a fresh process that diagnoses 50 images
and of one that diagnoses 500 (Linux).
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import vitreg
from vitreg.models.probe import evaluating


class Noise:
    """`count` batches of noise images, made anew each time they are asked for, so that none is held."""

    def __init__(self, count: int, batch: int, size: int) -> None:
        self.count, self.batch, self.size = count, batch, size

    def __iter__(self) -> Iterator[torch.Tensor]:
        for seed in range(self.count):
            generator = torch.Generator().manual_seed(seed)
            yield torch.rand(self.batch, 3, self.size, self.size, generator=generator) * 2 - 1


def plain(vit: vitreg.Backbone, images: Noise) -> None:
    with evaluating(vit.model):
        for batch in images:
            vit(batch)


def diagnosed(vit: vitreg.Backbone, images: Noise) -> None:
    vitreg.diagnose(vit, images)


def cls_attention(vit: vitreg.Backbone, images: Noise) -> None:
    with evaluating(vit.model), vitreg.trace(vit, attention="cls") as t:
        for batch in images:
            vit(batch)
            assert len(t.attention) == vit.anatomy.depth


VARIANTS: dict[str, Callable[[vitreg.Backbone, Noise], None]] = {
    "plain forward": plain,
    "full diagnosis": diagnosed,
    "CLS attention, all layers": cls_attention,
}


def measure_time(args: argparse.Namespace, size: int) -> list[tuple[str, float, float]]:
    """(variant, median seconds per image, median ratio to the plain forward of the same round)."""
    vit = vitreg.load(args.model, size=size, random_weights=True, device=args.device, dtype=args.dtype)
    images = Noise(args.batches, args.batch, size)
    plain(vit, Noise(1, args.batch, size))  # warm-up
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(args.rounds):
        for name, run in VARIANTS.items():
            start = time.perf_counter()
            run(vit, images)
            if args.device != "cpu":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    base = seconds["plain forward"]
    return [
        (
            name,
            statistics.median(taken) / (args.batches * args.batch),
            statistics.median(a / b for a, b in zip(taken, base, strict=True)),
        )
        for name, taken in seconds.items()
    ]


def peak_memory(args: argparse.Namespace, images: int) -> float:
    """Peak resident MiB of a fresh process that diagnoses this many images."""
    options = ["--model", args.model, "--dtype", args.dtype, "--peak-of", str(images)]
    run = subprocess.run([sys.executable, __file__, *options], check=True, capture_output=True, text=True)
    return float(run.stdout.strip().splitlines()[-1])


def forget_peak() -> None:
    """Let the kernel measure this process's peak memory from now on (Linux)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def peak_since() -> float:
    """Peak resident MiB since `forget_peak`."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="timm:vit_large_patch14_dinov2")
    parser.add_argument("--sizes", type=int, nargs="*", default=[224, 518])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", type=int, nargs=2, default=[50, 500], help="0 0 leaves it out")
    parser.add_argument("--peak-of", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        vit = vitreg.load(args.model, size=224, random_weights=True, dtype=args.dtype)
        forget_peak()  # that of building the model
        vitreg.diagnose(vit, Noise(args.peak_of // 10, 10, 224))
        print(peak_since())
        return
    console = Console()
    table = Table(title=f"{args.model}, {args.dtype}, {args.device}, {torch.get_num_threads()} threads")
    for heading in ("image", "variant", "s/image", "ratio to plain"):
        table.add_column(heading, justify="right")
    for size in args.sizes:
        for name, seconds, ratio in measure_time(args, size):
            table.add_row(f"{size} px", name, f"{seconds:.3f}", f"{ratio:.3f}")
    if args.sizes:
        console.print(table)
    few, many = args.memory
    if many:
        low, high = peak_memory(args, few), peak_memory(args, many)
        ratio = f"{high / low:.3f}x"
        console.print(f"peak memory: {low:.0f} MiB over {few} images, {high:.0f} MiB over {many}: {ratio}")


if __name__ == "__main__":
    main()
