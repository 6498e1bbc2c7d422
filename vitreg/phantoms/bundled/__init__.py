"""The bundled example: a small ViT that tells twelve shapes apart, and photos of them, drawn by a seed.

    vit, scenes = vitreg.example()
    photos = vitreg.read_images([scene.photo for scene in scenes], vit)
    print(measure(vit, scenes))       # top-1, and how much of its attention lies on the object

`vitreg train demo` made the weights beside this file (float16, in timm's folder format), from nothing but
drawn photos; these here it has never seen.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vitreg.data.images import Images, read_images
from vitreg.data.shapes import Scene, draw
from vitreg.errors import DataError
from vitreg.models.backbone import Backbone
from vitreg.models.loading import load
from vitreg.models.probe import evaluating
from vitreg.phantoms.phantom import Phantom, plant
from vitreg.tracing.records import trace

# Seeds of photos for looking at, and of those for measuring; training draws its seeds below 2**31.
SHOWN, HELD_OUT = 2**31, 2**32

# (0-based) of the example's six blocks: its MLP is the one that artifacts are planted in.
PLANTED_LAYER = 3

# Patches of a photo that are artifacts: 2% of 144.
TYPICAL = 3


def example(photos: int = 64) -> tuple[Backbone, list[Scene]]:
    """The trained ViT, and that many photos (`.photo`) with their objects' masks and labels."""
    return load_example(Path(__file__).parent), scenes(photos)


def planted_example(photos: int = 64) -> tuple[Backbone, Phantom, Images]:
    """The ViT as it was trained, a phantom of it, and drawn photos.

    First come photos with about TYPICAL planted patches, as a real model has, last those without any.
    """
    vit, drawn = example(photos)
    images = read_images([scene.photo for scene in drawn], vit)
    phantom = plant(vit, [batch.pixels for batch in images], PLANTED_LAYER)
    patches = torch.cat([phantom.marked(batch.pixels).sum((1, 2)) for batch in images])
    far = (patches.clamp(min=0.01) / TYPICAL).log().abs()
    order = far.argsort(stable=True)
    return vit, phantom, read_images([drawn[i].photo for i in order], vit)


def scenes(photos: int, first: int = SHOWN) -> list[Scene]:
    """Photos that the model has not been trained on: always the same, in the size that it takes."""
    return [draw(first + i) for i in range(photos)]


def load_example(folder: Path) -> Backbone:
    """A ViT that `vitreg train demo` has written."""
    vit = load(str(folder))
    return Backbone(vit.model, "the example ViT", vit.anatomy, vit.image_size, vit.preprocess, vit.forward)


@dataclass(frozen=True)
class ExampleMeasures:
    """Top-1, and how much of the last block's CLS-to-patch attention (mean of heads) lies on the object.

    `area` is the object's share of the photo: what attention that lies anywhere would give.
    """

    top1: float
    on_object: float
    area: float


def measure(vit: Backbone, scenes: list[Scene]) -> ExampleMeasures:
    """Means over the photos. A fix that is applied to the model is measured with it."""
    if not scenes:
        raise DataError("there are no photos to measure, expected at least one.")
    right, shares = [], []
    cover = object_cover(scenes, vit.layout.grid)
    done = 0
    with evaluating(vit.model), trace(vit, norms=False, attention="cls", layers=[vit.anatomy.depth - 1]) as t:
        for batch in read_images([scene.photo for scene in scenes], vit, batch_size=64):
            predicted = vit(batch.pixels).argmax(-1).cpu()
            some = scenes[done : done + len(predicted)]
            right += [int(p) == scene.label for p, scene in zip(predicted, some, strict=True)]
            rows = t.attention[0, :, :, 0, t.inner.patch_slice].mean(1).cpu()
            shares.append((rows * cover[done : done + len(some)]).sum(1) / rows.sum(1))
            done += len(some)
    return ExampleMeasures(sum(right) / done, float(torch.cat(shares).mean()), float(cover.mean()))


def object_cover(scenes: list[Scene], grid: tuple[int, int]) -> Float[Tensor, "b p"]:
    """How much of each patch the object covers, 0 to 1."""
    masks = torch.stack([torch.from_numpy(scene.mask) for scene in scenes]).float()
    return F.adaptive_avg_pool2d(masks[:, None], grid).flatten(1)
