"""From a model's name to a Backbone: the model, its preprocessing and its anatomy.

    vit = load("timm:vit_large_patch14_dinov2.lvd142m")     # or hf:ID, open_clip:ARCH/TAG, a folder
    vit = wrap(my_model, preprocess)                         # a model already at hand

This is the only file that knows libraries.
"""

import difflib
import inspect
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitreg.anatomy import Anatomy, TokenLayout, find_anatomy
from vitreg.errors import MissingExtraError, ModelLoadError, UnsupportedModelError, VitregError
from vitreg.headless import run_without_head
from vitreg.probe import Forward

Preprocess = Callable[[PIL.Image.Image], Tensor]
Size = int | tuple[int, int]
Tokenize = Callable[[list[str]], Tensor]  # texts -> token ids (texts, length)
Built = tuple[nn.Module, Preprocess | None, tuple[int, int]]
Builder = Callable[[tuple[int, int] | None, bool], Built]

SCHEMES = (
    "timm:NAME, timm:hf-hub:ID, hf:ID, open_clip:ARCH/TAG, or a folder in timm's or transformers' format"
)
_HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Backbone:
    """A Vision Transformer that vitreg can read. Call it on (b, 3, h, w) images as one would the model.

    `model` is the module as its library made it, unchanged. `image_size` is (height, width) in pixels.
    """

    model: nn.Module
    name: str
    anatomy: Anatomy
    image_size: tuple[int, int]
    preprocess: Preprocess | None = None
    forward: Forward | None = None

    def __call__(self, images: Float[Tensor, "b 3 h w"]) -> Any:
        """The model's own output. Images are moved to the model's device and dtype.

        None for a model whose head wants more than images: the pass ends where it raises.
        """
        images, forward = images.to(self.device, self.dtype), self.forward or self.model
        if self.anatomy.head_error:
            return run_without_head(self.anatomy.block_modules(self.model)[-1], forward, images)
        return forward(images)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the floating-point parameters (quantised weights have another)."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    @property
    def layout(self) -> TokenLayout:
        """The token layout at `image_size`."""
        return self.anatomy.layout(self.image_size)

    def layout_for(self, images: Float[Tensor, "b 3 h w"]) -> TokenLayout:
        """The token layout of a forward pass on these images."""
        return self.anatomy.layout((images.shape[-2], images.shape[-1]))

    def with_model(self, model: nn.Module, name: str) -> "Backbone":
        """The same backbone around another instance of the same model (a copy with other weights)."""
        if self.forward is not None and _forward_of(self.model) is None:
            raise UnsupportedModelError(
                "this backbone was wrapped with a `forward` of its own, which would still run the old model."
                " Wrap the copy with wrap(copy, forward=...)."
            )
        # Not replace(): what a subclass holds beside the model (a text tower) would still be the old one's.
        return Backbone(model, name, self.anatomy, self.image_size, self.preprocess, _forward_of(model))


def wrap(
    module: nn.Module,
    preprocess: Preprocess | None = None,
    *,
    image_size: Size | None = None,
    forward: Forward | None = None,
    anatomy: Anatomy | None = None,
    name: str | None = None,
) -> Backbone:
    """A Backbone around a model that the caller holds, which may be an encoder inside a larger model.

    `forward` runs `module` on (b, 3, h, w) images where `module(images)` does not. `image_size` is
    (height, width) or one side in pixels; without it, what the model's own configuration says, or 224.
    `anatomy` overrides what would be found. Raises UnsupportedModelError with the reason for a model
    that is not a plain Vision Transformer.
    """
    size = _pair(image_size) if image_size is not None else _native_size(module)
    _refuse_partial_patches(module, size)
    forward = forward or _forward_of(module)
    found = find_anatomy(module, forward or module, size, anatomy)
    preprocess = preprocess or _timm_preprocess(module, size)
    return Backbone(module, name or type(module).__name__, found, size, preprocess, forward)


def load(
    name: str,
    *,
    size: Size | None = None,
    random_weights: bool = False,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
) -> Backbone:
    """Build a pretrained model with its own preprocessing.

    `name` is `timm:NAME`, `timm:hf-hub:ID`, `hf:ID`, `open_clip:ARCH/TAG`, or a folder in timm's or
    transformers' own format. `size` (pixels) re-interpolates the positions as that library does.
    `random_weights` builds the same architecture without a download (`hf:` then also takes a model type
    such as `hf:dinov2`). Raises ModelLoadError, or UnsupportedModelError for what is no plain ViT.
    """
    module, preprocess, pair = _built(name, _builder(name), size, random_weights, device, dtype)
    return wrap(module, preprocess, image_size=pair, name=name)


