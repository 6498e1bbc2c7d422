"""Small checkpoints as they lie in a folder or a hub's cache, and what loading says of a bad one."""

import os
import shutil
from pathlib import Path

import pytest
import timm
import torch

import vitreg
from vitreg.models.loading import load

SMALL_HF = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def tiny_timm(**kwargs):
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
    return timm.create_model("vit_tiny_patch16_224", **(sizes | kwargs)).eval()


def into_cache(folder: Path, repo: str) -> None:
    """Put a folder into the hub's local cache, as a download would have."""
    home = Path(os.environ["HF_HUB_CACHE"]) / f"models--{repo.replace('/', '--')}"
    shutil.copytree(folder, home / "snapshots" / "abc123", dirs_exist_ok=True)
    (home / "refs").mkdir(exist_ok=True)
    (home / "refs" / "main").write_text("abc123")


def rewrite_weights(folder: Path, change) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def message(name: str, **kwargs) -> str:
    with pytest.raises(vitreg.VitregError) as caught:
        load(name, **kwargs)
    assert isinstance(
        caught.value, vitreg.ModelLoadError | vitreg.UnsupportedModelError | vitreg.NonFiniteError
    )
    return str(caught.value)
