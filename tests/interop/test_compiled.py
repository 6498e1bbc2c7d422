"""A fixed model that is compiled in any way, before or after the fix, gives the eager answer.

Whole graphs and models compiled in place are in contract/test_fix_contract.py. The backend is aot_eager:
graphs of "eager" call PyTorch's functions, which a mode around a compiled layer sees a second time.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from wrapped import FIXES, images, model, wrap

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

Call = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def around(vit: nn.Module, backend: str) -> Call:
    def features(x: Tensor) -> Tensor:
        y: Tensor = vit(x * 1.0)
        return y + 0

    return torch.compile(features, backend=backend)


def blocks(vit: nn.Module, backend: str) -> Call:
    for block in vit.blocks:
        block.compile(backend=backend)
    return vit


def layers(vit: nn.Module, backend: str) -> Call:
    for block in vit.blocks:
        block.mlp.fc2.compile(backend=backend)
        block.attn.compile(backend=backend)
    return vit


class Broken(nn.Module):
    """An activation function that Dynamo cannot trace."""

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return nn.functional.gelu(x)


def blocks_with_breaks(vit: nn.Module, backend: str) -> Call:
    for block in vit.blocks:
        block.mlp.act = Broken()
    return blocks(vit, backend)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


CASES = [
    *[(way, name) for way in (blocks, layers) for name in ("registers", "splitting", "bias")],
    *[(way, "registers") for way in (around, blocks_with_breaks)],
]


def output(run: Call, x: Tensor) -> Tensor:
    with torch.no_grad():
        return run(x)


@pytest.mark.parametrize(("way", "name"), CASES)
def test_compiled_before_and_after_the_fix(way, name):
    fix, vit, x = FIXES[name](), model(), images()
    eager = copy.deepcopy(vit)
    plain = output(eager, x)
    with fix.applied_to(wrap(eager)):
        fixed = output(eager, x)
    run = way(vit, "aot_eager")
    close(output(run, x), plain)
    handle = fix.apply(vit)
    close(output(run, x), fixed)
    handle.undo()
    close(output(run, x), plain)
    torch._dynamo.reset()
    vit = model()
    handle = fix.apply(vit)
    run = way(vit, "aot_eager")  # fixed first
    close(output(run, x), fixed)
    handle.undo()
    close(output(run, x), plain)


@pytest.mark.parametrize("name", ["registers"])
def test_regional_compilation_with_inductor(name):
    fix, vit = FIXES[name](), model()
    eager = copy.deepcopy(vit)
    with fix.applied_to(wrap(eager)):
        expected = output(eager, images())
    run = blocks(vit, "inductor")
    with fix.applied_to(vit):
        close(output(run, images()), expected)
    close(output(run, images()), output(eager, images()))
