"""Diagnose a model while it trains, so that the emergence of outliers is a curve in the log."""

from torch import Tensor, nn

from vitreg.diagnosis.diagnosing import diagnose
from vitreg.models.backbone import wrap


def diagnosed(vit: nn.Module, photos: list[Tensor], image_size: int) -> dict[str, float]:
    """What the log says of artifacts. Of all layers: where the largest patch norm is, against the median.

    outliers              share of patches that the diagnosis calls outliers, in per cent
    outlier_layer         the layer they are read at (0-based), or -1 if there are none
    norm_ratio            largest patch norm over the median, in the layer where that is largest
    attention_outliers    share of the last block's CLS attention on them, in per cent
    """
    found = diagnose(wrap(vit, image_size=image_size), photos, examples=0)
    return {
        "outliers": 100 * found.outlier_fraction,
        "outlier_layer": float(found.detect_layer if found.has_artifacts else -1),
        "norm_ratio": max(layer.max_norm / layer.median_norm for layer in found.layers),
        "attention_outliers": 100 * found.attention_to_outliers,
    }
