"""What the power study tries: clean streams of patches, populations put into them, tails forced on them.

stream = clean_stream(shared, "DeiT-Ti", 96)
inject(stream, Injection(size=3, spread=0.2, share=0.02), seed=0)       # (residuals, truth)
TAILS["pareto 3"](stream, rng)                                          # (b, p) factors of the norms
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

import vitreg
from vitreg.diagnosis.statistics import Collector, Statistics
from vitreg.models.backbone import Backbone
from vitreg.models.layout import TokenLayout
from vitreg.models.probe import evaluating
from vitreg.tracing.records import trace

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from catalog import randomise, timm_model
from phantoms import crops

BATCH = 32
# The real models' blocks before their own artifacts, and the block after which populations are put in.
REAL = {
    "DeiT-Ti": ("deit_tiny_patch16_224", 6, 3),
    "ViT-Ti": ("vit_tiny_patch16_224.augreg_in21k_ft_in1k", 5, 2),
}
RANDOM = {
    "random ViT": "vit_small_patch16_224",
    "random DINOv2": "vit_small_patch14_dinov2",
    "random SigLIP": "vit_base_patch16_siglip_224",
}
RANDOM_SIZE = {"img_size": 112, "patch_size": 8, "embed_dim": 96, "depth": 3, "num_heads": 4}
# Residual dimensions of the vector that is injected; crops of the bundled photos to draw from.
DIMENSIONS, POOL = 3, 512


@dataclass(frozen=True)
class Stream:
    """A model without artifacts, its photos, and the residual stream (b, n, d) after block `layer`."""

    name: str
    vit: Backbone
    photos: Float[Tensor, "b 3 h w"]
    layer: int
    residuals: Float[Tensor, "b n d"]

    @property
    def layout(self) -> TokenLayout:
        return self.vit.layout

    @property
    def patches(self) -> Float[Tensor, "b p d"]:
        return self.residuals[:, self.layout.patch_slice]

    @property
    def brightness(self) -> Float[Tensor, "b p"]:
        """Of each patch's pixels, in 0 to 1."""
        rows, columns = self.layout.grid
        gray = nn.functional.adaptive_avg_pool2d(self.photos.float().mean(1), (rows, columns)).flatten(1)
        return (gray - gray.min()) / (gray.max() - gray.min())

    def some(self, chosen: Tensor) -> "Stream":
        """The same with fewer photos."""
        return replace(self, photos=self.photos[chosen], residuals=self.residuals[chosen])


def clean_stream(shared: Path, name: str, photos: int) -> Stream:
    """One of the real models, cut before its artifacts, or of the random architectures."""
    if name in REAL:
        folder, depth, layer = REAL[name]
        vit = _cut(vitreg.load(str(shared / "models" / folder)), depth)
    else:
        vit, layer = random_backbone(RANDOM[name]), 1
    images = vitreg.read_images(str(shared / "data/imagenet-sample-1000"), vit, limit=photos, workers=0)
    pixels = torch.cat([batch.pixels for batch in images])
    found = []
    with evaluating(vit.model), trace(vit, norms=False, residuals=True, layers=[layer]) as t:
        for batch in pixels.split(BATCH):
            vit(batch)
            found.append(t.residuals[0].clone())
    return Stream(name, vit, pixels, layer, torch.cat(found))


def random_backbone(kind: str, seed: int = 0) -> Backbone:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return vitreg.wrap(randomise(timm_model(kind, **RANDOM_SIZE)()).eval())