def load_clip(
    name: str,
    *,
    size: Size | None = None,
    random_weights: bool = False,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
) -> tuple[Backbone, nn.Module, Tokenize]:
    """An `open_clip:ARCH/TAG` with its text tower: the vision tower as `load` gives it, the whole model,
    and its tokenizer. Raises as `load` does, and ModelLoadError for any other kind of name."""
    scheme, _, rest = name.partition(":")
    if scheme != "open_clip" or not rest:
        raise ModelLoadError(f"{name} has no text tower: expected open_clip:ARCH/TAG.")
    clip, preprocess, pair = _built(
        name, partial(_build_whole_clip, rest), size, random_weights, device, dtype
    )
    import open_clip

    try:
        tokenize: Tokenize = open_clip.get_tokenizer(rest.partition("/")[0])
    except Exception as error:  # a tokenizer from a hub
        raise ModelLoadError(_explain(name, error)) from error
    return wrap(_visual(clip), preprocess, image_size=pair, name=name), clip, tokenize


def load_vlm(
    name: str,
    *,
    size: Size | None = None,
    random_weights: bool = False,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
) -> tuple[Backbone, nn.Module, Any]:
    """A vision-language model of transformers, `hf:ID` or a folder: its vision tower, the whole model, and
    its processor (None for random weights without a tokenizer). Raises as `load` does."""
    place = name.removeprefix("hf:")
    whole, preprocess, pair = _built(name, partial(_build_vlm, place), size, random_weights, device, dtype)
    import transformers

    try:
        processor = transformers.AutoProcessor.from_pretrained(place)
    except Exception as error:
        if not random_weights:
            raise ModelLoadError(_explain(name, error)) from error
        processor = None
    return wrap(_hf_vision_tower(whole), preprocess, image_size=pair, name=name), whole, processor


def _built(
    name: str,
    build: Builder,
    size: Size | None,
    random_weights: bool,
    device: str | torch.device,
    dtype: str | torch.dtype,
) -> Built:
    """What a builder makes, on its device, with every error in one line."""
    torch_device, torch_dtype = _device(device), _dtype(dtype)
    pair = _pair(size) if size is not None else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            module, preprocess, built_size = build(pair, random_weights)
        except (VitregError, KeyboardInterrupt):
            raise
        except Exception as error:  # each library has its own; all become one line with the cause
            raise ModelLoadError(_explain(name, error)) from error
    return module.to(torch_device, torch_dtype).eval(), preprocess, pair or built_size


# -- names -> builders -----------------------------------------------------------------------------


def _builder(name: str) -> Builder:
    scheme, _, rest = name.partition(":")
    builders: dict[str, Callable[..., Built]] = {
        "timm": _build_timm,
        "hf": _build_hf,
        "open_clip": _build_open_clip,
    }
    if scheme in builders and rest:
        return partial(builders[scheme], rest)
    folder = Path(name)
    if folder.is_dir():
        return _folder_builder(folder)
    if folder.exists():
        raise ModelLoadError(f"{name} is a file; expected {SCHEMES}.")
    raise ModelLoadError(f"no model {name!r}: it is no folder, and a name is {SCHEMES}.")


def _folder_builder(folder: Path) -> Builder:
    try:
        config = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        config = {}
    except ValueError as error:
        raise ModelLoadError(f"{folder}/config.json is not valid JSON ({error}).") from error
    if "architecture" in config:
        return partial(_build_timm, f"local-dir:{folder}")
    if "model_type" in config:
        return partial(_build_hf, str(folder))
    raise ModelLoadError(
        f"folder {folder} holds no model: expected a config.json with 'architecture' (timm) or 'model_type'"
        " (transformers), and weights beside it."
    )


def _explain(name: str, error: Exception) -> str:
    """One line: what could not be loaded, why, and what to do."""
    text = " ".join(str(error).split())
    if "Missing key" in text or "Unexpected key" in text:
        return f"the checkpoint of {name} does not fit its architecture: {text[:400]}"
    if "Unknown model" in text and name.startswith("timm:"):
        return f"timm has no model {name[5:]!r}.{_did_you_mean(name[5:])}"
    offline = any(
        word in text.lower() for word in ("connect", "offline", "resolve", "max retries", "network")
    )
    hint = (
        " Check the name and the network, or give a local folder, or use random weights." if offline else ""
    )
    return f"could not load {name}: {type(error).__name__}: {text[:400] or 'no message'}{hint}"


def _did_you_mean(name: str) -> str:
    import timm

    known = timm.list_models() + timm.list_pretrained()
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f" Did you mean {', '.join(close)}?" if close else ""


# -- timm ------------------------------------------------------------------------------------------


