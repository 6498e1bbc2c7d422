"""FLOPs are counted as they are by hand, without weights, and time is taken in turn."""

import pytest
import timm
import torch
from torch import nn

from vitreg.errors import ModelLoadError
from vitreg.training import cost as module
from vitreg.training.cost import CLAIMED, cost, counted, papers_models, seconds

pytestmark = pytest.mark.slow


def by_hand(tokens: int, width: int, depth: int, patches: int, patch: int, classes: int) -> int:
    """2 operations for each weight and token; for attention, for each pair of tokens and channel, twice."""
    linear = (3 + 1 + 4 + 4) * width * width
    blocks = depth * (tokens * linear + 2 * tokens * tokens * width)
    return 2 * (patches * 3 * patch * patch * width + blocks + width * classes)


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_flops_are_those_by_hand_attention_included(registers, device):
    with torch.device(device):
        model = timm.create_model(
            "vit_tiny_patch16_224", img_size=64, depth=2, num_classes=5, reg_tokens=registers,
            no_embed_class=True,
        )  # fmt: skip
    found = cost(model, 64)
    assert found.flops == by_hand(17 + registers, 192, 2, 16, 16, 5)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert model.training


def test_the_papers_claims_about_its_own_model():
    """256 patches and CLS; the claims hold about as they are stated, not to the last digit."""
    costs = papers_models([0, 4, 16])["ViT-L/14"]
    four, sixteen = (c.flops / costs[0].flops - 1 for c in costs[1:])
    assert costs[0].flops == by_hand(257, 1024, 24, 256, 14, 0)
    assert four < CLAIMED[4]
    assert 0.06 < sixteen < 0.065
    assert costs[1].parameters - costs[0].parameters == 4 * 1024


def test_no_weights_are_made():
    assert {p.device.type for p in counted("vit_base_patch16_224", 2).parameters()} == {"meta"}
    with pytest.raises(ModelLoadError, match="timm has no model 'vit_bose_patch16_224'"):
        counted("vit_bose_patch16_224", 0)


class Slow(nn.Module):
    """Notes when it runs, and takes as long as it is told."""

    def __init__(self, name: str, units: int, ran: list[str]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.name, self.units, self.ran = name, units, ran

    def forward(self, photos: torch.Tensor) -> None:
        self.ran.append(self.name)
        now[0] += self.units * len(photos)


now = [0.0]


def test_models_are_timed_in_turn(monkeypatch):
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    ran: list[str] = []
    times = seconds([Slow("a", 1, ran), Slow("b", 3, ran)], 8, batch=2, rounds=3)
    assert times.tolist() == [[2, 6]] * 3
    assert "".join(ran) == "ab" "ba" "ab" "ba"  # fmt: skip
