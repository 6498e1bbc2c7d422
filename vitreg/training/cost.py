"""What registers cost: operations, parameters and speed of a forward pass.

    cost(model, 224).flops                 # of one photo, counted by torch
    cost(counted("vit_large_patch14_224", 4), 224)      # without weights, in no memory
    seconds([plain, with_registers], 224)  # timed in turn

A multiplication and an addition are two operations (FLOPs). As in torch's counter, those of norms, softmax
and activations are left out.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitreg.models.loading import build_timm
from vitreg.models.probe import evaluating


@dataclass(frozen=True)
class Cost:
    """FLOPs of a forward pass of one photo, and parameters."""

    flops: int
    parameters: int


# By how much the FLOPs of a forward pass grow at most, {registers: share} (Darcet et al., appendix).
CLAIMED = {4: 0.02, 16: 0.06}
# The paper's DINOv2 is a ViT-L/14, its DeiT-III and OpenCLIP are ViT-B/16; all at 224 pixels.
PAPERS_MODELS = {"ViT-B/16": "vit_base_patch16_224", "ViT-L/14": "vit_large_patch14_224"}


def cost(model: nn.Module, image_size: int) -> Cost:
    """Count what a model does with one square photo, on the device it is on; meta will do.

    Attention runs as plain matrix products meanwhile: some versions of torch know not all of its kernels.
    """
    photo = _photos(model, image_size, 1)
    with evaluating(model), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(photo)
    return Cost(counter.get_total_flops(), sum(parameter.numel() for parameter in model.parameters()))


def counted(name: str, registers: int, image_size: int = 224) -> nn.Module:
    """A timm ViT with timm's own registers and no head, on the meta device: for its cost alone."""
    tokens = {"reg_tokens": registers, "no_embed_class": True}
    with torch.device("meta"):
        return build_timm(name, num_classes=0, img_size=image_size, **tokens)


def papers_models(registers: Sequence[int], image_size: int = 224) -> dict[str, list[Cost]]:
    """{"ViT-B/16": [the cost with each number of registers], "ViT-L/14": ...}"""
    return {
        title: [cost(counted(name, n, image_size), image_size) for n in registers]
        for title, name in PAPERS_MODELS.items()
    }


def seconds(
    models: Sequence[nn.Module], image_size: int, *, batch: int = 32, rounds: int = 15
) -> Float[np.ndarray, "rounds models"]:
    """How long a forward pass of `batch` photos takes, in float32 where the weights are.

    All models run in each round, so that what else the machine does befalls all of them alike; each round
    starts with another one. A first round is not counted.
    """
    photos = [_photos(model, image_size, batch) for model in models]
    times = np.zeros((rounds + 1, len(models)))
    for i in range(rounds + 1):
        for j in np.roll(np.arange(len(models)), -i).tolist():
            times[i, j] = _timed(models[j], photos[j])
    return times[1:]


def _timed(model: nn.Module, photos: torch.Tensor) -> float:
    with evaluating(model):
        _wait(photos.device)
        started = time.perf_counter()
        model(photos)
        _wait(photos.device)
        return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _photos(model: nn.Module, image_size: int, batch: int) -> torch.Tensor:
    weight = next(model.parameters())
    return torch.zeros(batch, 3, image_size, image_size, device=weight.device, dtype=weight.dtype)
