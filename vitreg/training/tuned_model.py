"""What a run made of a pretrained model: a fix of that model, with a verdict before and after."""

import json
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from vitreg.data.images import Images
from vitreg.errors import UnsupportedModelError
from vitreg.evals import classification
from vitreg.files import write_atomically
from vitreg.fixes.trained import TrainedRegisters
from vitreg.models.backbone import Backbone
from vitreg.training.exporting import export
from vitreg.training.objective import save_model
from vitreg.verification.measuring import verify


def top1(vit: Backbone, data: str) -> float:
    """Top-1 of the model's head on labelled photos, in per cent."""
    found = classification.evaluate(vit, data, classification.ClassificationConfig(workers=0))
    return 100 * found.metrics["top-1"].value


def write_tuned(
    before: Backbone, after: Backbone, images: Images | list[Tensor], out: Path
) -> dict[str, Path]:
    """Write fix/ (TrainedRegisters), verdict.json and, where the library has registers of its own, model/.

    `before` is the model as it was, `after` the one with registers; `images` are what the verdict is on.
    """
    fix = TrainedRegisters.between(before, after)
    verdict = verify(before, fix, images)
    document = verdict.to_json()
    written = {"fix": fix.save(out / "fix", vit=before, evidence=document)}
    written["verdict"] = write_atomically(out / "verdict.json", json.dumps(document, indent=1))
    with suppress(UnsupportedModelError):  # the fix is then the only form that the library can have it in
        written |= save_model(export(after.model), out)
    return written
