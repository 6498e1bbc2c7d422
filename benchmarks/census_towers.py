"""The census: the vision towers inside transformers' multimodal models, small and with random weights."""

import inspect
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from census_builds import GRID, Attempt, NotBuiltError, known, refuse_too_large
from census_checks import pair
from torch import nn

SMALL: dict[str, Any] = {
    "num_hidden_layers": 2,
    "depth": 2,
    "fullatt_block_indexes": [1],
    "deepstack_visual_indexes": [1],
    "global_attn_indexes": [1],
}


def tower_names() -> dict[str, str]:
    """Every class that takes pixels, or patches and their grids, and has the vision configuration of a
    multimodal model; and the type of that model."""
    return {kind.__name__: model_type for kind, model_type in sorted(_towers(), key=lambda x: x[0].__name__)}


def tower_attempts(name: str) -> Iterator[Attempt]:
    kind = next(kind for kind, _ in _towers() if kind.__name__ == name)
    native = kind.config_class()
    patch = pair(getattr(native, "patch_size", None))
    if patch is None:
        raise NotBuiltError("its configuration names no patch size")
    size = (GRID[0] * patch[0], GRID[1] * patch[1])

    def maker(**shrunk: Any) -> Any:
        def build() -> nn.Module:
            config = kind.config_class(**known(native, shrunk))
            refuse_too_large(lambda: kind(config))
            return kind(config)

        return build

    yield Attempt(maker(**SMALL, image_size=size), size)
    yield Attempt(maker(**SMALL), size)
    yield Attempt(maker(**SMALL))


def _towers() -> Iterator[tuple[Any, str]]:
    import transformers
    from transformers.models.auto import configuration_auto

    transformers.logging.set_verbosity_error()
    for model_type in configuration_auto.CONFIG_MAPPING_NAMES:
        config = _vision_config(configuration_auto.CONFIG_MAPPING[model_type])
        if config is None:
            continue
        try:
            code = import_module(config.__module__.replace("configuration_", "modeling_"))
        except ModuleNotFoundError:
            continue
        yield from (
            (kind, model_type) for kind in vars(code).values() if _is_tower(kind, config, code.__name__)
        )


def _vision_config(config: Any) -> Any:
    """The class of the configuration of a model's vision tower, where that is a model of its own family."""
    inner = (getattr(config, "sub_configs", None) or {}).get("vision_config")
    own = inner is not None and inner.__module__.startswith("transformers.models.")
    return inner if own and ".auto." not in inner.__module__ else None


def _is_tower(kind: Any, config: Any, module: str) -> bool:
    own = inspect.isclass(kind) and issubclass(kind, nn.Module) and kind.__module__ == module
    if not own or getattr(kind, "config_class", None) is not config or "forward" not in vars(kind):
        return False
    arguments = list(inspect.signature(kind.forward).parameters)[1:]
    return arguments[:1] == ["pixel_values"] or "grid_thw" in arguments
