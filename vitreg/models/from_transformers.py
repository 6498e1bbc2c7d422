"""Models of transformers: the checkpoint, the vision tower in it, its preprocessing, how to run it."""

import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitreg.errors import MissingExtraError, ModelLoadError, UnsupportedModelError
from vitreg.models.built import Built
from vitreg.models.checkpoint_keys import KeyMismatch
from vitreg.models.preprocessing import hf_preprocess, plain_preprocess
from vitreg.models.probe import Forward
from vitreg.models.sizes import FALLBACK, VISION_CONFIGS, Pair, Preprocess, native_size

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


def forward_of(module: nn.Module) -> Forward | None:
    """How to run a module on images where `module(images)` would not do."""
    parameters = inspect.signature(module.forward).parameters
    if "spatial_shapes" in parameters:
        return partial(_run_on_patches, module)
    if "grid_thw" in parameters:
        return partial(_run_on_grids, module)
    if "interpolate_pos_encoding" in parameters:
        return partial(module, interpolate_pos_encoding=True)
    return None


def _run_on_patches(module: nn.Module, images: Float[Tensor, "b 3 h w"]) -> Any:
    """SigLIP 2 (NaFlex) takes flattened patches, their mask and the grid of each image."""
    config: Any = module.config
    patch: int = getattr(config, "vision_config", config).patch_size
    b, _, h, w = images.shape
    rows, columns = h // patch, w // patch
    cells = images.unfold(2, patch, patch).unfold(3, patch, patch)  # (b, 3, rows, columns, patch, patch)
    pixels = cells.permute(0, 2, 3, 4, 5, 1).reshape(b, rows * columns, -1)
    mask = torch.ones(b, rows * columns, dtype=torch.long, device=images.device)
    shapes = torch.tensor([[rows, columns]] * b, device=images.device)
    return module(pixel_values=pixels, pixel_attention_mask=mask, spatial_shapes=shapes)


def _run_on_grids(module: nn.Module, images: Float[Tensor, "b 3 h w"]) -> Any:
    """Qwen2-VL and its kin take the patches of all images in one row, ordered by the squares of patches that
    they merge, and the grid of each image (frames, rows, columns)."""
    config: Any = module.config
    patch, merged = config.patch_size, getattr(config, "spatial_merge_size", 1)
    frames = getattr(config, "temporal_patch_size", 1)
    b, _, h, w = images.shape
    side = patch * merged
    if h % side or w % side:
        raise UnsupportedModelError(
            f"{type(module).__name__} merges {merged}x{merged} patches of {patch} pixels: expected images whose"
            f" sides are multiples of {side}, found {h}x{w}."
        )
    cells = images.reshape(b, 3, h // side, merged, patch, w // side, merged, patch)
    cells = cells.permute(0, 2, 5, 3, 6, 1, 4, 7)  # (b, rows, columns, within a square (2), 3, patch, patch)
    pixels = cells.unsqueeze(6).expand(*cells.shape[:6], frames, patch, patch).reshape(b * h * w // patch**2, -1)
    grids = torch.tensor([[1, h // patch, w // patch]] * b, device=images.device)
    return module(pixels, grid_thw=grids)


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
    module: nn.Module = transformers.AutoModel.from_config(config, trust_remote_code=trust_remote_code)
    return module


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
