"""A tiny self-supervised recipe."""

from pathlib import Path
from typing import Any

from vitreg.training.self_supervised import SelfSupervised

TINY: dict[str, Any] = {
    "model_args": {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "drop_path_rate": 0.1},
    "registers": 2,
    "image_size": 32,
    "local_size": 16,
    "local_crops": 2,
    "output_dim": 32,
    "hidden_dim": 24,
    "bottleneck_dim": 16,
    "batch_size": 8,
    "micro_batch": 4,
    "steps": 4,
    "warmup": 1,
    "lr": 1e-2,
    "neighbours": 3,
    "log_every": 1,
    "diagnose_every": 0,
}


def tiny(data: Path | str, **settings: Any) -> SelfSupervised:
    return SelfSupervised(about="", expected="", cost="", data=str(data), **TINY | settings)
