"""From a model's name to a Backbone: the model, its preprocessing and its anatomy.

    vit = load("timm:vit_large_patch14_dinov2.lvd142m")     # or hf:ID, open_clip:ARCH/TAG, a folder

A model already at hand is wrapped: backbone.py.
Only this file and those that it is made of know libraries: from_transformers.py, preprocessing.py, sizes.py.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitreg.errors import (
    MissingExtraError,
    ModelLoadError,
    UnsupportedModelError,
    VitregError,
)
from vitreg.models.backbone import Backbone, warn_about, wrap
from vitreg.models.built import Built
from vitreg.models.from_transformers import build_hf, build_vlm, processor_of
from vitreg.models.names import SCHEMES, suggestion, with_library
from vitreg.models.preprocessing import timm_preprocess
from vitreg.models.sizes import (
    FALLBACK,
    Pair,
    Size,
    native_size,
    pair,
    refuse_partial_patches,
)
from vitreg.printing import did_you_mean, one_of

DTYPES = ("float32", "bfloat16", "float16")
Tokenize = Callable[[list[str]], Tensor]  # texts -> token ids (texts, length)


Builder = Callable[[Pair | None, bool], Built]


def load(
    name: str,
    *,
    size: Size | None = None,
    random_weights: bool = False,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "float32",
    trust_remote_code: bool = False,
) -> Backbone:
    """Build a pretrained model with its own preprocessing.

    `name` is `timm:NAME`, `timm:hf-hub:ID`, `hf:ID`, `open_clip:ARCH/TAG`, or a folder in timm's or
    transformers' own format. Of a composite model (a vision-language model, say) it is the vision tower.
    `size`, one side or (height, width) in pixels, re-interpolates the positions as that library does.
    `random_weights` builds the same architecture without a download (`hf:` then also takes a model type
    such as `hf:dinov2`). A name of timm's may stand without `timm:`. `device` "auto" is the GPU where torch
    sees one. `trust_remote_code` runs Python code that comes with a transformers checkpoint.

    Warns (ModelWarning) where configuration and preprocessing disagree on the size, where the preprocess
    gives one view of a photo that the library would cut into several, and where keys of the checkpoint do not
    fit outside of blocks, embeddings and final norm. Raises ModelLoadError, or UnsupportedModelError for what
    is no plain ViT.
    """
    name = with_library(name)
    built = _built(name, _builder(name, trust_remote_code), size, random_weights)
    return _backbone(built, name, size, torch_device(device), _dtype(dtype))


def load_clip(
    name: str,
    *,
    size: Size | None = None,
    random_weights: bool = False,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "float32",
    trust_remote_code: bool = False,
) -> tuple[Backbone, nn.Module, Tokenize]:
    """An `open_clip:ARCH/TAG` with its text tower: the vision tower as `load` gives it, the whole model,
    and its tokenizer. Raises as `load` does, and ModelLoadError for any other kind of name."""
    scheme, _, rest = name.partition(":")
    if scheme != "open_clip" or not rest:
        raise ModelLoadError(f"{name} has no text tower: expected open_clip:ARCH/TAG.")
    built = _built(name, partial(_build_open_clip, rest), size, random_weights)
    import open_clip

    try:
        tokenize: Tokenize = open_clip.get_tokenizer(rest.partition("/")[0])
    except Exception as error:  # a tokenizer from a hub
        raise ModelLoadError(_explain(name, error)) from error
    clip = built.whole.to(torch_device(device), _dtype(dtype)).eval()
    return _backbone(built, name, size, torch_device(device), _dtype(dtype)), clip, tokenize


def load_vlm(
    name: str,
    *,
    size: Size | None = None,
    random_weights: bool = False,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "float32",
    trust_remote_code: bool = False,
) -> tuple[Backbone, nn.Module, Any]:
    """A vision-language model of transformers, `hf:ID` or a folder: its vision tower, the whole model, and
    its processor (None for random weights without a tokenizer). Raises as `load` does."""
    place = name.removeprefix("hf:")
    build = partial(build_vlm, place, trust_remote_code=trust_remote_code)
    built = _built(name, build, size, random_weights)
    if built.keys:
        built.keys.refuse_missing()
    try:
        processor = processor_of(place, trust_remote_code)
    except Exception as error:
        if not random_weights:
            raise ModelLoadError(_explain(name, error)) from error
        processor = None
    whole = built.whole.to(torch_device(device), _dtype(dtype)).eval()
    return _backbone(built, name, size, torch_device(device), _dtype(dtype)), whole, processor


def _built(name: str, build: Builder, size: Size | None, random_weights: bool) -> Built:
    """What a builder makes, with every error in one line."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            return build(None if size is None else pair(size), random_weights)
        except (VitregError, KeyboardInterrupt):
            raise
        except Exception as error:  # each library has its own; all become one line with the cause
            raise ModelLoadError(_explain(name, error)) from error


