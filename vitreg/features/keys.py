"""Names for what features depend on, so that a changed input never reads a stale cache.

Everything is keyed by content: the weights' bytes, the fixes that are applied, the photo files' bytes, and
what the preprocess makes of two test pictures.
"""

from dataclasses import is_dataclass
from typing import Any

import numpy as np
from PIL import Image

from vitreg.data.images import Preprocess
from vitreg.fixes.base import applied
from vitreg.hooks.block_edit import edits_of, without_edits
from vitreg.models.backbone import Backbone
from vitreg.provenance import digest


def model_key(vit: Backbone) -> str:
    """The model's structure and weights, its dtype and image size, and the fixes on it."""
    blocks = vit.anatomy.block_modules(vit.model)
    fixes = [handle.fix for handle in applied(vit.model)] if any(map(edits_of, blocks)) else []
    with without_edits(vit.model):
        return digest(repr(vit.model), vit.model.state_dict(), vit.image_size, fixes)


def preprocess_key(preprocess: Preprocess) -> str:
    """What the preprocess makes of two pictures, one wide and one tall, and its settings if it says them."""
    random = np.random.default_rng(0)
    pictures = [
        Image.fromarray(random.integers(0, 256, (h, w, 3), dtype=np.uint8)).resize((4 * w, 4 * h))
        for h, w in ((60, 83), (83, 60))
    ]
    settings: list[Any] = (
        [preprocess] if is_dataclass(preprocess) else []
    )  # some matter for large photos only
    return digest([preprocess(picture) for picture in pictures], *settings)
