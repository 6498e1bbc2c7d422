"""Shapes like those of the published models, as phantoms with known truth.

    shape = published("DINOv2-g")
    report = vitreg.diagnose(shape.vit, [shape.photos])
    report.onset_layer == shape.onset, shape.marked(shape.photos)

Each is a random ViT of 12 blocks that set the norms of their patches: a bulk, and outliers along one residual
dimension. The weights are those of any ViT; the blocks do it in their forward pass. Shares and ratios are
rounded from what was published of the real models (Darcet et al., 2024) and measured in them since.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from catalog import randomise
from jaxtyping import Bool, Float
from phantoms import crops
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

import vitreg
from vitreg.models.layout import TokenLayout

DEPTH, WIDTH, SIZE, PATCH = 12, 48, 112, 8
PHOTOS = 24
MASSIVE = 7  # the residual dimension along which outliers stand out; in all other patches it is 0
BORDER = ((0, 3), (0, 10), (6, 13), (13, 5))  # of a grid of 14 x 14


@dataclass(frozen=True)
class Norms:
    """Patch norms after one block: those of the bulk, and of the outliers where there are any.

    `bulk` and `outliers` are medians; `spread` and `soft` the standard deviations of their logarithms, each
    patch's own by its content; `drift` is by how much the logarithm rises from the middle to the corners.
    """

    bulk: float
    spread: float = 0.12
    drift: float = 0.0
    outliers: float | None = None
    soft: float = 0.0


@dataclass(frozen=True)
class Recipe:
    """The norms after every block; which patches are outliers from block `onset` on; the published answer.

    `rate` is the share of outliers among the patches, by content (the flattest); None: those at BORDER.
    """

    norms: tuple[Norms, ...]
    onset: int | None = None
    rate: float | None = None

    @property
    def verdict(self) -> str:
        return "no artifacts" if self.onset is None else "artifacts"


def _growing(**settings: Any) -> tuple[Norms, ...]:
    """A bulk whose norms grow fourfold from the first block to the last."""
    return tuple(Norms(bulk=10 * (1 + 3 * layer / (DEPTH - 1)), **settings) for layer in range(DEPTH))


def _with_outliers(norms: tuple[Norms, ...], first: int, last: int, ratio: float, soft: float) -> Any:
    return tuple(
        replace(x, outliers=ratio * x.bulk, soft=soft) if first <= layer <= last else x
        for layer, x in enumerate(norms)
    )


def _deit3() -> tuple[Norms, ...]:
    """Four patches at 1500 from block 3 on, while the bulk grows from 60 to 0.7 of that."""
    bulk = (30.0, 40.0, 50.0, 60.0, 70.0, 85.0, 100.0, 130.0, 180.0, 300.0, 600.0, 1050.0)
    return tuple(
        Norms(x, spread=0.15, outliers=1500.0 if layer >= 3 else None) for layer, x in enumerate(bulk)
    )


RECIPES = {
    "DeiT-III B": Recipe(_deit3(), onset=3),
    "OpenCLIP B/16": Recipe(_with_outliers(_growing(spread=0.25), 6, 11, 5.0, soft=0.25), onset=6, rate=0.04),
    "DINOv2-L": Recipe(_with_outliers(_growing(), 5, 10, 10.0, soft=0.1), onset=5, rate=0.02),
    "DINOv2-g": Recipe(_with_outliers(_growing(), 5, 11, 9.0, soft=0.15), onset=5, rate=0.017),
    "MAE": Recipe(_growing(spread=0.4)),
    "DINO": Recipe(_growing(spread=0.1, drift=0.6)),
}


@dataclass(frozen=True)
class Published:
    """A model with a published shape, the photos it was made for, and its truth."""

    name: str
    recipe: Recipe
    vit: vitreg.Backbone
    photos: Float[Tensor, "b 3 h w"]

    def marked(self, images: Float[Tensor, "b 3 h w"]) -> Bool[Tensor, "b gh gw"]:
        """The true outliers of any images, as the block in which they begin makes them."""
        with vitreg.trace(self.vit, residuals=True, layers=[self.recipe.onset or 0]) as t, torch.no_grad():
            self.vit(images)
        return t.layout.as_grid(t.residuals[0][:, t.layout.patch_slice, MASSIVE] > 0)


@lru_cache
def published(name: str, seed: int = 0) -> Published:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VisionTransformer(
            img_size=SIZE, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=3, num_classes=5,
            block_fn=ShapedBlock,
        )  # fmt: skip
        randomise(model).eval()
        model.pos_embed.data *= 0.1  # patches differ by what they show, and hardly by where they are
        vit = vitreg.wrap(model, image_size=SIZE, name=f"a shape like {name}'s")
        photos = crops(vit, PHOTOS, seed)
        flatness = (
            -photos.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).flatten(4).std(-1).mean(1).flatten(1)
        )
        for layer, block in enumerate(vit.anatomy.block_modules(model)):
            block.shape = Shape(RECIPES[name], layer, vit.layout, flatness)
        with torch.no_grad():
            model(photos)  # the shapes fit themselves to the photos
    return Published(name, RECIPES[name], vit, photos)


class ShapedBlock(Block):
    """A timm block that gives its patches the norms of a shape on the way out."""

    shape: "Shape | None" = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = super().forward(x, *args, **kwargs)
        return y if self.shape is None else self.shape(x, y)


class Shape:
    """What one block does to the norms; its first call fits it to the photos."""

    def __init__(
        self, recipe: Recipe, layer: int, layout: TokenLayout, flatness: Float[Tensor, "b p"]
    ) -> None:
        self.norms, self.layout = recipe.norms[layer], layout
        self.begins = layer == recipe.onset
        self._marks = _FlatPatches(flatness, recipe.rate) if recipe.rate else _border(layout)
        self._bulk, self._outliers = _Score(), _Score()
        rows, columns = (torch.linspace(-1, 1, side).square() for side in layout.grid)
        self._drift = self.norms.drift * (rows[:, None] + columns).flatten() / 2

    def __call__(
        self, before: Float[Tensor, "b n d"], after: Float[Tensor, "b n d"]
    ) -> Float[Tensor, "b n d"]:
        patches = self.layout.patch_slice
        marked = self._marked(before[:, patches])
        content = after[:, patches].clone()
        content[..., MASSIVE] = 0
        content = F.normalize(content, dim=-1)
        norms = self.norms.bulk * (self.norms.spread * self._bulk(content) + self._drift).exp()
        shaped = after.clone()
        shaped[:, patches] = content * norms[..., None]
        if marked.any():
            shaped[:, patches][marked] = self._outlying(content[marked], norms[marked])
        return shaped

    def _marked(self, before: Float[Tensor, "b p d"]) -> Bool[Tensor, "b p"]:
        if self.norms.outliers is None:
            return torch.zeros(before.shape[:2], dtype=torch.bool)
        return self._marks(before) if self.begins else before[..., MASSIVE] > 0

    def _outlying(self, content: Float[Tensor, "o d"], bulk: Float[Tensor, " o"]) -> Float[Tensor, "o d"]:
        assert self.norms.outliers is not None
        norms = self.norms.outliers * (self.norms.soft * self._outliers(content)).exp()
        own = torch.minimum(bulk, norms / 2)  # the rest is along MASSIVE
        outlying = content * own[:, None]
        outlying[:, MASSIVE] = (norms.square() - own.square()).sqrt()
        return outlying


class _Score:
    """A number for each token by its content: standard normal over the tokens of the first call."""

    _fitted: Tensor | None = None

    def __init__(self) -> None:
        self._direction = torch.randn(WIDTH)

    def __call__(self, content: Float[Tensor, "*n d"]) -> Float[Tensor, "*n"]:
        values = content @ self._direction
        if self._fitted is None:
            self._fitted = values.flatten().sort().values
        ranks = torch.searchsorted(self._fitted, values.contiguous())
        return torch.special.ndtri((ranks + 0.5) / (len(self._fitted) + 1))


class _FlatPatches:
    """The share `rate` of patches that look flattest to a linear map, fitted in the first call."""

    _direction: Tensor | None = None

    def __init__(self, flatness: Float[Tensor, "b p"], rate: float) -> None:
        self._flatness, self._rate = flatness, rate

    def __call__(self, x: Float[Tensor, "b p d"]) -> Bool[Tensor, "b p"]:
        x = F.normalize(x, dim=-1)
        if self._direction is None:
            self._direction = torch.linalg.lstsq(x.flatten(0, 1), self._flatness.flatten()[:, None]).solution[
                :, 0
            ]
            self._boundary = (x @ self._direction).flatten().quantile(1 - self._rate)
        return x @ self._direction > self._boundary


def _border(layout: TokenLayout) -> Any:
    fixed = torch.zeros(layout.grid, dtype=torch.bool)
    for row, column in BORDER:
        fixed[row, column] = True
    return lambda x: fixed.flatten().expand(len(x), -1)
