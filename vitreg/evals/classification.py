"""Top-1 and top-5 accuracy of the model's own head on labelled photos.

print(evaluate(vit, "imagenet-sample/"))
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from vitreg.data.datasets.classes import by_wordnet
from vitreg.errors import UnsupportedModelError
from vitreg.evals.result import Metric, Result, concluded
from vitreg.features.config import Config
from vitreg.features.extraction import extract_features
from vitreg.models.backbone import Backbone
from vitreg.models.head import class_names, find_readout
from vitreg.models.headless import without_output


@dataclass(frozen=True)
class ClassificationConfig(Config):
    """Nothing to set: photos go through the model's own preprocess and head."""


def evaluate(vit: Backbone, data: str | Path, config: ClassificationConfig | None = None) -> Result:
    """Accuracy of the head on the photos of a folder (of its val/, if it has one).

    Labels are WordNet ids in file or folder names, or one folder for each class, called by its name or number
    (see datasets.classes.by_wordnet; notes say what was guessed). Raises DataError for photos without a
    class, UnsupportedModelError for a model without a head.
    """
    config = config or ClassificationConfig()
    classes = find_readout(vit).classes
    if not classes:
        why = without_output(vit) or f"{vit.name} has no classification head"
        raise UnsupportedModelError(f"{why}. Use knn or linear, or zero-shot for a text tower.")
    photos = by_wordnet(data, classes, class_names(vit))
    found = extract_features(vit, photos.paths, ["logits"], config)
    labels = torch.tensor(photos.labels)[list(found.index)]
    best = found["logits"].topk(min(5, classes)).indices == labels[:, None]
    metrics = {
        "top-1": Metric.mean(best[:, 0], ".2%"),
        "top-5": Metric.mean(best.any(1), ".2%"),
    }
    notes = (*photos.notes, *found.notes())
    return concluded("classification", vit, photos.root, metrics, config, notes=notes, photos=photos.paths)
