"""With a fix, a wrapped, adapted or quantised model equals its dense twin with the same fix."""

import copy
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from wrapped import FIXES, WRAPPERS, Beside, Sequence, Wrapper, _behind, _beside, images, model, wrap

import vitreg
from vitreg.fixes.neurons import RegisterNeurons
from vitreg.models.fingerprint import Fingerprint, weights_hash

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
LIBRARIES = {
    **dict.fromkeys(("LoRA", "DoRA", "IA3"), "peft"),
    **dict.fromkeys(("offloaded", "dispatched", "hooked"), "accelerate"),
    "torchao": "torchao",
    "quanto": "optimum.quanto",
    "bitsandbytes": "bitsandbytes",
}


def output(module: nn.Module) -> Tensor:
    with torch.no_grad():
        return module(images())


def same(one: Tensor, other: Tensor, close: float) -> bool:
    return bool((one - other).abs().max() <= close * other.abs().max())


@pytest.fixture(params=WRAPPERS)
def wrapper(request) -> Wrapper:
    library = next((library for name, library in LIBRARIES.items() if name in request.param), None)
    if library:
        pytest.importorskip(library)
    return WRAPPERS[request.param]


# ShiftAverage runs its views through a copy of the model, which shares the weights and nothing else; and
# PositionRepair edits the patch embedding, which quanto replaces.
OFFLOADED = {"offloaded", "offloaded to disk"}
REFUSED_BEFORE = {"shift-average": set(WRAPPERS) - {"torchao"}, "positions": {"quanto"}}
REFUSED_AFTER = {"shift-average": OFFLOADED}
# These change less of noise than three times what 8-bit activations do, so that the product shows nothing.
TOO_COARSE = {
    (wrapper, fix)
    for wrapper in ("bitsandbytes, 8 bits", "PyTorch's dynamic quantisation")
    for fix in ("shift-average", "positions")
}


def refused_if(refused: bool, reason: str) -> AbstractContextManager[Any]:
    return pytest.raises(vitreg.UnsupportedModelError, match=reason) if refused else nullcontext()


@pytest.mark.slow
@pytest.mark.parametrize("name", FIXES)
def test_a_fix_before_and_after_the_wrapping(wrapper, name):
    kind = next(kind for kind, known in WRAPPERS.items() if known is wrapper)
    if (kind, name) in TOO_COARSE:
        pytest.skip("the fix does less to noise than the quantisation")
    refused_before = kind in REFUSED_BEFORE.get(name, ())
    refused_after = kind in REFUSED_AFTER.get(name, ())
    fix = FIXES[name]()
    wrapped = wrapper.wrap(model())
    twin = wrapper.dense(wrapped, model())
    plain = output(wrapped)
    assert same(plain, output(twin), wrapper.close)
    with fix.applied_to(wrap(twin)):
        expected = output(twin)
    assert not same(expected, plain, 3 * wrapper.close)
    with refused_if(refused_after, "offloaded"), fix.applied_to(wrap(wrapped)):
        assert same(output(wrapped), expected, wrapper.close)
    assert torch.equal(output(wrapped), plain)
    first = model()
    handle = fix.apply(wrap(first))
    wrapped = wrapper.wrap(first)
    with refused_if(refused_before, "was applied"):
        assert same(output(wrapped), expected, wrapper.close)
    handle.undo()
    assert torch.equal(output(wrapped), plain)
    with refused_if(refused_after, "offloaded"), fix.applied_to(wrap(wrapped)):
        assert same(output(wrapped), expected, wrapper.close)


