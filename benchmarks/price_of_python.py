"""What a fix costs in Python: extra time per block and pass, at batch 1 on a model of tiny width.

    python benchmarks/price_of_python.py [--depth 12] [--rounds 200]

Where a GPU waits for Python, this is the whole price of a fix. Each round runs the plain and the fixed model
one after the other; the table gives the median of the differences, in microseconds of CPU time per block that
the fix changes. A block "edited" has neurons, one that "carries" only passes registers on. The first two rows
are floors: an edit that does nothing, and the tensor calls alone that put a register in and take it out.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import vitreg
from vitreg.fixes import AttentionBias, Fix, TestTimeRegisters
from vitreg.fixes.neurons import RegisterNeurons
from vitreg.hooks.block_edit import BlockEdit, install, uninstall

WIDTH = 16


class Nothing(BlockEdit):
    """What it costs that a block has an edit."""

    def run(self, block: Any, inner: Any, x: Tensor, args: Any, kwargs: Any) -> Tensor:
        y: Tensor = inner(x, args, kwargs)
        return y


class InAndOut(BlockEdit):
    """The least that a register takes: it is put in before the block, and kept and taken out behind it."""

    register = torch.zeros(1, 1, WIDTH)

    def run(self, block: Any, inner: Any, x: Tensor, args: Any, kwargs: Any) -> Tensor:
        before, after = x.split((1, x.shape[1] - 1), 1)
        y = inner(torch.cat((before, self.register, after), 1), args, kwargs)
        before, register, after = y.split((1, 1, y.shape[1] - 2), 1)
        self.kept = register.clone()
        return torch.cat((before, after), 1)


@contextmanager
def edited(vit: vitreg.Backbone, make: Callable[[], BlockEdit]) -> Iterator[None]:
    """Each block with an edit of its own."""
    edits = [(block, make()) for block in vit.anatomy.block_modules(vit.model)]
    for block, edit in edits:
        edit.stream = vit.anatomy.stream
        install(block, edit)
    yield
    for block, edit in edits:
        uninstall(block, edit)


def changes(vit: vitreg.Backbone) -> dict[str, Callable[[], AbstractContextManager[Any]]]:
    """What is done to every block of a model, by the name of its row."""
    depth, heads, channels = vit.anatomy.depth, vit.anatomy.heads, WIDTH // vit.anatomy.heads
    everywhere = RegisterNeurons.of({layer: [0, 5] for layer in range(depth)})
    one = {name: torch.zeros(depth, heads, channels) for name in ("keys", "values")}
    fixes: dict[str, Fix] = {
        "one register, block carries": TestTimeRegisters(RegisterNeurons.of({})),
        "one register, block edited": TestTimeRegisters(everywhere),
        "four registers, block edited": TestTimeRegisters(everywhere, registers=4),
        "attention bias, block edited": AttentionBias(everywhere, one),
    }
    return {
        "an edit that does nothing": lambda: edited(vit, Nothing),
        "a register in and out": lambda: edited(vit, InAndOut),
    } | {name: partial(fix.applied_to, vit) for name, fix in fixes.items()}


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
    model = VisionTransformer(32, patch_size=16, embed_dim=WIDTH, depth=args.depth, num_heads=2).eval()
    vit = vitreg.wrap(model, image_size=32)
    image = torch.zeros(1, 3, 32, 32)
    table = Table(title=f"{args.depth} blocks of width {WIDTH}, batch 1, {args.rounds} rounds")
    for heading in ("fix", "plain, us per block", "extra, us per block"):
        table.add_column(heading, justify="right")
    with torch.inference_mode():
        for name, change in changes(vit).items():
            extra, base = [], []
            for _ in range(args.rounds):
                plain = seconds(lambda: model(image), args.passes)
                with change():
                    model(image)
                    fixed = seconds(lambda: model(image), args.passes)
                base.append(plain)
                extra.append(fixed - plain)
            table.add_row(
                name,
                f"{statistics.median(base) / args.depth * 1e6:.0f}",
                f"{statistics.median(extra) / args.depth * 1e6:.0f}",
            )
    Console().print(table)


if __name__ == "__main__":
    main()
