"""Which patches are outliers in the unfixed model. With a fix applied, these are the former outliers.

report = unfixed_diagnosis(vit, paths, config)
masks = outlier_masks(vit, report, paths, config)      # (b, p)
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from vitreg.data.evenly_spaced import evenly_spaced
from vitreg.data.images import read_images
from vitreg.diagnosis.diagnosing import diagnose
from vitreg.diagnosis.result import Diagnosis
from vitreg.features.config import Config
from vitreg.features.extraction import extract_features
from vitreg.fixes.base import without_fixes
from vitreg.models.backbone import Backbone

DIAGNOSED = 64  # photos: enough for artifacts that are worth a row of their own


def unfixed_diagnosis(vit: Backbone, paths: Sequence[Path], config: Config) -> Diagnosis:
    """The diagnosis of the model without its fixes, on some of the photos, evenly spread."""
    used = [paths[i] for i in evenly_spaced(len(paths), config.limit)]
    some = [used[i] for i in evenly_spaced(len(used), DIAGNOSED)]
    photos = read_images(some, vit, batch_size=config.batch_size, workers=config.workers)
    with without_fixes(vit.model):
        return diagnose(vit, photos, examples=0)


def outlier_masks(
    vit: Backbone, report: Diagnosis, paths: Sequence[Path], config: Config
) -> Bool[np.ndarray, "b p"]:
    """Outliers of the unfixed model, of all photos that `extract_features` can read, in its order."""
    name = f"norms@{report.rule.layer}"
    with without_fixes(vit.model):
        norms = extract_features(vit, paths, [name], config)[name].numpy()
    return report.rule.mask(norms)


def outlier_notes(report: Diagnosis) -> tuple[str, ...]:
    """What a reader must know of the word outlier in a result."""
    if report.threshold is None:
        return (f"The unfixed model has no artifacts, so there are no outliers to probe: {report.reason}",)
    where = f"a norm over {report.threshold:.4g} after block {report.detect_layer}"
    return (f"Outliers: patches with {where} of the unfixed model, whatever a fix makes of them.",)
