"""Object discovery without labels: LOST and TokenCut, and how often their one box per photo is right.

result = evaluate(vit, "VOCdevkit/VOC2012", DiscoveryConfig(normalise=True, bias=-0.2))
result.picture()                         # boxes over photos

CorLoc is the share of photos whose box has an IoU of at least 0.5 with the box of any object.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.ops import box_iou

from vitreg.data.datasets.boxes import Boxed, boxed_photos
from vitreg.data.decoding import decode
from vitreg.data.evenly_spaced import evenly_spaced
from vitreg.errors import DataError, NonFiniteError
from vitreg.evals.lost import Found, Grid, lost, lost_by_bias
from vitreg.evals.result import Metric, Result, concluded
from vitreg.evals.tokencut import tokencut
from vitreg.features.any_size import at_any_size
from vitreg.features.config import Config
from vitreg.features.extraction import extract_features
from vitreg.features.framing import Framing, normalisation_of
from vitreg.models.backbone import Backbone
from vitreg.plots.box_grid import BoxedPhoto, box_grid

BIASES = tuple(float(bias) for bias in np.linspace(0, -1, 41).round(3))  # that a sweep tries
_DRAWN = 12  # photos in a picture


@dataclass(frozen=True)
class DiscoveryConfig(Config):
    """Which method, on which features of the last block's attention (heads concatenated, patches only).

    `centre` subtracts the photo's mean feature, then `normalise` scales features to length 1 (TokenCut's
    always are). `bias` is added to LOST's dot products; "sweep" chooses it from 0 to -1 by CorLoc on the
    share `held_out` of the photos, drawn by `seed`, and LOST's figure is of the rest. `similar` is LOST's k,
    `tau` TokenCut's threshold. `resolution`: "native" photos are padded with zeros to whole patches, "model"
    squeezes them to the model's own size. A native photo of more than `most_patches` is scaled down to that
    many: both methods then take most_patches^2 / 8 bytes (512 MiB), 128 MiB and a few copies of the features.
    `split`, `files`: see `boxed_photos`.
    """

    method: Literal["lost", "tokencut", "both"] = "both"
    features: Literal["keys", "queries", "values"] = "keys"
    centre: bool = False
    normalise: bool = False
    bias: float | Literal["sweep"] = 0.0
    held_out: float = 0.5
    similar: int = 100
    tau: float = 0.2
    resolution: Literal["native", "model"] = "native"
    most_patches: int = 65536
    split: str | None = None
    files: str | None = None


@dataclass(frozen=True, eq=False)
class BoxedScene:
    """A photo of `size` (height, width), its objects' boxes `truth` (k, 4), and its grid of patches.

    `patch` is the (height, width) of a patch in the photo's own pixels; boxes are xyxy in such pixels.
    """

    path: Path
    size: tuple[int, int]
    truth: Tensor
    grid: Grid
    patch: tuple[float, float]

    def box(self, found: Found) -> Float[Tensor, "4"]:
        """The found patches in pixels, clipped to the photo."""
        pixels = torch.tensor(found.box) * torch.tensor(self.patch[::-1] * 2)
        return pixels.minimum(torch.tensor(self.size[::-1] * 2))

    def overlap(self, found: Found) -> float:
        """The largest IoU of the found box with an object's."""
        return float(box_iou(self.box(found)[None], self.truth).max())


def evaluate(vit: Backbone, data: str | Path, config: DiscoveryConfig | None = None) -> Result:
    """CorLoc of LOST, TokenCut or both on a VOC or a COCO folder, and that of the whole photo as a box.

    Raises DataError for data or settings that do not hold together (a sweep without `normalise`);
    UnsupportedModelError for a model of one size only, unless `resolution` is "model".
    """
    config = config or DiscoveryConfig()
    _check(config)
    photos = boxed_photos(data, config.split, config.files)
    framing = Framing(normalisation_of(vit), patch=vit.anatomy.patch_size)
    if config.resolution == "model":
        framing = replace(framing, size=vit.image_size)
    else:
        framing, vit = replace(framing, most=config.most_patches), at_any_size(vit)
    extracted = extract_features(vit, photos.paths, [config.features], config, framing)
    scenes = scenes_of(photos, extracted.index, framing, vit.anatomy.patch_size)

    def features(i: int) -> Tensor:
        return prepared(extracted.of(config.features, i), config)

    swept = _sweep(scenes, features, config) if config.bias == "sweep" else None
    bias = swept.bias if swept else float(config.bias)
    found = [locate(features(i), scene.grid, config, bias) for i, scene in enumerate(scenes)]
    notes = (*photos.notes, *extracted.notes(), *_scaled(scenes, framing), *_notes(found, swept))
    picture = partial(_picture, scenes, found)
    metrics = _metrics(scenes, found, swept)
    return concluded(
        "discovery", vit, photos.root, metrics, config, notes=notes, picture=picture, photos=photos.paths
    )


def _check(config: DiscoveryConfig) -> None:
    if config.similar < 1:
        raise DataError(f"similar={config.similar}: in LOST at least one patch must vote.")
    if config.most_patches < 4:
        raise DataError(f"most_patches={config.most_patches}: expected 4 or more.")
    if config.bias == "sweep" and config.method == "tokencut":
        raise DataError("bias=sweep is for LOST: TokenCut has no bias.")
    if config.bias == "sweep" and not (config.normalise and 0 < config.held_out < 1):
        raise DataError("bias=sweep tries 0 to -1, for cosines: set normalise=true, and 0 < held_out < 1.")


