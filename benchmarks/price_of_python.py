"""What a fix costs in Python: extra time per block and pass, at batch 1 on a model of tiny width.

    python benchmarks/price_of_python.py [--depth 12] [--rounds 200]

Where a GPU waits for Python, this is the whole price of a fix. Each round runs the plain and the fixed model
one after the other; the table gives the median of the differences, in microseconds of CPU time per block that
the fix changes. A block "edited" has neurons, one that "carries" only passes registers on.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from timm.models.vision_transformer import VisionTransformer

import vitreg
from vitreg.fixes import AttentionBias, Fix, TestTimeRegisters
from vitreg.neurons import RegisterNeurons


def fixes(depth: int, heads: int, channels: int) -> dict[str, tuple[Fix, int]]:
    """Each fix, and how many blocks it changes."""
    everywhere = RegisterNeurons.of({layer: [0, 5] for layer in range(depth)})
    one = {name: torch.zeros(depth, heads, channels) for name in ("keys", "values")}
    return {
        "one register, each block edited": (TestTimeRegisters(everywhere), depth),
        "one register, each block carries": (TestTimeRegisters(RegisterNeurons.of({})), depth),
        "four registers, each block edited": (TestTimeRegisters(everywhere, registers=4), depth),
        "attention bias, each block edited": (AttentionBias(everywhere, one), depth),
    }


def seconds(run: Callable[[], object], passes: int) -> float:
    start = time.process_time()
    for _ in range(passes):
        run()
    return (time.process_time() - start) / passes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--passes", type=int, default=5, help="per model and round")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = VisionTransformer(32, patch_size=16, embed_dim=16, depth=args.depth, num_heads=2).eval()
    vit = vitreg.wrap(model, image_size=32)
    image = torch.zeros(1, 3, 32, 32)
    table = Table(title=f"{args.depth} blocks of width 16, batch 1, {args.rounds} rounds")
    for heading in ("fix", "plain, us per block", "extra, us per block"):
        table.add_column(heading, justify="right")
    with torch.inference_mode():
        for name, (fix, blocks) in fixes(args.depth, 2, 8).items():
            extra, base = [], []
            for _ in range(args.rounds):
                plain = seconds(lambda: model(image), args.passes)
                with fix.applied_to(vit):
                    model(image)
                    fixed = seconds(lambda: model(image), args.passes)
                base.append(plain)
                extra.append(fixed - plain)
            table.add_row(
                name,
                f"{statistics.median(base) / args.depth * 1e6:.0f}",
                f"{statistics.median(extra) / blocks * 1e6:.0f}",
            )
    Console().print(table)


if __name__ == "__main__":
    main()
