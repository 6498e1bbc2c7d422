"""The CLS token's attention as a heatmap of the foreground: no head, no training.

print(evaluate(vit, "VOCdevkit/VOC2012"))

As in Jiang et al. (section 5) and, before them, Chefer et al. 2021: the last block's attention of CLS to the
patches, mean over heads, is upsampled to the photo; what lies above the heatmap's own mean is foreground.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from PIL import Image
from sklearn.metrics import average_precision_score
from torch import Tensor

from vitreg.data.datasets.foreground import foreground
from vitreg.evals.result import Metric, Result, concluded
from vitreg.features.config import Config
from vitreg.features.extraction import extract_features
from vitreg.features.framing import Framing, normalisation_of
from vitreg.models.backbone import Backbone

EXAMPLES = 6  # photos in the picture


@dataclass(frozen=True)
class HeatmapConfig(Config):
    """`layer` (0-based; negative: from the end) is the block whose attention is taken.

    `side`: masks are first squeezed to a square of so many pixels, so that each photo weighs the same (the
    papers: 224). By default they keep their size.
    """

    layer: int = -1
    side: int | None = None


def evaluate(vit: Backbone, data: str | Path, config: HeatmapConfig | None = None) -> Result:
    """mIoU of foreground and background, pixel accuracy, and average precision, over VOC or gtsegs_ijcv.mat.

    The photo is squeezed to the model's size, so that the heatmap covers all of it. Raises DataError for data
    without masks or without a background, UnsupportedModelError for a model without a CLS token.
    """
    config = config or HeatmapConfig()
    squeeze = Framing(normalisation_of(vit), size=vit.image_size)
    name = f"attention@{range(vit.anatomy.depth)[config.layer]}"
    with foreground(data, config.cache) as photos:
        found = extract_features(vit, photos.paths, [name], config, squeeze)
        heats = [heads.mean(0).unflatten(0, vit.layout.grid) for heads in found.each(name)]
        masks = [_resized(photos.mask(i), config.side) for i in found.index]
        examples = [_photo(photos.paths[i], masks[k].shape) for k, i in enumerate(found.index[:EXAMPLES])]
    maps = [heatmap(heat, mask) for heat, mask in zip(heats, masks, strict=True)]
    sums = np.array([_sums(heat, mask) for heat, mask in zip(maps, masks, strict=True)])
    precision = np.array([_precision(heat, mask) for heat, mask in zip(maps, masks, strict=True)])
    metrics = {
        "mIoU": Metric(sums, ".2%", reduce=_mean_iou),
        "pixel accuracy": Metric(sums, ".2%", reduce=_accuracy),
        "mAP": Metric.mean(precision[:, 0], ".2%"),
        "AP of the foreground": Metric.mean(precision[:, 1], ".2%"),
    }
    notes = (*photos.notes, *found.notes(), _trivial(masks))
    picture = partial(_picture, examples, maps[:EXAMPLES], masks[:EXAMPLES])
    return concluded(
        "zero-shot-segmentation",
        vit,
        photos.root,
        metrics,
        config,
        notes=notes,
        picture=picture,
        photos=photos.paths,
    )


def heatmap(attention: Float[Tensor, "gh gw"], mask: Int[np.ndarray, "h w"]) -> Float[np.ndarray, "h w"]:
    """Attention upsampled to the mask's size and scaled to 0..1."""
    height, width = mask.shape
    heat = F.interpolate(attention[None, None], (height, width), mode="bilinear")[0, 0].double()
    spread = heat.max() - heat.min()
    scaled: np.ndarray = ((heat - heat.min()) / (spread if spread else 1.0)).numpy()
    return scaled


def _resized(mask: Int[np.ndarray, "h w"], side: int | None) -> Int[np.ndarray, "h2 w2"]:
    """Squeezed to a square by taking the nearest pixel."""
    if side is None:
        return mask
    rows, columns = (((np.arange(side) + 0.5) * length / side).astype(int) for length in mask.shape)
    return mask[np.ix_(rows, columns)]


def _sums(heat: Float[np.ndarray, "h w"], mask: Int[np.ndarray, "h w"]) -> Float[np.ndarray, "6"]:
    """Pixels of one photo: intersection and union of the foreground, of the background; right; all."""
    guess, truth = heat[mask >= 0] > heat.mean(), mask[mask >= 0] > 0
    both, neither = guess & truth, ~guess & ~truth
    counts = [both, guess | truth, neither, ~(guess & truth), both | neither, truth | ~truth]
    return np.array([pixels.sum() for pixels in counts], dtype=float)


def _mean_iou(means: Float[np.ndarray, "r 6"]) -> Float[np.ndarray, " r"]:
    return (means[:, 0] / means[:, 1] + means[:, 2] / means[:, 3]) / 2


def _accuracy(means: Float[np.ndarray, "r 6"]) -> Float[np.ndarray, " r"]:
    return means[:, 4] / means[:, 5]


def _precision(heat: Float[np.ndarray, "h w"], mask: Int[np.ndarray, "h w"]) -> tuple[float, float]:
    """Average precision of one photo: of both classes pooled, and of the foreground alone.

    Pooled, as the papers' mAP: every pixel counts twice, once for the foreground with its heat and once for
    the background with 1 - heat. NaN where a photo has only one of the two.
    """
    heat, truth = heat[mask >= 0], mask[mask >= 0] > 0
    if truth.all() or not truth.any():
        return np.nan, np.nan
    pooled = average_precision_score(np.concatenate([truth, ~truth]), np.concatenate([heat, 1 - heat]))
    return float(pooled), float(average_precision_score(truth, heat))


def _trivial(masks: list[Int[np.ndarray, "_ _"]]) -> str:
    """What one must beat: the score of one answer for all pixels."""
    background = sum(int((mask == 0).sum()) for mask in masks) / sum(int((mask >= 0).sum()) for mask in masks)
    answer, share = max(
        [("background", background), ("foreground", 1 - background)], key=lambda pair: pair[1]
    )
    return f"calling every pixel {answer} would score mIoU {share / 2:.2%}, pixel accuracy {share:.2%}."


def _photo(path: Path, shape: tuple[int, ...]) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB").resize((shape[1], shape[0]))


def _picture(photos: list[Image.Image], heats: list[np.ndarray], masks: list[np.ndarray]) -> Figure:
    from vitreg.plots.heatmaps import heatmaps

    return heatmaps([np.array(photo) for photo in photos], heats, masks)