def scenes_of(
    photos: Boxed, index: Sequence[int], framing: Framing, patch: tuple[int, int]
) -> list[BoxedScene]:
    """Some of the photos, with their grids of patches (height, width) as the framing makes them."""
    scenes = []
    for i in index:
        (height, width), (rows, columns) = photos.sizes[i], framing.scaled_size(*photos.sizes[i])
        grid = (-(-rows // patch[0]), -(-columns // patch[1]))
        scale = (patch[0] * height / rows, patch[1] * width / columns)
        scenes.append(BoxedScene(photos.paths[i], photos.sizes[i], photos.boxes[i], grid, scale))
    return scenes


def prepared(features: Float[Tensor, "p d"], config: DiscoveryConfig) -> Float[Tensor, "p d"]:
    """Features centred and normalised as the config says, in float64."""
    if not features.isfinite().all():
        raise NonFiniteError(f"the model's {config.features} hold NaN or infinity. Run it in float32.")
    features = features.double()
    if config.centre:
        features = features - features.mean(0)
    return F.normalize(features, dim=1) if config.normalise else features


def locate(
    features: Float[Tensor, "p d"], grid: Grid, config: DiscoveryConfig, bias: float
) -> dict[str, Found]:
    """What the config's methods find in one photo."""
    found = {}
    if config.method != "tokencut":
        found["LOST"] = lost(features, grid, bias, config.similar)
    if config.method != "lost":
        found["TokenCut"] = tokencut(features, grid, config.tau)
    return found


@dataclass(frozen=True)
class _Sweep:
    """The bias with the best CorLoc on the photos `held` (their positions); of several, the nearest to 0."""

    held: list[int]
    bias: float
    corloc: float


def _sweep(
    scenes: Sequence[BoxedScene], features: Callable[[int], Tensor], config: DiscoveryConfig
) -> _Sweep:
    if len(scenes) < 2:
        raise DataError("bias=sweep needs photos to choose on and others to measure: found one photo.")
    share = min(max(round(config.held_out * len(scenes)), 1), len(scenes) - 1)
    held = np.random.default_rng(config.seed).permutation(len(scenes))[:share].tolist()
    right = np.zeros((share, len(BIASES)))
    for row, i in zip(right, held, strict=True):
        found = lost_by_bias(features(i), scenes[i].grid, BIASES, config.similar)
        row[:] = [scenes[i].overlap(one) >= 0.5 for one in found]
    best = int(right.mean(0).argmax())
    return _Sweep(held, BIASES[best], float(right[:, best].mean()))


def _metrics(
    scenes: Sequence[BoxedScene], found: Sequence[dict[str, Found]], swept: _Sweep | None
) -> dict[str, Metric]:
    metrics = {}
    for method in found[0]:
        right = np.array([s.overlap(f[method]) >= 0.5 for s, f in zip(scenes, found, strict=True)], float)
        if swept and method == "LOST":
            right[swept.held] = np.nan
        metrics[f"{method} CorLoc"] = Metric.mean(right, ".1%")
    whole = [scene.overlap(Found((0, 0, scene.grid[1], scene.grid[0]), True)) >= 0.5 for scene in scenes]
    metrics["CorLoc of the whole photo"] = Metric.mean(whole, ".1%")
    return metrics


def _scaled(scenes: Sequence[BoxedScene], framing: Framing) -> list[str]:
    if framing.most is None:
        return []
    smaller = [scene for scene in scenes if framing.scaled_size(*scene.size) != scene.size]
    if not smaller:
        return []
    return [
        f"{len(smaller)} of {len(scenes)} photos, {smaller[0].path.name} among them, have more than"
        f" {framing.most} patches and were scaled down to that many (most_patches)."
    ]


def _notes(found: Sequence[dict[str, Found]], swept: _Sweep | None) -> list[str]:
    notes, n = [], len(found)
    if swept:
        notes.append(
            f"LOST's bias {swept.bias:g} was chosen on {len(swept.held)} of the photos (CorLoc there"
            f" {swept.corloc:.1%}); its CorLoc is that of the other {n - len(swept.held)}."
        )
    if alike := sum(f["LOST"].degenerate for f in found if "LOST" in f):
        notes.append(
            f"LOST is degenerate on {alike} of {n} photos: (nearly) all dot products of their patches are"
            " positive, and the box is the whole photo whatever it shows. Centre the features (centre=true),"
            " or normalise them and let a bias be chosen (normalise=true, bias=sweep)."
        )
    if alike := sum(f["TokenCut"].degenerate for f in found if "TokenCut" in f):
        notes.append(
            f"TokenCut is degenerate on {alike} of {n} photos: no cut of their patches is the best, and the"
            " box is the whole photo. Centre the features (centre=true), or try another tau."
        )
    return notes


def _picture(scenes: Sequence[BoxedScene], found: Sequence[dict[str, Found]]) -> Figure:
    drawn = []
    for i in evenly_spaced(len(scenes), _DRAWN):
        scene = scenes[i]
        boxes = {method: scene.box(one).numpy() for method, one in found[i].items()}
        scores = ", ".join(f"{method} {scene.overlap(one):.2f}" for method, one in found[i].items())
        photo = np.asarray(decode(str(scene.path)))
        drawn.append(BoxedPhoto(scene.path.name, photo, scene.truth.numpy(), boxes, f"IoU: {scores}"))
    return box_grid(drawn)
