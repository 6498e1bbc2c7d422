"""Streams in lock-step: a fixed model that runs two images block by block gives each its own answer."""

from typing import Any

import pytest
import torch
from catalog import CATALOG, images
from looking import close
from torch import Tensor

import vitreg
from vitreg.fixes.neurons import RegisterNeuron, RegisterNeurons

NEURONS = RegisterNeurons.of({0: [1, 5], 1: [3]})
MARKED = RegisterNeurons((RegisterNeuron(0, 1, threshold=0.2), RegisterNeuron(1, 3, threshold=0.2)))
FIXES: dict[str, Any] = {
    "registers": vitreg.TestTimeRegisters(NEURONS, 2),
    "splitting": vitreg.TokenSplitting(MARKED, capacity=0.5),
}


def stream_into_blocks(vit: vitreg.Backbone, batch: Tensor) -> Tensor:
    entered: list[Tensor] = []
    with vit.model.blocks[0].register_forward_pre_hook(lambda module, args: entered.append(args[0])):
        vit(batch)
    return entered[0].clone()


@torch.no_grad()
@pytest.mark.parametrize("kind", FIXES)
@pytest.mark.parametrize("order", [[0, 1], [1, 0]], ids=["same order", "crossed"])
def test_each_stream_has_its_own(kind: str, order: list[int]) -> None:
    vit = CATALOG["timm vit"].backbone()
    batches = [images(vit, 2), images(vit, 2, seed=7)]
    streams = [stream_into_blocks(vit, batch) for batch in batches]
    with FIXES[kind].applied_to(vit):
        alone = []
        for x in streams:
            for block in vit.model.blocks:
                x = block(x)
            alone.append(x)
        for i, block in enumerate(vit.model.blocks):
            for j in order if i % 2 else [0, 1]:
                streams[j] = block(streams[j])
    close(streams, alone, 1e-6)


@torch.no_grad()
@pytest.mark.parametrize("kind", FIXES)
def test_a_block_in_the_middle_that_is_called_on_its_own_is_refused(kind: str) -> None:
    vit = CATALOG["timm vit"].backbone()
    x = stream_into_blocks(vit, images(vit))
    with FIXES[kind].applied_to(vit), pytest.raises(
        vitreg.UnsupportedModelError, match="block 1 runs, and nothing of block 0 came with its stream"
    ):  # fmt: skip
        vit.model.blocks[1](x)


@torch.no_grad()
@pytest.mark.parametrize("kind", [*FIXES, "bias"])
@pytest.mark.parametrize("name", ["hf dinov2 registers step by step", "hf beit step by step", "hf clip"])
def test_a_model_that_returns_its_attention_returns_its_own_shape(kind: str, name: str) -> None:
    vit = CATALOG[name].backbone()
    vit.model.set_attn_implementation("eager")
    batch = images(vit)
    fix = FIXES.get(kind) or vitreg.AttentionBias.calibrate(vit, [batch], NEURONS)
    vit.model.config.output_attentions = True
    plain = vit(batch).attentions
    with fix.applied_to(vit):
        fixed = vit(batch).attentions
    assert [x.shape for x in fixed] == [x.shape for x in plain]
    assert len(plain) == 3
    assert not torch.equal(fixed[2], plain[2])
