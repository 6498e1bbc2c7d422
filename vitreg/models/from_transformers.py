"""Models of transformers: the checkpoint, the vision tower in it, its preprocessing, how to run it."""

import inspect
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from torch import nn

from vitreg.errors import MissingExtraError, ModelLoadError, UnsupportedModelError
from vitreg.models.built import Built
from vitreg.models.checkpoint_keys import KeyMismatch
from vitreg.models.preprocessing import hf_preprocess, plain_preprocess
from vitreg.models.sizes import FALLBACK, VISION_CONFIGS, Pair, Preprocess, native_size
from vitreg.printing import did_you_mean

_TEXT = ("input_ids", "decoder_input_ids")


def build_hf(name: str, size: Pair | None, random_weights: bool, trust_remote_code: bool = False) -> Built:
    """The whole model of a checkpoint, to find the tower in. With random weights, the tower alone."""
    transformers = _transformers()
    config = _config(transformers, name, random_weights, trust_remote_code)
    if random_weights:
        module, keys = _random_tower(transformers, config, trust_remote_code), None
    else:
        module, keys = _pretrained(transformers, name, config, trust_remote_code)
    towers = list(vision_towers(module))
    preprocess, note = _preprocess(transformers, name, size, towers[0], random_weights, trust_remote_code)
    return Built(module, towers, preprocess, note, keys, native_size(towers[0]))


def build_vlm(name: str, size: Pair | None, random_weights: bool, trust_remote_code: bool = False) -> Built:
    """A whole vision-language model."""
    transformers = _transformers()
    if size:
        raise ModelLoadError(
            f"hf:{name} has one size, which its image tokens are made for: leave out --size."
        )
    config = _config(transformers, name, False, trust_remote_code)
    keys = None
    if random_weights:
        whole = transformers.AutoModelForImageTextToText.from_config(
            config, trust_remote_code=trust_remote_code
        )
    else:
        whole, keys = _pretrained(transformers, name, config, trust_remote_code)
    towers = list(vision_towers(whole))
    preprocess, note = _preprocess(transformers, name, None, towers[0], random_weights, trust_remote_code)
    return Built(whole, towers, preprocess, note, keys, native_size(towers[0]))


def vision_towers(module: nn.Module) -> Iterator[nn.Module]:
    """The parts of a (perhaps multimodal) model that take pixels and no text, the outermost first.

    A part with a head comes before what it is built on. Without any, it is the model itself if that takes no
    text. Raises UnsupportedModelError where it does.
    """
    towers = [
        part
        for part in module.modules()
        if hasattr(part, "config")
        if _arguments(part)[:1] == ["pixel_values"] or "grid_thw" in _arguments(part)
    ]
    without_text = [tower for tower in towers if not set(_TEXT) & set(_arguments(tower))]
    if not without_text and set(_TEXT) & set(_arguments(module)):
        raise UnsupportedModelError(
            f"{type(module).__name__} takes text, and has no part that takes pixel_values alone: no vision"
            " encoder that vitreg can run."
        )
    yield from without_text or [module]


def _arguments(module: nn.Module) -> list[str]:
    return list(inspect.signature(module.forward).parameters)


def processor_of(name: str, trust_remote_code: bool = False) -> Any:
    """The whole processor of a vision-language model."""
    return _transformers().AutoProcessor.from_pretrained(name, trust_remote_code=trust_remote_code)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("transformers", "hf") from error
    return transformers


def _config(transformers: Any, name: str, random_weights: bool, trust_remote_code: bool) -> Any:
    if random_weights and "/" not in name:
        known = list(transformers.CONFIG_MAPPING)
        if name not in known:
            near = did_you_mean(name, known, 3, "hf:")
            raise ModelLoadError(f"transformers has no model type {name!r}.{near}")
        return transformers.AutoConfig.for_model(name)
    return transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)


def _pretrained(
    transformers: Any, name: str, config: Any, trust_remote_code: bool
) -> tuple[nn.Module, KeyMismatch | None]:
    """The class that the checkpoint was saved from, and the keys that do not fit it.

    transformers fills missing weights with random ones and only warns; what that matters is judged once it is
    known what the keys are for.
    """
    architecture = (config.architectures or [None])[0]
    known = getattr(transformers, architecture or "AutoModel", None)
    cls = known or getattr(transformers, _auto_class(config), transformers.AutoModel)
    module, info = cls.from_pretrained(name, output_loading_info=True, trust_remote_code=trust_remote_code)
    tensors = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers())
    mismatched = {key if isinstance(key, str) else key[0] for key in info.get("mismatched_keys", ())}
    missing = {key: tensors.get(key) for key in sorted({*info["missing_keys"], *mismatched})}
    unexpected = sorted(info["unexpected_keys"])
    keys = KeyMismatch(f"hf:{name}", module, missing, unexpected) if missing or unexpected else None
    return module, keys


def _auto_class(config: Any) -> str:
    """Of code that comes with a checkpoint, the class that it offers itself as."""
    offered = [name for name in getattr(config, "auto_map", None) or {} if name.startswith("AutoModel")]
    return offered[0] if offered and "AutoModel" not in offered else "AutoModel"


def _random_tower(transformers: Any, config: Any, trust_remote_code: bool) -> nn.Module:
    """Of a composite configuration, the vision model alone: the rest may be large."""
    inner = next((found for name in VISION_CONFIGS if (found := getattr(config, name, None))), None)
    if inner is not None:
        return _random_tower(transformers, inner, trust_remote_code)
    kind = _tower_class(config)
    if kind is not None:
        return kind(config)
    module: nn.Module = transformers.AutoModel.from_config(config, trust_remote_code=trust_remote_code)
    return module


def _tower_class(config: Any) -> type[nn.Module] | None:
    """The class of a vision tower that has a configuration of its own and is known by no automatic class."""
    name = type(config).__module__.replace("configuration_", "modeling_")
    code = sys.modules.get(name) or (import_module(name) if name.startswith("transformers.models.") else None)
    towers = [
        kind
        for kind in vars(code).values()
        if isinstance(kind, type) and getattr(kind, "config_class", None) is type(config)
        if "grid_thw" in inspect.signature(kind.forward).parameters  # type: ignore[attr-defined]
    ]
    return towers[0] if towers else None


def _preprocess(
    transformers: Any,
    name: str,
    size: Pair | None,
    tower: nn.Module,
    random_weights: bool,
    trust_remote_code: bool,
) -> tuple[Preprocess | None, str]:
    native = native_size(tower)
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception:  # no preprocessor_config.json, or no such repository
        return (plain_preprocess(size or native or FALLBACK) if random_weights else None), ""
    return hf_preprocess(processor, size, native)