def _backbone(
    built: Built, name: str, size: Size | None, device: torch.device, dtype: torch.dtype
) -> Backbone:
    """The outermost of the towers that can be read. What is to be said of the checkpoint is said here."""
    refused: UnsupportedModelError | None = None
    for tower in built.towers:
        if size is not None:
            refuse_partial_patches(tower, pair(size), built.native)
        try:
            vit = wrap(tower.to(device, dtype).eval(), built.preprocess, image_size=size, name=name)
        except UnsupportedModelError as error:
            refused = refused or error
            continue
        for note in (built.note, built.keys.judge(vit) if built.keys else ""):
            if note:
                warn_about(name, note)
        return vit
    assert refused is not None, "a builder finds at least one tower"
    raise refused


def _builder(name: str, trust_remote_code: bool) -> Builder:
    scheme, _, rest = name.partition(":")
    builders: dict[str, Callable[..., Built]] = {
        "timm": _build_timm,
        "hf": partial(build_hf, trust_remote_code=trust_remote_code),
        "open_clip": _build_open_clip,
    }
    if scheme in builders and rest:
        return partial(builders[scheme], rest)
    folder = Path(name)
    if folder.is_dir():
        return _folder_builder(folder, trust_remote_code)
    if folder.exists():
        raise ModelLoadError(f"{name} is a file; expected {SCHEMES}.")
    raise ModelLoadError(
        f"there is no model {name!r}: no folder has that name.{suggestion(name)} Expected {SCHEMES}."
    )


def _folder_builder(folder: Path, trust_remote_code: bool) -> Builder:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        config = {}
    except ValueError as error:
        raise ModelLoadError(f"{folder}/config.json is not valid JSON ({error}).") from error
    if "model_type" in config:  # transformers' wrapper of a timm model names its architecture, too
        return partial(build_hf, str(folder), trust_remote_code=trust_remote_code)
    if "architecture" in config:
        return partial(_build_timm, f"local-dir:{folder}")
    raise ModelLoadError(
        f"folder {folder} holds no model: expected a config.json with 'architecture' (timm) or 'model_type'"
        " (transformers), and weights beside it."
    )


def _explain(name: str, error: Exception) -> str:
    """One line: what could not be loaded, why, and what to do."""
    text = " ".join(str(error).split())
    if "Missing key" in text or "Unexpected key" in text:
        return f"the checkpoint of {name} does not fit its architecture: {text[:400]}"
    if name.startswith("timm:") and ("Unknown model" in text or "Invalid pretrained tag" in text):
        return f"timm has no model {name[5:]!r}.{suggestion(name)}"
    if "trust_remote_code" in text:
        return (
            f"{name} comes with Python code of its own, which is not run. If you trust its authors, allow it"
            " with --trust-remote-code (trust_remote_code=True)."
        )
    offline = any(
        word in text.lower() for word in ("connect", "offline", "resolve", "max retries", "network")
    )
    hint = (
        " Check the name and the network, or give a local folder, or use random weights." if offline else ""
    )
    return f"could not load {name}: {type(error).__name__}: {text[:400] or 'no message'}{hint}"


def _build_timm(name: str, size: Pair | None, random_weights: bool) -> Built:
    import timm

    sized: dict[str, Any] = {"img_size": size} if size else {}
    if random_weights and name.startswith("local-dir:"):
        name = json.loads((Path(name.partition(":")[2]) / "config.json").read_text(encoding="utf-8"))[
            "architecture"
        ]
    try:
        module = timm.create_model(name, pretrained=not random_weights, **sized)
    except TypeError as error:
        if size and "img_size" in str(error):
            raise ModelLoadError(f"timm:{name} has one fixed size; leave out --size.") from error
        raise
    preprocess = timm_preprocess(module, size or native_size(module) or FALLBACK)
    return Built(module, [module], preprocess, native=pair(module.pretrained_cfg["input_size"][1:]))


def build_timm(name: str, **options: Any) -> nn.Module:
    """A timm model with random weights. Raises ModelLoadError for a name or an option that timm lacks."""
    import timm

    try:
        module: nn.Module = timm.create_model(name, **options)
    except Exception as error:  # as in `_built`: one line with the cause
        raise ModelLoadError(_explain(f"timm:{name}", error)) from error
    return module


def _build_open_clip(name: str, size: Pair | None, random_weights: bool) -> Built:
    try:
        import open_clip
    except ImportError as error:
        raise MissingExtraError("open_clip", "open_clip") from error
    architecture, _, tag = name.partition("/")
    if architecture not in open_clip.list_models():
        near = did_you_mean(architecture, open_clip.list_models(), 3, "open_clip:")
        raise ModelLoadError(f"open_clip has no architecture {architecture!r}.{near}")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if not random_weights and tag not in tags:
        raise ModelLoadError(
            f"open_clip:{architecture} needs one of these tags after a slash: {', '.join(tags)}."
            f"{did_you_mean(tag, tags, prefix=f'open_clip:{architecture}/')}"
        )
    model, _, transform = open_clip.create_model_and_transforms(
        architecture, pretrained=None if random_weights else tag, force_image_size=size
    )
    native = pair(open_clip.get_model_config(architecture)["vision_cfg"]["image_size"])
    return Built(model, [model.visual], transform, native=native)


def torch_device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:
        raise ModelLoadError(
            f"device {device!r} is not available ({str(error).splitlines()[0]}); use cpu."
        ) from error


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ModelLoadError(f"there is no dtype {dtype!r}. {one_of(str(dtype), DTYPES)}")
    return found