def small_backbone(seed: int) -> Backbone:
    """A narrow random ViT, in which what a patch shows counts for more than where it is."""
    rng = np.random.default_rng(seed)
    grid, heads, wide, depth = (
        int(rng.choice(x)) for x in ((5, 7, 10, 14), (2, 3, 4), (8, 16, 24), (4, 6, 12))
    )
    sizes = {
        "img_size": 8 * grid,
        "patch_size": 8,
        "embed_dim": wide * heads,
        "depth": depth,
        "num_heads": heads,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = randomise(timm_model("vit_small_patch16_224", **sizes)()).eval()
    cast(torch.Tensor, model.pos_embed).data *= float(rng.choice([0.0, 0.1, 1.0]))
    return vitreg.wrap(model)


def _cut(vit: Backbone, depth: int) -> Backbone:
    """The model's first blocks only."""
    vit.model.blocks = cast(nn.Sequential, vit.model.blocks)[:depth]
    return vitreg.wrap(vit.model, vit.preprocess, name=f"{vit.name}, {depth} blocks")


def statistics_of(stream: Stream, patches: Float[Tensor, "b p d"]) -> Statistics:
    """What one pass would have collected after one block whose patches are these."""
    one = SimpleNamespace(anatomy=replace(stream.vit.anatomy, depth=1), device=patches.device)
    layout = replace(stream.layout, prefix=0, registers=0)
    collector = Collector(cast(Backbone, one), Statistics.empty(cast(Backbone, one), layout), layout)
    groups = torch.randperm(len(patches), generator=torch.Generator().manual_seed(0)) % 16
    for group, batch in zip(groups.split(BATCH), patches.split(BATCH), strict=True):
        collector._groups = group
        collector._start()
        collector._block(0, batch)
    return collector.statistics


@contextmanager
def changed(stream: Stream, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While entered, the model goes on from patches (b, p, d) that `change` made after the stream's block.

    `change` sees the photos' batches one after the other.
    """

    def hook(module: nn.Module, args: object, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, stream.layout.patch_slice] = change(output[:, stream.layout.patch_slice])
        return output

    block = stream.vit.anatomy.block_modules(stream.vit.model)[stream.layer]
    handle = block.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


# -- populations ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Injection:
    """A vector of `size` median norms, with a lognormal spread, added to a share of the patches.

    It lies in so many random residual `dimensions` (None: in all of them).
    """

    size: float
    spread: float
    share: float
    dimensions: int | None = DIMENSIONS


def inject(
    stream: Stream, injection: Injection, seed: int
) -> tuple[Float[Tensor, "b p d"], Bool[Tensor, "b p"]]:
    """What is added to the patches, and to which."""
    rng = np.random.default_rng(seed)
    count, patches, width = stream.patches.shape
    truth = torch.zeros(count * patches, dtype=torch.bool)
    chosen = rng.choice(len(truth), max(round(injection.share * len(truth)), 1), replace=False)
    truth[torch.from_numpy(chosen)] = True
    vector = np.zeros(width)
    dimensions = injection.dimensions or width
    vector[rng.choice(width, dimensions, replace=False)] = rng.normal(size=dimensions)
    median = float(torch.linalg.vector_norm(stream.patches, dim=-1).median())
    length = injection.size * median * np.exp(rng.normal(0, injection.spread, len(chosen)))
    added = torch.zeros(len(truth), width)
    rows = length[:, None] * vector / np.linalg.norm(vector)
    added[torch.from_numpy(chosen)] = torch.from_numpy(rows).float()
    return added.view(count, patches, width), truth.view(count, patches)


def best_f1(norms: Float[Tensor, "b p"], truth: Bool[Tensor, "b p"]) -> float:
    """What the best possible threshold on these norms reaches."""
    right = truth.flatten()[norms.flatten().argsort(descending=True)].double().cumsum(0)
    marked = torch.arange(1, len(right) + 1)
    return float((2 * right / (marked + right[-1])).max())


def f1(mask: Bool[Tensor, "b p"], truth: Bool[Tensor, "b p"]) -> float:
    return float(2 * (mask & truth).sum() / (mask.sum() + truth.sum()).clamp(min=1))


# -- tails ---------------------------------------------------------------------------------------------

Tail = Callable[[Stream, np.random.Generator], np.ndarray]


def _lognormal(spread: float) -> Tail:
    return lambda s, rng: np.exp(rng.normal(0, spread, s.patches.shape[:2]))


def _pareto(alpha: float) -> Tail:
    return lambda s, rng: 1 + rng.pareto(alpha, s.patches.shape[:2])


def _student(freedom: float) -> Tail:
    return lambda s, rng: np.exp(0.1 * rng.standard_t(freedom, s.patches.shape[:2]))


def _photos(spread: float) -> Tail:
    return lambda s, rng: np.exp(rng.normal(0, spread, (len(s.patches), 1)))


def _two_kinds(share: float, factor: float) -> Tail:
    return lambda s, rng: np.where(rng.random((len(s.patches), 1)) < share, factor, 1.0)


def _radial(strength: float) -> Tail:
    def factors(s: Stream, rng: np.random.Generator) -> np.ndarray:
        rows, columns = np.indices(s.layout.grid)
        middle = np.array(s.layout.grid) / 2
        away = np.hypot(rows + 0.5 - middle[0], columns + 0.5 - middle[1]) / np.hypot(*middle)
        return np.exp(rng.choice([-1, 1]) * strength * away).reshape(1, -1)

    return factors


def _by_row(strength: float) -> Tail:
    def factors(s: Stream, rng: np.random.Generator) -> np.ndarray:
        rows, _ = np.indices(s.layout.grid)
        return np.exp(rng.choice([-1, 1]) * strength * rows / s.layout.grid[0]).reshape(1, -1)

    return factors


def _by_brightness(strength: float) -> Tail:
    return lambda s, rng: np.exp(rng.choice([-1, 1]) * strength * s.brightness.numpy())


TAILS: dict[str, Tail] = {
    **{f"lognormal {spread}": _lognormal(spread) for spread in (0.3, 0.5, 0.8)},
    **{f"Pareto {alpha}": _pareto(alpha) for alpha in (1.5, 3.0)},
    **{f"Student t {freedom}": _student(freedom) for freedom in (2.0, 3.0)},
    **{f"per photo, spread {spread}": _photos(spread) for spread in (0.3, 0.8)},
    "10% of the photos at 3x": _two_kinds(0.1, 3.0),
    "50% of the photos at 4x": _two_kinds(0.5, 4.0),
    "drift from the centre, 1.6x": _radial(0.5),
    "drift from the centre, 2.7x": _radial(1.0),
    "drift by row, 1.6x": _by_row(0.5),
    "drift by row, 2.7x": _by_row(1.0),
    "drift by brightness, 1.6x": _by_brightness(0.5),
    "drift by brightness, 2.7x": _by_brightness(1.0),
}


# -- images --------------------------------------------------------------------------------------------

Maker = Callable[[Backbone, int, np.random.Generator], Tensor]


def _noise(vit: Backbone, count: int, rng: np.random.Generator) -> Tensor:
    return torch.from_numpy(rng.uniform(-1, 1, (count, 3, *vit.image_size))).float()


def _blank(vit: Backbone, count: int, rng: np.random.Generator) -> Tensor:
    return torch.full((count, 3, *vit.image_size), float(rng.uniform(-1, 1)))


def _flat(vit: Backbone, count: int, rng: np.random.Generator) -> Tensor:
    """Each one colour."""
    colors = torch.from_numpy(rng.uniform(-1, 1, (count, 3, 1, 1))).float()
    return colors.expand(-1, -1, *vit.image_size).contiguous()


def _crops(vit: Backbone, count: int, rng: np.random.Generator) -> Tensor:
    chosen = torch.from_numpy(rng.choice(POOL, count, replace=False))
    return _pool(vit.image_size)[chosen]


@lru_cache(maxsize=8)
def _pool(image_size: tuple[int, int]) -> Tensor:
    """Crops of the bundled photos at one size."""
    return crops(cast(Backbone, SimpleNamespace(image_size=image_size)), POOL, 0)


def _framed(vit: Backbone, count: int, rng: np.random.Generator) -> Tensor:
    """Photos with bars above and below, or at the sides, of one colour each, as wide in all of them."""
    photos, (height, width) = _crops(vit, count, rng), vit.image_size
    bar = rng.uniform(0.1, 0.4)
    high, wide = (int(bar * height), 0) if rng.random() < 0.5 else (0, int(bar * width))
    framed = _flat(vit, count, rng)
    inside = (..., slice(high, height - high), slice(wide, width - wide))
    framed[inside] = photos[inside]
    return framed


def _pasted(vit: Backbone, count: int, rng: np.random.Generator) -> Tensor:
    """Photos with a rectangle of one colour, another in each."""
    photos, (height, width) = _crops(vit, count, rng), vit.image_size
    for photo in photos:
        h, w = (int(side * rng.uniform(0.2, 0.8)) for side in (height, width))
        y, x = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
        photo[:, y : y + h, x : x + w] = torch.from_numpy(rng.uniform(-1, 1, (3, 1, 1)))
    return photos


IMAGES: dict[str, Maker] = {
    "noise": _noise,
    "blank": _blank,
    "flat": _flat,
    "photos": _crops,
    "photos with bars": _framed,
    "photos with rectangles": _pasted,
}
