"""Discovery and segmentation with known truth: artifacts planted in a real model's weights, then fixed.

    python benchmarks/dense_phantoms.py MODEL VOCdevkit/VOC2012 camvid --photos PHOTOS
    python benchmarks/dense_phantoms.py MODEL VOCdevkit/VOC2012 camvid --photos PHOTOS --rate 0.1 --norm 50

Each figure is followed by the paired difference to the unplanted model and its 95% interval over images.
"""

import argparse
import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import vitreg
from vitreg.data.evenly_spaced import evenly_spaced
from vitreg.data.listing import photos_in
from vitreg.evals import Result, differences
from vitreg.evals.discovery import DiscoveryConfig
from vitreg.evals.discovery import evaluate as discover
from vitreg.evals.result import written
from vitreg.evals.segmentation import SegmentationConfig
from vitreg.evals.segmentation import evaluate as segment
from vitreg.fixes import Fix, TestTimeRegisters, TokenSplitting

PLANTED_ON = 100  # photos; the fixes are made from them too

Versions = dict[str, tuple[vitreg.Backbone, Fix | None]]


def versions(vit: vitreg.Backbone, photos: Path, layer: int, rate: float, norm: float) -> Versions:
    """The model as it was, planted, and planted with each fix; the neurons are found, not told."""
    paths = photos_in(photos)
    some = [paths[i] for i in evenly_spaced(len(paths), PLANTED_ON)]
    images = [batch.pixels for batch in vitreg.read_images(some, vit, batch_size=50)]
    phantom = vitreg.plant(vit, images, layer, rate=rate, norm=norm)
    neurons = vitreg.find_register_neurons(phantom.vit, images, vitreg.diagnose(phantom.vit, images))
    print(f"planted in block {layer}: {sorted(phantom.neurons)}, {phantom.rate:.1%} of patches,", end=" ")
    print(f"{phantom.norm:.0f}x norms; found: {neurons.by_layer}\n")
    return {
        "as it was": (vit, None),
        "planted": (phantom.vit, None),
        "planted, one register": (phantom.vit, TestTimeRegisters(neurons)),
        "planted, calibrated registers": (
            phantom.vit,
            TestTimeRegisters.calibrate(phantom.vit, images, neurons),
        ),
        "planted, splitting": (phantom.vit, TokenSplitting.calibrate(phantom.vit, images, neurons)),
    }


def measured(vit: vitreg.Backbone, args: argparse.Namespace) -> Iterator[Result]:
    """Both methods of discovery, on keys and values; segmentation."""
    common = {"cache": args.cache, "workers": 0}
    for features in ("keys", "values"):
        for settings in ({}, {"centre": True}, {"normalise": True, "bias": -0.325}):
            yield discover(vit, args.voc, DiscoveryConfig(features=features, **settings, **common))
    yield segment(vit, args.camvid, SegmentationConfig(ignore=11, **common))


def title(result: Result, metric: str) -> str:
    changed = {k: v for k, v in result.config.items() if k in ("features", "centre", "bias") and v}
    return metric + "".join(f", {v if k == 'features' else f'{k} {v}'}" for k, v in changed.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("voc", type=Path)
    parser.add_argument("camvid", type=Path)
    parser.add_argument("--photos", type=Path, required=True, help="what artifacts are planted on")
    parser.add_argument("--plant", type=int, default=5, help="block of the planted neurons, 0-based")
    parser.add_argument("--rate", type=float, default=0.05)
    parser.add_argument("--norm", type=float, default=30.0)
    parser.add_argument("--own", metavar="FIX", help="a fix for the model's own artifacts, always applied")
    parser.add_argument("--cache", type=Path)
    args = parser.parse_args()
    found: dict[str, list[Result]] = {}
    vit = vitreg.load(args.model)
    own = vitreg.load_fix(args.own) if args.own else None
    compared = versions(vit, args.photos, args.plant, args.rate, args.norm)
    if own is not None and own.type == "splitting":
        del compared["planted, splitting"]  # there is one splitting at a time
    for name, (version, fix) in compared.items():
        with contextlib.ExitStack() as stack, warnings.catch_warnings():
            warnings.simplefilter("ignore", vitreg.FixWarning)  # the phantom has other weights
            for one in (fix, own):
                if one is not None:
                    stack.enter_context(one.applied_to(version))
            found[name] = list(measured(version, args))
    clean = found["as it was"]
    print(f"| | {' | '.join(found)} |\n" + "|---" * (len(found) + 1) + "|")
    for i, result in enumerate(clean):
        for metric, one in result.metrics.items():
            if metric in ("CorLoc of the whole photo", "pixel accuracy, former outliers"):
                continue
            cells = [f"{one.value:{one.format}}"]
            for results in list(found.values())[1:]:
                change = differences(result, results[i])[metric]
                cells.append(
                    f"{results[i].metrics[metric].value:{one.format}} ({written(change, '+' + one.format)})"
                )
            print(f"| {title(result, metric)} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
