"""The census: how each model of timm and transformers is built, small and with random weights."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from census_checks import pair, stride_of
from torch import nn

LARGEST = 4e9  # bytes of parameters that are built
GRID = (12, 6)  # patches of a small image: not square, so that rows and columns cannot be swapped unseen


@dataclass
class Attempt:
    """One way to build a model; the size is None for the model's own."""

    build: Callable[[], nn.Module]
    size: tuple[int, int] | None = None


class NotBuiltError(Exception):
    """The library cannot build or run this model here; vitreg was not asked."""


def not_built(error: Exception) -> NotBuiltError:
    if isinstance(error, NotBuiltError):
        return error
    return NotBuiltError(f"{type(error).__name__}: {one_line(error)}")


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500] or "no message"


# -- timm ------------------------------------------------------------------------------------------


def timm_names() -> dict[str, str]:
    """Every model name and the module that defines it."""
    import timm

    found = {name: module for module in timm.list_modules() for name in timm.list_models(module=module)}
    return {name: found[name] for name in timm.list_models()}


def timm_attempts(name: str) -> Iterator[Attempt]:
    import timm

    def maker(**shrunk: Any) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            make = lambda: timm.create_model(name, pretrained=False, **shrunk)  # noqa: E731
            refuse_too_large(make)
            return make()

        return build

    size = small_size(lambda: timm.create_model(name, pretrained=False))
    # Some name the key-value heads of each block, in a list that two blocks would not fit.
    for shrunk in ({"depth": 2}, {"depth": 2, "num_kv_heads": 4}):
        if size:
            yield Attempt(maker(**shrunk, img_size=size), size)
        yield Attempt(maker(**shrunk))
    if size:
        yield Attempt(maker(img_size=size), size)
    yield Attempt(maker())


def small_size(make: Callable[[], nn.Module]) -> tuple[int, int] | None:
    """GRID patches of the model's own patch size, read from a build without memory."""
    try:
        with torch.device("meta"):
            model = make()
    except Exception:
        return None
    strides = (stride_of(getattr(module, "patch_embed", None)) for module in model.modules())
    patch = next((stride for stride in strides if stride), None)
    return (GRID[0] * patch[0], GRID[1] * patch[1]) if patch else None


def refuse_too_large(make: Callable[[], nn.Module]) -> None:
    try:
        with torch.device("meta"):
            model = make()
    except NotImplementedError:
        return  # it computes with its weights while being built; none of these is large
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if size > LARGEST:
        raise NotBuiltError(f"too large: {size / 1e9:.1f} GB of parameters")


# -- transformers ----------------------------------------------------------------------------------


def transformers_names() -> dict[str, str]:
    """Every class of the backbone, image classification and image model mappings, and its model type."""
    import transformers
    from transformers.models.auto import configuration_auto, modeling_auto

    transformers.logging.set_verbosity_error()
    found: dict[str, str] = {}
    for mapping in ("BACKBONE", "IMAGE_CLASSIFICATION", "IMAGE"):
        names = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES")
        for model_type, classes in names.items():
            if model_type in configuration_auto.CONFIG_MAPPING_NAMES:
                for cls in (classes,) if isinstance(classes, str) else classes:
                    found.setdefault(cls, model_type)
    return dict(sorted(found.items()))


def transformers_attempts(name: str) -> Iterator[Attempt]:
    import transformers

    config_class = getattr(transformers, name).config_class
    native = config_class()
    vision = getattr(native, "vision_config", native)
    patch = pair(getattr(vision, "patch_size", None))
    size = (GRID[0] * patch[0], GRID[1] * patch[1]) if patch else None

    def maker(**shrunk: Any) -> Callable[[], nn.Module]:
        return lambda: build_transformers(name, shrunken(config_class, native, shrunk))

    # Masked autoencoders without their mask, as one would run them on whole images.
    small: dict[str, Any] = {"num_hidden_layers": 2, "mask_ratio": 0.0}
    if size:
        yield Attempt(maker(**small, image_size=size), size)
        yield Attempt(maker(**small), size)
    yield Attempt(maker(**small))
    yield Attempt(maker())


def shrunken(config_class: Any, native: Any, shrunk: dict[str, Any]) -> Any:
    """A configuration with smaller numbers where it has them, and the same in its parts."""
    parts = [part for part in ("vision_config", "text_config") if hasattr(native, part)]
    if parts:
        return config_class(**{part: known(getattr(native, part), shrunk) for part in parts})
    return config_class(**known(native, shrunk))


def known(config: Any, shrunk: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in shrunk.items() if hasattr(config, key)}


def build_transformers(name: str, config: Any) -> nn.Module:
    """The model of this class, or of its vision part alone where the whole is too large."""
    import transformers

    from vitreg.models.from_transformers import vision_towers

    cls = getattr(transformers, name)
    try:
        refuse_too_large(lambda: cls(config))
        whole = cls(config)
    except NotBuiltError:
        if not hasattr(config, "vision_config"):
            raise
        whole = transformers.AutoModel.from_config(config.vision_config)
    return next(vision_towers(whole))


NAMES = {"timm": timm_names, "transformers": transformers_names}
ATTEMPTS = {"timm": timm_attempts, "transformers": transformers_attempts}