class Around(nn.Module):
    """What many repositories put around a block: something that times or logs it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.block(*args, **kwargs)


AROUND_A_BLOCK = {
    "a module": Around,
    "checkpoints": partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.NO_REENTRANT),
    "torch.compile": partial(torch.compile, backend="eager"),
}


@pytest.mark.slow
@pytest.mark.parametrize("around", AROUND_A_BLOCK)
@pytest.mark.parametrize("name", FIXES)
def test_a_fix_before_and_after_something_is_put_around_blocks(name, around):
    fix, plain = FIXES[name](), output(model())
    with fix.applied_to(wrap(twin := model())):
        expected = output(twin)

    def put_around(vit: nn.Module) -> nn.Module:
        for index, block in enumerate(vit.blocks):
            vit.blocks[index] = AROUND_A_BLOCK[around](block)
        return vit

    first = model()
    handle = fix.apply(wrap(first))
    put_around(first)
    with refused_if(name == "shift-average", "was applied"):
        assert same(output(first), expected, 1e-5)
    handle.undo()
    assert torch.equal(output(first), plain)
    last = put_around(model())
    if around == "torch.compile":
        with pytest.raises(vitreg.UnsupportedModelError, match="compile afterwards"):
            fix.apply(wrap(last))
        return
    with fix.applied_to(wrap(last)):
        assert same(output(last), expected, 1e-5)
    assert torch.equal(output(last), plain)


def test_what_is_read_of_a_wrapped_model(wrapper):
    """Its neurons, and the weights that rank them."""
    wrapped = wrapper.wrap(model())
    vit, twin = wrap(wrapped), wrap(wrapper.dense(wrapped, model()))
    assert vit.anatomy.neurons == twin.anatomy.neurons == 128
    traces = []
    for each in (vit, twin):
        with torch.no_grad(), vitreg.trace(each, neurons=True) as t:
            each(images())
        traces.append(t.neurons)
    assert same(*traces, close=wrapper.close)
    assert str(vitreg.diagnose(vit, [images()])).splitlines()[0]


def test_the_weights_are_those_of_the_dense_twin_or_unknown(wrapper):
    wrapped = wrapper.wrap(model())
    found = weights_hash(wrap(wrapped))
    if wrapper.close < 1e-4:
        assert found == weights_hash(wrap(wrapper.dense(wrapped, model())))
    else:
        assert found is None


def test_a_fix_whose_weights_cannot_be_told_warns_once():
    pytest.importorskip("torchao")
    fix = vitreg.TestTimeRegisters(
        replace(RegisterNeurons.of({1: [3]}), fingerprint=Fingerprint.of(wrap(model())))
    )
    vit = wrap(WRAPPERS["torchao"].wrap(model()))
    with pytest.warns(vitreg.FixWarning, match="cannot be told"):
        fix.apply(vit).undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fix.apply(vit).undo()


# -- adapters that are not linear ------------------------------------------------------------------


class Edited(nn.Module):
    """The neurons of one block edited where they enter what follows, by plain code."""

    def __init__(self, layer: nn.Module, neurons: list[int]) -> None:
        super().__init__()
        self.layer, self.neurons = layer, neurons

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.index_fill(-1, torch.tensor(self.neurons), 0))


@pytest.mark.parametrize("adapted", [_beside(nn.ReLU), _behind], ids=["beside", "behind"])
def test_an_adapter_that_is_not_linear(adapted):
    neurons = {1: [0, 4, 9], 2: [7]}
    vit = adapted(model())
    expected = copy.deepcopy(vit)
    for layer, indices in neurons.items():
        mlp = expected.blocks[layer].mlp
        mlp = mlp.mlp if isinstance(mlp, Sequence) else mlp
        mlp.fc2 = Edited(mlp.fc2, indices)
    with vitreg.TestTimeRegisters(neurons, registers=0).applied_to(wrap(vit)):
        assert same(output(vit), output(expected), 1e-5)


def test_a_token_is_not_split_where_what_neurons_write_depends_on_the_others():
    vit = _beside(nn.ReLU)(model())
    assert isinstance(vit.blocks[0].mlp.fc2, Beside)
    with pytest.raises(vitreg.UnsupportedModelError, match="not linear"):
        FIXES["splitting"]().apply(wrap(vit))


def test_artifacts_are_not_planted_into_weights_that_cannot_be_set():
    pytest.importorskip("peft")
    vit = wrap(WRAPPERS["LoRA everywhere"].wrap(model()))
    with pytest.raises(vitreg.UnsupportedModelError, match="merge_and_unload"):
        vitreg.phantoms.phantom.plant(vit, [images(4)], layer=1)


def test_checkpointing_within_a_fixed_block_is_refused():
    vit = model()
    mlp = vit.blocks[1].mlp
    own = mlp.forward
    mlp.forward = lambda x: torch.utils.checkpoint.checkpoint(own, x, use_reentrant=False)
    with (
        FIXES["registers"]().applied_to(wrap(vit)),
        pytest.raises(vitreg.UnsupportedModelError, match="Checkpoint whole blocks"),
    ):
        vit(images().requires_grad_()).sum().backward()
