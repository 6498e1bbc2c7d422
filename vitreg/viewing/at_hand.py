"""The model that `vitreg look` takes when none is named: a small one with artifacts of its own.

DEFAULT has 22 MB, and its artifacts are known well (README): whoever has never seen an artifact sees some. It
comes from the hub's cache, or from the hub. Without either, the bundled example stands in, and says so.
"""

from dataclasses import replace
from pathlib import Path

import torch

from vitreg.errors import ModelLoadError
from vitreg.models.backbone import Backbone
from vitreg.models.loading import load, torch_device
from vitreg.phantoms.bundled import planted_example

DEFAULT = "timm:vit_tiny_patch16_224.augreg_in21k_ft_in1k"

# Seconds after which the hub is taken to be out of reach.
PATIENCE = 3.0


def model_at_hand(device: str | torch.device = "cpu") -> tuple[Backbone, str]:
    """The default model, or the bundled example; and what there is to say about the choice."""
    said = f"no model was named: this is {DEFAULT} (--model names another)"
    folder = _cached(DEFAULT)
    if folder is not None:
        return replace(load(str(folder), device=device), name=DEFAULT), said
    if _hub_answers():
        try:
            return load(DEFAULT, device=device), said
        except ModelLoadError:
            pass  # it answers, but does not give the model: a firewall, a full disk
    said = (
        f"no model was named, and {DEFAULT} can be had neither from the hub nor from its cache. This is the"
        " bundled example, a small model that knows drawn shapes alone, with planted artifacts. --model names"
        " another, which may be a local folder"
    )
    _, phantom, _ = planted_example()
    return phantom.vit.with_model(phantom.vit.model.to(torch_device(device)), "the example ViT"), said


def _cached(name: str) -> Path | None:
    """The folder in the hub's cache that holds a model of timm, whole."""
    from huggingface_hub import try_to_load_from_cache

    repository = f"timm/{name.removeprefix('timm:')}"
    files = [try_to_load_from_cache(repository, file) for file in ("config.json", "model.safetensors")]
    return Path(files[0]).parent if all(isinstance(file, str) for file in files) else None  # type: ignore[arg-type]


def _hub_answers() -> bool:
    """Whether the hub can be reached, by whatever proxy is set. Its own retries take most of a minute."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception:  # of whatever library does the request
        return False
    return True
