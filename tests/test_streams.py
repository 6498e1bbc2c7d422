"""Blocks of every signature: read, fixed and set free again, they answer as the plain model does."""

import copy
from functools import cache
from typing import Any

import pytest
import torch
from catalog import CATALOG, SMALL, images, randomise, timm_model
from signatures import SIGNATURES
from torch import Tensor, nn

import vitreg
from vitreg import UnsupportedModelError
from vitreg.fixes import Fix
from vitreg.neurons import RegisterNeuron, RegisterNeurons
from vitreg.probe import evaluating

NEURONS = {0: [3, 7], 1: [11, 5]}
MARKED = RegisterNeurons((RegisterNeuron(0, 3, threshold=0.5), RegisterNeuron(1, 11, threshold=0.5)))


@cache
def plain() -> vitreg.Backbone:
    torch.manual_seed(0)
    settings = {"depth": 2, "img_size": 32, "num_classes": 5}
    return vitreg.wrap(randomise(timm_model("vit_small_patch16_224", **settings)()).eval())


def signed(name: str) -> vitreg.Backbone:
    return vitreg.wrap(SIGNATURES[name].wrapped(plain().model))


@cache
def fixes() -> dict[str, Fix]:
    vit = plain()
    with evaluating(vit.model), vitreg.trace(vit) as t:
        vit(images(vit))
    norms = t.norms[0][:, vit.layout.patch_slice]
    return {
        "registers": vitreg.TestTimeRegisters(NEURONS, registers=2, peak_over="patches"),
        "splitting": vitreg.TokenSplitting(MARKED, capacity=0.5),
        "bias": vitreg.AttentionBias.calibrate(vit, [images(vit)], vitreg.RegisterNeurons.of(NEURONS)),
        "in-painting": vitreg.Inpainting(layer=0, threshold=float(norms.quantile(0.8))),
        "projection": vitreg.Projection(vitreg.RegisterNeurons(()), torch.eye(1, 32), torch.zeros(32)),
        "shift average": vitreg.ShiftAverage(views=2),
        "positions": vitreg.PositionRepair.calibrate(vit, patches=[3]),
    }


def seen(vit: vitreg.Backbone) -> list[Tensor]:
    """The model's answer, and all that a trace records of the pass."""
    inside = vitreg.trace(vit, neurons=True, attention="full", qkv=True, layers=[1])
    with evaluating(vit.model), inside, vitreg.trace(vit, residuals=True, embedding=True) as t:
        output = vit(images(vit))
    names = ("neurons", "attention", "q", "k", "v")
    return [output, t.residuals, t.embedding, *(getattr(inside, name) for name in names)]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(
        x.shape == y.shape and torch.allclose(x, y, atol=1e-4, rtol=1e-4)
        for x, y in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("name", SIGNATURES)
def test_every_signature_is_read_fixed_and_set_free(name: str) -> None:
    vit, reference = signed(name), plain()
    before = seen(vit)
    assert equal(before, seen(reference))
    for kind, fix in fixes().items():
        with fix.applied_to(reference):
            expected = seen(reference)
        assert not equal(expected, before), kind  # the fix does something
        with fix.applied_to(vit):
            assert equal(seen(vit), expected), kind
            assert len(vit.model.state_dict()) == len(reference.model.state_dict())
        assert all(torch.equal(x, y) for x, y in zip(seen(vit), before, strict=True)), kind
