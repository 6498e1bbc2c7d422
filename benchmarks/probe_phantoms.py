"""Position and reconstruction probes where the truth is known: outliers planted in a model that has none.

    python benchmarks/probe_phantoms.py MODEL PHOTOS --limit 400
    python benchmarks/probe_phantoms.py MODEL PHOTOS --plant 5 --layer 8

The same places of the same photos are read in four models: as it was, planted, and planted with each of two
fixes. "Outliers" are the places that the diagnosis of the planted model finds, also in the model as it was.

What DeiT-Ti shows, planted in block 5, 400 photos: right behind the planted block (--layer 6) outliers probe
worse for both, and both fixes bring position back and pixels nearly. After the last block position still is
worse; reconstruction is not, for by then the tokens of these flat patches hold few pixels anyway. And a probe
of their own reads more from planted outliers than from the same places before: what they hold is hidden from
a probe of all patches, and not lost.
"""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

import vitreg
from vitreg.data.evenly_spaced import evenly_spaced
from vitreg.data.listing import photos_in
from vitreg.evals import Metric, position, reconstruction
from vitreg.evals.probes import PatchConfig, drawn_patches
from vitreg.evals.result import written
from vitreg.fixes import Fix, TestTimeRegisters, TokenSplitting
from vitreg.search.register_neurons import find_register_neurons

PLANTED_ON = 100  # photos; also what the fixes are made from


def planted(vit: vitreg.Backbone, photos: Path, layer: int) -> tuple[vitreg.Backbone, dict[str, Fix]]:
    """A phantom, and its fixes."""
    paths = photos_in(photos)
    some = [paths[i] for i in evenly_spaced(len(paths), PLANTED_ON)]
    images = [batch.pixels for batch in vitreg.read_images(some, vit, batch_size=50)]
    phantom = vitreg.plant(vit, images, layer).vit
    neurons = find_register_neurons(phantom, images, vitreg.diagnose(phantom, images))
    return phantom, {
        "test-time register": TestTimeRegisters(neurons),
        "token splitting": TokenSplitting.calibrate(phantom, images, neurons),
    }


def probed(
    vit: vitreg.Backbone, phantom: vitreg.Backbone, data: Path, config: PatchConfig
) -> dict[str, Metric]:
    """The metrics of both probes, at the phantom's outliers."""
    train, test, _ = drawn_patches(vit, data, config, marking=phantom)
    return position.measured(train, test)[0] | reconstruction.measured(vit, train, test, config)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("photos", type=Path)
    parser.add_argument("--plant", type=int, default=5, help="block of the planted neurons, 0-based")
    parser.add_argument("--layer", type=int, help="tokens after this block, default: the last")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--patches", type=int, default=64)
    parser.add_argument("--cache", type=Path)
    args = parser.parse_args()
    config = PatchConfig(patches=args.patches, layer=args.layer, limit=args.limit, cache=args.cache)
    vit = vitreg.load(args.model)
    phantom, fixes = planted(vit, args.photos, args.plant)
    found = {"as it was": probed(vit, phantom, args.photos, config)}
    found["planted"] = probed(phantom, phantom, args.photos, config)
    for name, fix in fixes.items():
        with fix.applied_to(phantom):
            found[name] = probed(phantom, phantom, args.photos, config)
    table = Table("", *found, title=phantom.name)
    for row in found["planted"]:
        table.add_row(row, *(_written(side.get(row)) for side in found.values()))
    Console(width=180).print(table)
    changes = Table("difference, same photos", *list(found)[1:])
    for row in found["planted"]:
        base = found["as it was"].get(row)
        sides = [side.get(row) for name, side in found.items() if name != "as it was"]
        changes.add_row(row, *(_change(base, side) for side in sides))
    Console(width=180).print(changes)


def _written(metric: Metric | None) -> str:
    return "" if metric is None else written(metric.estimate(), metric.format)


def _change(base: Metric | None, side: Metric | None) -> str:
    return "" if base is None or side is None else written(side.less(base), "+" + side.format)


if __name__ == "__main__":
    main()
