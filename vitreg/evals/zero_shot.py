"""Zero-shot classification: photos against what a text tower makes of the classes' names.

vit = load("open_clip:ViT-B-16/laion2b_s34b_b88k")
print(evaluate(vit, "imagenet/val"))
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitreg.data.datasets.classes import by_wordnet
from vitreg.errors import MissingExtraError, UnsupportedModelError
from vitreg.evals.result import Metric, Result, concluded
from vitreg.features.config import Config
from vitreg.features.extraction import extract_features
from vitreg.files import write_atomically
from vitreg.models.backbone import Backbone
from vitreg.models.loading import Tokenize, load_clip
from vitreg.provenance import digest

try:
    import open_clip
except ImportError as error:
    raise MissingExtraError("open_clip", "open_clip") from error

TEMPLATES = {"openai": open_clip.OPENAI_IMAGENET_TEMPLATES, "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES}


@dataclass(frozen=True)
class ZeroShotConfig(Config):
    """`templates`: open_clip's sentences around each class's name, OpenAI's 80 or the 7 simple ones."""

    templates: Literal["openai", "simple"] = "openai"


@dataclass(frozen=True, kw_only=True)
class TextBackbone(Backbone):
    """The vision tower of an open_clip model. `clip` is the whole model, which reads texts."""

    clip: nn.Module
    tokenize: Tokenize


def load(name: str, **options: Any) -> TextBackbone:
    """An `open_clip:ARCH/TAG`, with the options of `vitreg.load`. Raises ModelLoadError for other names."""
    vit, clip, tokenize = load_clip(name, **options)
    return TextBackbone(**vars(vit), clip=clip, tokenize=tokenize)


def evaluate(vit: Backbone, data: str | Path, config: ZeroShotConfig | None = None) -> Result:
    """Top-1 and top-5 accuracy over ImageNet's 1000 classes on the photos of a folder (or its val/).

    A photo's class is the one whose text embedding, the mean over templates, has the largest cosine to the
    photo's (Radford et al. 2021). Labels are WordNet ids in file or folder names. Raises DataError for photos
    without a class, UnsupportedModelError for a model without its text tower.
    """
    config = config or ZeroShotConfig()
    if not isinstance(vit, TextBackbone):
        raise UnsupportedModelError(
            f"{vit.name} was loaded without a text tower. Load it with"
            " vitreg.evals.zero_shot.load('open_clip:ARCH/TAG')."
        )
    names = open_clip.IMAGENET_CLASSNAMES
    photos = by_wordnet(data, len(names), names)
    found = extract_features(vit, photos.paths, ["output"], config)
    labels = torch.tensor(photos.labels)[list(found.index)]
    cosines = F.normalize(found["output"], dim=1) @ class_embeddings(vit, config)
    best = cosines.topk(5).indices == labels[:, None]
    metrics = {
        "top-1": Metric.mean(best[:, 0], ".2%"),
        "top-5": Metric.mean(best.any(1), ".2%"),
    }
    notes = (*photos.notes, *found.notes())
    return concluded("zero-shot", vit, photos.root, metrics, config, notes=notes, photos=photos.paths)


def class_embeddings(vit: TextBackbone, config: ZeroShotConfig) -> Float[Tensor, "k c"]:
    """A unit vector for each of ImageNet's classes, in the order of its WordNet ids.

    80,000 texts take long without an accelerator, so they are cached beside the photos' features.
    """
    from safetensors.torch import load_file, save

    names, templates = open_clip.IMAGENET_CLASSNAMES, TEMPLATES[config.templates]
    text = {key: value for key, value in vit.clip.state_dict().items() if not key.startswith("visual.")}
    sentences = [template(name) for name in names for template in templates]
    place = config.cache and config.cache / f"{digest(vit.name, text, sentences)}.safetensors"
    if place and place.exists():
        return load_file(place)["classes"]
    found = open_clip.build_zero_shot_classifier(
        vit.clip, vit.tokenize, names, templates, device=vit.device, use_tqdm=config.progress
    )
    classes: Tensor = found.float().cpu().contiguous()
    if place:
        write_atomically(place, save({"classes": classes}))
    return classes
