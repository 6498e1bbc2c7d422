"""What object discovery costs beside the model's forward passes.

    python benchmarks/discovery_cost.py MODEL VOCdevkit/VOC2012
    python benchmarks/discovery_cost.py MODEL VOCdevkit/VOC2012 --set normalise=true --set bias=sweep

In each round the model runs alone over the preprocessed photos; then the whole task runs, with no cache: it
reads annotations and photos, runs the model, LOST and TokenCut, and scores the boxes. The ratio of the two
is the median over rounds, so that a machine whose speed drifts changes both.

    python benchmarks/discovery_cost.py MODEL VOCdevkit/VOC2012 --sizes 640x480 1600x1200 4000x3000

Seconds and peak memory of either method by itself, on the features of one photo that is enlarged to each
size; or, where a forward pass would take too long (--enlarge features), of its features, enlarged.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import vitreg
from vitreg.config.settings import with_settings
from vitreg.data.datasets.boxes import boxed_photos
from vitreg.data.decoding import decode
from vitreg.evals.discovery import DiscoveryConfig, evaluate, prepared
from vitreg.evals.lost import Found, Grid, lost
from vitreg.evals.tokencut import tokencut
from vitreg.features.any_size import at_any_size
from vitreg.features.extraction import extract_features
from vitreg.features.framing import Framing, normalisation_of
from vitreg.models.probe import evaluating


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def forward_passes(vit: vitreg.Backbone, photos: Sequence[Tensor]) -> None:
    with evaluating(vit.model), torch.no_grad():
        for pixels in photos:
            vit(pixels[None])


def by_size(vit: vitreg.Backbone, args: argparse.Namespace, config: DiscoveryConfig) -> None:
    path = boxed_photos(args.data, config.split).paths[0]
    print("| photo | patches | method | seconds | MiB that it added | found |\n|---|---|---|---|---|---|")
    for size in args.sizes:
        width, height = map(int, size.split("x"))
        grid = tuple(
            -(-side // patch) for side, patch in zip((height, width), vit.anatomy.patch_size, strict=True)
        )
        found = features_at(vit, path, grid, args.enlarge == "features", config)
        for name, method in (("LOST", lost), ("TokenCut", tokencut)):
            # In a process of its own, whose peak is then the method's.
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                taken, peak, box = pool.apply(measured, (method, found, grid, args.threads))
            print(f"| {size} | {len(found)} | {name} | {taken:.1f} | {peak} | {box} |", flush=True)


def features_at(
    vit: vitreg.Backbone, path: Path, grid: tuple[int, ...], enlarge: bool, config: DiscoveryConfig
) -> Tensor:
    """The features (p, d) of a photo on this grid: of the enlarged photo, or enlarged themselves."""
    height, width = (n * side for n, side in zip(grid, vit.anatomy.patch_size, strict=True))
    own = vit.image_size if enlarge else (height, width)
    framing = Framing(normalisation_of(vit), size=own)
    run = vit if enlarge else at_any_size(vit)
    extracted = extract_features(run, [path], [config.features], replace(config, cache=None), framing)
    features = extracted.of(config.features, 0)
    if enlarge:
        small = vit.anatomy.layout(own).grid
        maps = features.T.reshape(1, -1, *small).float()
        features = F.interpolate(maps, grid, mode="bicubic")[0].flatten(1).T.contiguous()
    return prepared(features, config)


def measured(
    method: Callable[..., Found], features: Tensor, grid: Grid, threads: int
) -> tuple[float, int, Any]:
    torch.set_num_threads(threads)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # Linux: the peak is measured from now on
    before, start = memory("VmRSS"), time.perf_counter()
    found = method(features, grid)
    return time.perf_counter() - start, memory("VmHWM") - before, tuple(found.box)


def memory(what: str) -> int:
    """Of this process, in MiB (Linux)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition(f"{what}:")[2].split()[0]) >> 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sizes", nargs="+", metavar="WIDTHxHEIGHT")
    parser.add_argument("--enlarge", choices=["photo", "features"], default="photo")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    settings = dict(pair.split("=", 1) for pair in args.set)
    config = with_settings(DiscoveryConfig(workers=0), settings)
    vit = vitreg.load(args.model)
    if args.sizes:
        by_size(vit, args, config)
        return
    anywhere = at_any_size(vit)
    framing = Framing(normalisation_of(vit), patch=vit.anatomy.patch_size)
    photos = [framing(decode(str(path))) for path in boxed_photos(args.data, config.split).paths]
    forward_passes(anywhere, photos[:2])
    plain, whole = [], []
    for _ in range(args.rounds):
        plain.append(seconds(lambda: forward_passes(anywhere, photos)))
        whole.append(seconds(lambda: evaluate(vit, args.data, config)))
        print(f"forward {plain[-1]:.2f} s, discovery {whole[-1]:.2f} s, ratio {whole[-1] / plain[-1]:.2f}")
    ratios = [all_of_it / forward for all_of_it, forward in zip(whole, plain, strict=True)]
    print(f"{len(photos)} photos at native size, {args.model}: median ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
