"""What a fixed model's forward pass costs beside the plain one, and finding neurons beside a plain pass.

    python benchmarks/fix_cost.py                          # DINOv2-L shapes, random weights, CPU, bfloat16
    python benchmarks/fix_cost.py --sizes 224 --compile --rounds 7
    python benchmarks/fix_cost.py --device cuda --batch 64 --sizes 518

45 random neurons in 6 layers (17: 17, 16: 9, 15: 9, 14: 8, 13: 1, 12: 1, as the paper found in DINOv2-L).
Splitting forks 2% of the patches, and leaves room for 1.5 times as many. In each round every variant runs
over the same batch, one after the other, so that a machine whose speed drifts changes all of them; the table
gives the median of the per-round ratios to plain.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from rich.console import Console
from rich.table import Table

import vitreg
from vitreg.fixes.neurons import RegisterNeuron, RegisterNeurons
from vitreg.models.probe import evaluating
from vitreg.search.register_neurons import find_register_neurons

LAYERS = {12: 1, 13: 1, 14: 8, 15: 9, 16: 9, 17: 17}
FORKED = 0.02


def chosen_neurons(vit: vitreg.Backbone, images: torch.Tensor) -> RegisterNeurons:
    """Random neurons, those of the first layer with thresholds that FORKED of the patches pass."""
    generator = torch.Generator().manual_seed(0)
    with evaluating(vit.model), vitreg.trace(vit, neurons=True, layers=[min(LAYERS)]) as t:
        vit(images)
    patches = t.neurons[0][:, t.layout.patch_slice].float().flatten(0, 1)
    found = []
    for layer, count in LAYERS.items():
        for index in torch.randperm(vit.anatomy.neurons, generator=generator)[:count].tolist():
            values = patches[:, index]
            level = float(values.kthvalue(round((1 - FORKED) * len(values))).values)
            found.append(RegisterNeuron(layer, index, threshold=level if layer == min(LAYERS) else 1e6))
    return RegisterNeurons(tuple(found))


def variants(neurons: RegisterNeurons) -> dict[str, vitreg.Fix | None]:
    return {
        "plain": None,
        "test-time register": vitreg.TestTimeRegisters(neurons),
        "4 test-time registers": vitreg.TestTimeRegisters(neurons, registers=4),
        "token splitting": vitreg.TokenSplitting(neurons, capacity=1.5 * FORKED),
    }


def timed(run: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def forward_costs(args: argparse.Namespace, size: int, compiled: bool) -> list[tuple[str, float, float]]:
    """(variant, median seconds per image, median of the rounds' ratios to plain)."""
    vit = vitreg.load(args.model, size=size, random_weights=True, device=args.device, dtype=args.dtype)
    images = torch.rand(args.batch, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images = images.to(vit.device, vit.dtype)
    seconds: dict[str, list[float]] = {}
    fixes = variants(chosen_neurons(vit, images))
    wanted = {name: fix for name, fix in fixes.items() if fix is None or not args.only or name in args.only}
    models = {name: fix.bake(vit.model) if fix else vit.model for name, fix in wanted.items()}
    if compiled:
        models = {name: torch.compile(model, fullgraph=True) for name, model in models.items()}
    with torch.no_grad():
        for round_ in range(-args.warm_up, args.rounds):
            for name, model in models.items():
                gc.collect()
                taken = timed(partial(model, images), args.device)
                if round_ >= 0:
                    seconds.setdefault(name, []).append(taken)
    plain = seconds["plain"]
    return [
        (
            name,
            statistics.median(taken) / args.batch,
            statistics.median(a / b for a, b in zip(taken, plain, strict=True)),
        )
        for name, taken in seconds.items()
    ]


def search_costs(args: argparse.Namespace, size: int) -> float:
    """Median ratio of finding 45 neurons to a plain pass over the same batches.

    The search ends each pass at the detect layer; to time the worst case that is the last one here.
    """
    vit = vitreg.load(args.model, size=size, random_weights=True, device=args.device, dtype=args.dtype)
    batches = [torch.rand(args.batch, 3, size, size) * 2 - 1 for _ in range(args.batches)]
    report = vitreg.diagnose(vit, batches[:1])
    norm = report.layers[-1].p99_norm  # as if 1% were outliers
    report = replace(
        report,
        verdict="artifacts",
        threshold=norm,
        onset_layer=max(LAYERS),
        detect_layer=len(report.layers) - 1,
    )

    def plain() -> None:
        with evaluating(vit.model):
            for batch in batches:
                vit(batch)

    ratios = []
    for _ in range(args.rounds):
        base = timed(plain, args.device)
        search = timed(lambda: find_register_neurons(vit, batches, report, top_k=45), args.device)
        ratios.append(search / base)
    return statistics.median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="timm:vit_large_patch14_dinov2")
    parser.add_argument("--sizes", type=int, nargs="*", default=[224, 518])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--batches", type=int, default=4, help="of the search")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warm-up", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="under torch.compile(fullgraph=True)")
    parser.add_argument("--only", nargs="*", help="only these variants, beside plain")
    parser.add_argument("--search", action="store_true", help="also time finding neurons")
    args = parser.parse_args()
    threads = torch.get_num_threads()
    how = "torch.compile" if args.compile else "eager"
    title = f"{args.model}, {args.dtype}, {args.device}, {threads} threads, batch {args.batch}, {how}"
    table = Table(title=title)
    for heading in ("image", "variant", "s/image", "ratio to plain"):
        table.add_column(heading, justify="right")
    for size in args.sizes:
        for name, seconds, ratio in forward_costs(args, size, args.compile):
            table.add_row(f"{size} px", name, f"{seconds:.4f}", f"{ratio:.3f}")
        if args.search:
            table.add_row(f"{size} px", "finding 45 neurons, one pass", "", f"{search_costs(args, size):.3f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
