"""What object discovery costs beside the model's forward passes.

    python benchmarks/discovery_cost.py MODEL VOCdevkit/VOC2012
    python benchmarks/discovery_cost.py MODEL VOCdevkit/VOC2012 --set normalise=true --set bias=sweep

In each round the model runs alone over the preprocessed photos; then the whole task runs, with no cache: it
reads annotations and photos, runs the model, LOST and TokenCut, and scores the boxes. The ratio of the two
is the median over rounds, so that a machine whose speed drifts changes both.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import vitreg
from vitreg.decoding import decode
from vitreg.evals.datasets.boxes import boxed_photos
from vitreg.evals.discovery import DiscoveryConfig, evaluate
from vitreg.evals.framing import Framing, normalisation_of
from vitreg.evals.resizing import at_any_size
from vitreg.probe import evaluating
from vitreg.settings import with_settings


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def forward_passes(vit: vitreg.Backbone, photos: Sequence[Tensor]) -> None:
    with evaluating(vit.model), torch.no_grad():
        for pixels in photos:
            vit(pixels[None])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    settings = dict(pair.split("=", 1) for pair in args.set)
    config = with_settings(DiscoveryConfig(workers=0), settings)
    vit = vitreg.load(args.model)
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
