"""Semantic segmentation with a linear head on patch tokens: mean IoU and pixel accuracy.

print(evaluate(vit, "camvid/", SegmentationConfig(ignore=11)))

The protocol is DINOv2's (Oquab et al. 2023): BatchNorm and a 1x1 convolution on the frozen model's last
layer, or its last 4 concatenated, trained with AdamW and tested with sliding windows. No augmentation here.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from vitreg.data.datasets.masks import train_and_val
from vitreg.evals.dense_head import (
    EXAMPLES,
    DenseConfig,
    Frame,
    Tokens,
    former_outliers,
    predictions,
    readable,
    split_notes,
    splits_of,
)
from vitreg.evals.result import Metric, Result, concluded, ratio
from vitreg.models.backbone import Backbone
from vitreg.plots.dense import segmentation_figure


@dataclass(frozen=True)
class SegmentationConfig(DenseConfig):
    """For images/ and masks/: how many `classes` there are (default: as the masks have), and which id to
    `ignore` besides 255."""

    classes: int | None = None
    ignore: int | None = None


def evaluate(vit: Backbone, data: str | Path, config: SegmentationConfig | None = None) -> Result:
    """Train a head on the training photos and measure it on the others, in their own size.

    Mean IoU is over the classes that occur, from intersections and unions summed over photos. Data without a
    split are cross-validated. Where the model without its fix has outlier patches, the last metric is the
    pixel accuracy of these patches' own outputs, before overlapping windows are averaged.
    Raises DataError for masks that do not fit.
    """
    config = config or SegmentationConfig()
    train, val = train_and_val(data, config.classes, config.ignore, config.limit)
    photos, classes = val.after(train), len(val.names)
    groups = [""] * len(photos)
    splits = splits_of(len(train or ()), groups, config.folds)
    frame, depth = Frame.of(vit, config.side), vit.anatomy.depth
    tokens = Tokens.of(vit, photos.paths, frame, range(depth - config.layers, depth), config)
    counts = {i: class_counts(frame.cut(photos.mask(i)), classes).to_sparse() for i in tokens.row}
    splits = readable(splits, tokens)
    tested = [i for _, test in splits for i in test]
    outliers = former_outliers(vit, photos.paths, tested, frame, config)
    examples = tested[:: -(-len(tested) // EXAMPLES)]
    confusions, at_outliers, shown = [], [], []
    for i, outputs in predictions(tokens, counts, splits, cross_entropy, classes, config):
        truth = torch.from_numpy(photos.mask(i))
        guess = frame.join(outputs, *truth.shape).argmax(0)
        confusions.append(confusion(guess, truth, classes))
        if outliers:
            at_outliers.append(right_and_known(outputs, counts[i].to_dense())[outliers[i]].sum(0))
        if i in examples:
            shown.append((photos.paths[i], truth.numpy(), guess.numpy()))
    metrics = segmentation_metrics(torch.stack(confusions))
    if outliers:
        metrics["pixel accuracy, former outliers"] = share_of_pixels(torch.stack(at_outliers))
    notes = (*photos.notes, *tokens.found.notes(), *split_notes(splits, groups))
    picture = partial(segmentation_figure, shown, val.names)
    return concluded(
        "segmentation", vit, val.root, metrics, config, notes=notes, picture=picture, photos=val.paths
    )


def class_counts(ids: Int[Tensor, "w p pixels"], classes: int) -> Float[Tensor, "w p c"]:
    """How many pixels of each patch are of each class; -1 is none."""
    known = (ids >= 0).float()
    counts = torch.zeros(*ids.shape[:2], classes)
    return counts.scatter_add(2, ids.clamp(min=0), known)


def cross_entropy(logits: Float[Tensor, "t c"], counts: Float[Tensor, "t c"]) -> Float[Tensor, ""]:
    """The mean over pixels of the cross-entropy between a pixel's class and its patch's logits."""
    return -(counts * logits.log_softmax(1)).sum() / counts.sum().clamp(min=1)


def confusion(guess: Int[Tensor, "h w"], truth: Int[Tensor, "h w"], classes: int) -> Float[Tensor, "c c"]:
    """Pixels by true class (row) and predicted class (column); where the truth is -1, none."""
    found = multiclass_confusion_matrix(guess, truth, classes, ignore_index=-1, validate_args=False)
    return found.double()


def right_and_known(logits: Float[Tensor, "w p c"], counts: Float[Tensor, "w p c"]) -> Float[Tensor, "w p 2"]:
    """Of each patch: the pixels of the class that it predicts, and those of any class."""
    right = counts.gather(2, logits.argmax(2, keepdim=True))
    return torch.cat([right, counts.sum(2, keepdim=True)], 2)


def segmentation_metrics(confusions: Float[Tensor, "b c c"]) -> dict[str, Metric]:
    """Mean IoU and pixel accuracy from each photo's confusion matrix."""
    hits, true, guessed = confusions.diagonal(dim1=1, dim2=2), confusions.sum(2), confusions.sum(1)
    overlap = torch.cat([hits, true + guessed - hits], 1)
    right = torch.stack([hits.sum(1), true.sum(1)], 1)
    return {
        "mIoU": Metric(overlap.numpy(), ".2%", reduce=mean_iou),
        "pixel accuracy": share_of_pixels(right),
    }


def share_of_pixels(right_and_all: Float[Tensor, "b 2"]) -> Metric:
    """The right pixels of all photos over all of their pixels."""
    return Metric(right_and_all.double().numpy(), ".2%", reduce=ratio)


def mean_iou(means: Float[np.ndarray, "r k"]) -> Float[np.ndarray, " r"]:
    """From intersections and unions (k = 2 c) to the mean IoU of the classes whose union is not empty."""
    hits, unions = np.split(means, 2, axis=1)
    iou = np.divide(hits, unions, out=np.zeros_like(hits), where=unions > 0)
    return iou.sum(1) / (unions > 0).sum(1)