def _build_timm(name: str, size: tuple[int, int] | None, random_weights: bool) -> Built:
    import timm

    sized: dict[str, Any] = {"img_size": size} if size else {}
    if random_weights and name.startswith("local-dir:"):
        name = json.loads((Path(name.partition(":")[2]) / "config.json").read_text())["architecture"]
    try:
        module = timm.create_model(name, pretrained=not random_weights, **sized)
    except TypeError as error:
        if size and "img_size" in str(error):
            raise ModelLoadError(f"timm:{name} has one fixed size; leave out --size.") from error
        raise
    native = size or _native_size(module)
    return module, _timm_preprocess(module, native), native


def build_timm(name: str, **options: Any) -> nn.Module:
    """A timm model with random weights. Raises ModelLoadError for a name or an option that timm lacks."""
    import timm

    try:
        module: nn.Module = timm.create_model(name, **options)
    except Exception as error:  # as in `_built`: one line with the cause
        raise ModelLoadError(_explain(f"timm:{name}", error)) from error
    return module


def _timm_preprocess(module: nn.Module, size: tuple[int, int]) -> Preprocess | None:
    """The evaluation transform that a timm model's own configuration describes."""
    if not hasattr(module, "pretrained_cfg"):
        return None
    from timm.data import create_transform, resolve_model_data_config

    config = resolve_model_data_config(module) | {"input_size": (3, *size)}
    transform: Preprocess = create_transform(**config, is_training=False)
    return transform


# -- transformers ----------------------------------------------------------------------------------


def _build_hf(name: str, size: tuple[int, int] | None, random_weights: bool) -> Built:
    transformers = _transformers()
    if random_weights and "/" not in name:
        config = transformers.AutoConfig.for_model(name)
    else:
        config = transformers.AutoConfig.from_pretrained(name)
    if random_weights:
        module = _hf_vision_tower(
            transformers.AutoModel.from_config(getattr(config, "vision_config", config))
        )
    else:
        module = _hf_vision_tower(_hf_pretrained(transformers, name, config))
    native = size or _native_size(module)
    return module, _hf_preprocess(transformers, name, size, native, random_weights), native


def _build_vlm(name: str, size: tuple[int, int] | None, random_weights: bool) -> Built:
    transformers = _transformers()
    if size:
        raise ModelLoadError(
            f"hf:{name} has one size, which its image tokens are made for: leave out --size."
        )
    config = transformers.AutoConfig.from_pretrained(name)
    if random_weights:
        whole = transformers.AutoModelForImageTextToText.from_config(config)
    else:
        whole = _hf_pretrained(transformers, name, config)
    native = _native_size(_hf_vision_tower(whole))
    return whole, _hf_preprocess(transformers, name, None, native, random_weights), native


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("transformers", "hf") from error
    return transformers


def _hf_pretrained(transformers: Any, name: str, config: Any) -> nn.Module:
    """The class that the checkpoint was saved from, with every key accounted for.

    transformers fills missing weights with random ones and only warns; here that is an error.
    """
    architecture = (config.architectures or [None])[0]
    cls = getattr(transformers, architecture or "AutoModel", transformers.AutoModel)
    module, info = cls.from_pretrained(name, output_loading_info=True)
    wrong = {
        what: sorted(str(key) for key in info[what])
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if info.get(what)
    }
    if wrong:
        found = "; ".join(
            f"{len(keys)} {what.replace('_', ' ')} ({', '.join(keys[:3])}, ...)"
            for what, keys in wrong.items()
        )
        raise ModelLoadError(f"the checkpoint of hf:{name} does not fit {type(module).__name__}: {found}.")
    return module


def _hf_vision_tower(module: nn.Module) -> nn.Module:
    """The part of a (perhaps multimodal) model that takes pixels."""
    for part in module.modules():
        if (
            hasattr(part, "config")
            and next(iter(inspect.signature(part.forward).parameters), "") == "pixel_values"
        ):
            return part
    raise UnsupportedModelError(
        f"{type(module).__name__} has no part that takes pixel_values first: no vision encoder."
    )


class _HfPreprocess:
    """A transformers image processor as a function of one image (a class: workers unpickle it)."""

    def __init__(self, processor: Any, overrides: dict[str, Any]) -> None:
        self.processor, self.overrides = processor, overrides

    def __call__(self, image: PIL.Image.Image) -> Tensor:
        pixels: Tensor = self.processor(image, return_tensors="pt", **self.overrides)["pixel_values"][0]
        return pixels


