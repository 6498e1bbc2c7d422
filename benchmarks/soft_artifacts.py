"""What norms can tell of soft artifacts, and how many patches carry their direction: by block and size.

    python benchmarks/soft_artifacts.py MODEL PHOTOS --sizes 224 448 --markdown docs/soft-artifacts.md

A second population of norms needs a gain of 12 per 1000 patches to count, 4.8 where its direction is
clear (vitreg.diagnosis.judging). The direction is that of the largest 1% of the norms, each over its photo's
own, less that of patches below the median. A patch carries it that goes more than half as far along it as
these do.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

import vitreg
from vitreg.diagnosis.bins import NORMS
from vitreg.diagnosis.populations import Population, second_population
from vitreg.diagnosis.statistics import ordinary_norm
from vitreg.models.probe import evaluating

LARGEST = 0.01  # of the norms
HEADS = ("size", "block", "gain, norms", "gain, relative", "second population", "one direction", "carry it")


@dataclass(frozen=True)
class Row:
    """One block at one size.

    `absolute` and `relative` are what two populations of norms gain per 1000 patches, `share` is the second
    one's; `shared` says how far the largest norms share a direction, `carry` how many patches have it.
    """

    size: int
    block: int
    absolute: float
    relative: float
    share: float
    shared: float
    carry: float

    def __str__(self) -> str:
        return (
            f"| {self.size} px | {self.block} | {self.absolute:.1f} | {self.relative:.1f} |"
            f" {self.share:.1%} | {self.shared:.2f} | {self.carry:.1%} |"
        )


def row(size: int, block: int, patches: Float[Tensor, "b p d"]) -> Row:
    norms = patches.norm(dim=-1)
    relative = norms / ordinary_norm(norms)
    ordinary = patches[norms < norms.median()].mean(0)
    largest = patches[relative > relative.flatten().kthvalue(int((1 - LARGEST) * relative.numel())).values]
    excess = largest.mean(0) - ordinary
    along = (patches - ordinary) @ excess / excess.square().sum()
    absolute = _population(norms)
    return Row(
        size,
        block,
        _gain(absolute, norms),
        _gain(_population(relative), norms),
        absolute.share if absolute is not None else 0.0,
        float(excess.square().sum() / (largest - ordinary).square().sum(-1).mean()),
        float((along > 0.5).float().mean()),
    )


def _population(norms: Tensor) -> Population | None:
    counts = torch.bincount(NORMS.index(norms).flatten(), minlength=NORMS.count)
    return second_population(counts, NORMS.edges, needed=0)


def _gain(population: Population | None, norms: Tensor) -> float:
    return 1000 * population.gain / norms.numel() if population is not None else 0.0


def rows(model: str, photos: list[Path], size: int) -> list[Row]:
    vit = vitreg.load(model, size=size)
    stream: list[Tensor] = []
    with evaluating(vit.model), vitreg.trace(vit, residuals=True, norms=False) as t:
        for batch in vitreg.read_images(photos, vit):
            vit(batch.pixels)
            stream.append(t.residuals[:, :, t.layout.patch_slice].half())
    return [row(size, block, patches.float()) for block, patches in enumerate(torch.cat(stream, 1))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("photos", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 448])
    parser.add_argument("--limit", type=int, default=100, help="photos, evenly spread")
    parser.add_argument("--markdown", type=Path, help="also write the table here")
    args = parser.parse_args()
    photos = sorted(args.photos.iterdir())
    some = photos[:: max(len(photos) // args.limit, 1)][: args.limit]
    lines = [f"| {' | '.join(HEADS)} |", "|---" * len(HEADS) + "|"]
    for size in args.sizes:
        lines += map(str, rows(args.model, some, size))
    text = "\n".join([f"{len(some)} photos, {Path(args.model).name}:", "", *lines, ""])
    print(text)
    if args.markdown:
        args.markdown.write_text(f"{HEADER}\n{text}", encoding="utf-8")


HEADER = """# Why soft artifacts are harder to see at a larger size

`python benchmarks/soft_artifacts.py MODEL PHOTOS --sizes 224 448 --markdown docs/soft-artifacts.md`

Norms are what an outlier is defined by. `gain`: twice the log-likelihood that a second population of norms
adds, per 1000 patches, in the norms themselves and over each photo's own; 12 are needed, or 4.8 where a
direction is as clear as 0.8. `second population`: its share of the patches. `one direction`: how far the
largest 1% of the norms share one, of 1. `carry it`: patches that go more than half as far along it.
"""


if __name__ == "__main__":
    main()