def _hf_preprocess(
    transformers: Any, name: str, size: tuple[int, int] | None, native: tuple[int, int], random_weights: bool
) -> Preprocess | None:
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(name)
    except Exception:  # no preprocessor_config.json, or no such repository
        return _plain_preprocess(native) if random_weights else None
    if hasattr(processor, "max_num_patches"):  # SigLIP 2 cuts patches itself; `_run_on_patches` wants images
        return _plain_preprocess(native, processor.image_mean, processor.image_std)
    return _HfPreprocess(processor, _hf_size(processor, size) if size else {})


def _hf_size(processor: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Arguments that make a processor yield `size`, keeping its ratio of resize to crop."""
    exact = {"height": size[0], "width": size[1]}
    crop = getattr(processor, "crop_size", None)
    if not (getattr(processor, "do_center_crop", False) and crop):
        return {"size": exact}
    shortest = processor.size.get("shortest_edge", processor.size.get("height", crop["height"]))
    return {"size": {"shortest_edge": round(min(size) * shortest / crop["height"])}, "crop_size": exact}


def _plain_preprocess(size: tuple[int, int], mean: Any = _HALF, std: Any = _HALF) -> Preprocess:
    """Resize, crop the centre, normalise."""
    from timm.data import create_transform

    transform: Preprocess = create_transform(
        (3, *size), is_training=False, mean=mean, std=std, crop_pct=1.0, interpolation="bicubic"
    )
    return transform


def _forward_of(module: nn.Module) -> Forward | None:
    """How to run a module on images where `module(images)` would not do."""
    parameters = inspect.signature(module.forward).parameters
    if "spatial_shapes" in parameters:
        return partial(_run_on_patches, module)
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


# -- open_clip -------------------------------------------------------------------------------------


def _build_open_clip(name: str, size: tuple[int, int] | None, random_weights: bool) -> Built:
    clip, preprocess, built_size = _build_whole_clip(name, size, random_weights)
    return _visual(clip), preprocess, built_size


def _visual(clip: nn.Module) -> nn.Module:
    visual = clip.visual
    assert isinstance(visual, nn.Module)
    return visual


def _build_whole_clip(name: str, size: tuple[int, int] | None, random_weights: bool) -> Built:
    try:
        import open_clip
    except ImportError as error:
        raise MissingExtraError("open_clip", "open_clip") from error
    architecture, _, tag = name.partition("/")
    if architecture not in open_clip.list_models():
        close = difflib.get_close_matches(architecture, open_clip.list_models(), n=3)
        raise ModelLoadError(
            f"open_clip has no architecture {architecture!r}. Nearest: {', '.join(close) or 'none'}."
        )
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if not random_weights and tag not in tags:
        raise ModelLoadError(
            f"open_clip:{architecture} needs one of these tags after a slash: {', '.join(tags)}."
        )
    model, _, transform = open_clip.create_model_and_transforms(
        architecture, pretrained=None if random_weights else tag, force_image_size=size
    )
    return model, transform, size or _pair(model.visual.image_size)


# -- sizes, devices --------------------------------------------------------------------------------


def _pair(size: Any) -> tuple[int, int]:
    return (int(size), int(size)) if isinstance(size, int | float) else (int(size[0]), int(size[1]))


def _native_size(module: nn.Module) -> tuple[int, int]:
    """The image size that a model's own configuration names, or 224."""
    for part in module.modules():
        timm_size = getattr(getattr(part, "patch_embed", None), "img_size", None)
        if timm_size:
            return _pair(timm_size)
    if getattr(module, "pretrained_cfg", None):
        return _pair(module.pretrained_cfg["input_size"][1:])  # type: ignore[index]
    config: Any = getattr(module, "config", None)
    for owner in (config, module):
        size = getattr(owner, "image_size", None)
        if isinstance(size, int | tuple | list):
            return _pair(size)
    if hasattr(config, "num_patches"):  # SigLIP 2 takes any size; its own is the square of its positions
        return _pair(config.patch_size * math.isqrt(config.num_patches))
    return (224, 224)


def _refuse_partial_patches(module: nn.Module, size: tuple[int, int]) -> None:
    """Sizes that are no multiple of the patch would be cropped, padded or refused, by library."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d) and part.kernel_size == part.stride and part.stride[0] > 4:
            rows, columns = part.stride
            if size[0] % rows or size[1] % columns:
                near = " or ".join(str(rows * k) for k in (size[0] // rows, size[0] // rows + 1) if k)
                raise ModelLoadError(
                    f"size {size[0]}x{size[1]} is not a multiple of the patch of {rows}x{columns} pixels;"
                    f" use {near}."
                )
            return


def _device(device: str | torch.device) -> torch.device:
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
        raise ModelLoadError(f"unknown dtype {dtype!r}; use float32, bfloat16 or float16.")
    return found
