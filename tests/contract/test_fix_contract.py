"""What holds for a model with a fix on it: one contract, checked on the whole catalog.

The fix is that of Jiang et al. (test-time registers), with neurons in two layers. The reference is a slow
one, image by image and neuron by neuron, by ordinary hooks on the unfixed model.
"""

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from catalog import CATALOG, FEW, STEP_BY_STEP, built, images
from looking import (
    activations,
    close,
    different,
    image_with_and_without_a_change,
    most_changed,
    removing,
    residuals,
    same,
    tensors,
)
from other_ways_to_run import (
    anatomy_of,
    checkpointed,
    compiled,
    gradients,
    pickled,
    saved_and_loaded,
    training,
    twin,
    unchecked,
)
from slow_registers import reference, replaced
from tiers import few_by_day
from torch import Tensor, nn
from torch._dynamo.exc import RecompileError
from torch.utils.checkpoint import checkpoint

import vitreg
from vitreg.diagnosis.statistics import query_tokens
from vitreg.fixes import TestTimeRegisters, applied
from vitreg.fixes.base import backbone_of
from vitreg.hooks.attention import AttentionCall
from vitreg.models.probe import first_tensor

NEURONS = {0: [3, 7], 1: [11, 5]}
FIX = TestTimeRegisters(NEURONS, registers=2)
OTHER = TestTimeRegisters({1: [2], 2: [20, 4]})

# What torch.compile traces differs with the code of a block: one model of each.
TRACED = [
    *FEW,
    "timm dinov2 swiglu",
    "timm eva02",
    "timm siglip",
    "timm relpos",
    "timm rope mixed",
    "timm pe core",
    "timm naflexvit",
    "timm parallel attention",
    "timm beit3",
    "hf dinov2 swiglu",
    "hf dinov3 gated",
    "hf clip",
    "hf siglip2",
    "hf vit",
    "hf data2vec",
    "hf aimv2",
    "hf internvl",
    "open_clip coca",
    "torchvision vit",
    *STEP_BY_STEP,
]


@pytest.fixture(params=CATALOG)
def vit(request: pytest.FixtureRequest) -> vitreg.Backbone:
    """A model that is built once: tests leave it as they found it."""
    return built(request.param)


@pytest.fixture(params=FEW)
def few(request: pytest.FixtureRequest) -> vitreg.Backbone:
    return built(request.param)


# -- the slow reference ----------------------------------------------------------------------------


# -- the numbers are right -------------------------------------------------------------------------


def test_every_token_after_every_block_is_that_of_the_reference(vit: vitreg.Backbone) -> None:
    plain = residuals(vit, images(vit, 3))
    with FIX.applied_to(vit):
        found = residuals(vit, images(vit, 3))
    expected = reference(vit, FIX)
    close(found, expected)
    assert different(found, plain)


def test_inert_registers_are_those_of_the_reference(vit: vitreg.Backbone) -> None:
    inert = TestTimeRegisters({}, registers=3)
    with inert.applied_to(vit):
        found = residuals(vit, images(vit, 3))
    close(found, reference(vit, inert))


def test_two_fixes_compose(vit: vitreg.Backbone) -> None:
    with FIX.applied_to(vit), OTHER.applied_to(vit):
        found = residuals(vit, images(vit, 3))
    close(found, reference(vit, FIX, OTHER))


def test_a_stream_that_is_edited_between_blocks_keeps_its_registers(vit: vitreg.Backbone) -> None:
    """Activation steering: a hook on a block returns a new tensor."""

    def steer(x: Tensor) -> Tensor:
        return x + torch.linspace(-1, 1, x.shape[-1])

    hook = vit.anatomy.block_modules(vit.model)[0].register_forward_hook(
        lambda module, args, output: replaced(output, steer(first_tensor(output)))
    )
    with removing([hook]), FIX.applied_to(vit):
        found = residuals(vit, images(vit, 3))
    close(found, reference(vit, FIX, after_block_0=steer))


class Seen(NamedTuple):
    """One attention call: logits before the mask are q k^T, after it q k^T + bias."""

    q: Tensor
    k: Tensor
    bias: Tensor


def attention_of_block_0(vit: vitreg.Backbone) -> Seen:
    seen: list[Seen] = []

    def keep(layer: int, call: AttentionCall) -> None:
        n = call.tokens
        mask = torch.zeros(1, 1, n, n) if call.mask is None else call.mask
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
        seen.append(Seen(call.q, call.k, mask.expand(*mask.shape[:-2], n, n)))

    with torch.no_grad(), vitreg.watch(vit, on_attention=keep):
        vit(images(vit))
    return seen[0]


def test_queries_keys_and_biases_of_the_models_own_tokens_are_unchanged(vit: vitreg.Backbone) -> None:
    """After rotary positions. The registers, which are zero, have one query and key each, and no bias."""
    plain = attention_of_block_0(vit)
    with FIX.applied_to(vit):
        fixed = attention_of_block_0(vit)
    start = vit.layout.patch_slice.start
    registers = list(range(start, start + 2))
    own = [t for t in range(vit.layout.tokens + 2) if t not in registers]
    close(fixed.q[:, :, own], plain.q)
    close(fixed.k[:, :, own], plain.k)
    assert torch.equal(fixed.bias[..., own, :][..., own], plain.bias)
    assert not fixed.bias[..., registers].any()
    hidden = plain.bias.amax(-2, keepdim=True) < -1e4  # from all tokens
    assert not fixed.bias[..., registers, :][..., own].masked_fill(hidden, 0).any()
    for x in (fixed.q, fixed.k):
        close(x[:, :, registers[0]], x[:, :, registers[1]], 1e-6)  # at no position, hence alike


# -- the faults of the research code ---------------------------------------------------------------


def test_each_image_is_edited_as_if_it_were_alone(few: vitreg.Backbone) -> None:
    batch = images(few, 3)
    with FIX.applied_to(few):
        together = residuals(few, batch)
        for i in range(3):
            close(residuals(few, batch[i : i + 1])[:, 0], together[:, i])


def test_each_neuron_has_a_peak_of_its_own(few: vitreg.Backbone) -> None:
    with FIX.applied_to(few):
        before, after = activations(few, 1, images(few, 3))
    start = few.layout.patch_slice.start
    for image in range(3):
        peaks = [float(before[image, :, neuron].max()) for neuron in NEURONS[1]]
        assert abs(peaks[0] - peaks[1]) > 1e-3  # or a shared one would not show
        for neuron, peak in zip(NEURONS[1], peaks, strict=True):
            assert after[image, start : start + 2, neuron].tolist() == [peak, peak]
            assert not after[image, :start, neuron].any()
            assert not after[image, start + 2 :, neuron].any()
    others = [i for i in range(before.shape[2]) if i not in NEURONS[1]]
    assert torch.equal(before[..., others], after[..., others])


def test_patches_stay_in_their_places(vit: vitreg.Backbone) -> None:
    """A change of one patch of the image changes that patch's token the most, in front of every block."""
    batch = image_with_and_without_a_change(vit, row=1, column=2)
    entering: list[Tensor] = []
    hooks = [
        block.register_forward_pre_hook(lambda *a: entering.append(first_tensor(a[1:])), with_kwargs=True)
        for block in vit.anatomy.block_modules(vit.model)[:2]
    ]
    inside: list[Tensor] = []
    with removing(hooks), FIX.applied_to(vit), torch.no_grad(), vitreg.watch(
        vit, on_attention=lambda layer, call: inside.append(call.v.transpose(1, 2).flatten(2))
    ) as seen:  # fmt: skip
        vit(batch)
        inner = seen.inner
    assert most_changed(*entering[0]) == vit.layout.patch(1, 2)
    assert most_changed(*inside[0]) == inner.patch(1, 2) == vit.layout.patch(1, 2) + 2
    plain = residuals(vit, batch)[0]
    assert most_changed(*entering[1]) == most_changed(*plain)


# -- nothing else about the model changes ----------------------------------------------------------


def described(output: Any) -> Any:
    """Types, keys and shapes of an output."""
    if isinstance(output, Tensor):
        return tuple(output.shape), output.dtype
    if isinstance(output, dict):
        return type(output), {key: described(value) for key, value in output.items()}
    if isinstance(output, tuple | list):
        return type(output), [described(value) for value in output]
    return output


@contextmanager
def giving_all(vit: vitreg.Backbone) -> Iterator[Callable[[Tensor], Any]]:
    """The model run so that it also gives what is between its blocks, where its library can."""
    config = getattr(vit.model, "config", None)
    if hasattr(vit.model, "forward_intermediates"):
        yield vit.model.forward_intermediates
    elif config is not None:
        config.output_hidden_states = True
        yield vit
        config.output_hidden_states = False
    else:
        yield vit


def test_outputs_keep_their_structure_and_weights_their_names(vit: vitreg.Backbone) -> None:
    weights = {name: value.clone() for name, value in vit.model.state_dict().items()}
    with torch.no_grad(), giving_all(vit) as run:
        plain, all_plain = vit(images(vit)), run(images(vit))
        with FIX.applied_to(vit):
            fixed, all_fixed = vit(images(vit)), run(images(vit))
            state = vit.model.state_dict()
    assert described(fixed) == described(plain)
    assert described(all_fixed) == described(all_plain)
    assert different(fixed, plain)
    assert list(state) == list(weights)
    assert all(torch.equal(state[name], value) for name, value in weights.items())


def test_undo_is_exact_and_leaves_nothing_behind(vit: vitreg.Backbone) -> None:
    before = anatomy_of(vit.model)
    with torch.no_grad():
        plain = vit(images(vit))
        handle = FIX.apply(vit)
        assert anatomy_of(vit.model) != before
        assert [a.fix for a in applied(vit.model)] == [FIX]
        vit(images(vit))
        handle.undo()
        assert anatomy_of(vit.model) == before
        assert applied(vit.model) == []
        assert same(vit(images(vit)), plain)


def test_a_fix_without_neurons_and_registers_changes_no_bit(vit: vitreg.Backbone) -> None:
    with torch.no_grad():
        plain = vit(images(vit))
        with TestTimeRegisters({}, registers=0).applied_to(vit):
            assert same(vit(images(vit)), plain)


def test_an_exception_on_the_way_leaves_nothing_behind(vit: vitreg.Backbone) -> None:
    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    within = vit.anatomy.down_projections(vit.model)[1]
    between = vit.anatomy.block_modules(vit.model)[1]
    with torch.no_grad(), FIX.applied_to(vit):
        expected, before = vit(images(vit)), anatomy_of(vit.model)
        for module in (within, between):
            with removing([module.register_forward_hook(fail)]), pytest.raises(KeyboardInterrupt):
                vit(images(vit, 3, seed=1))
            assert same(vit(images(vit)), expected)
            assert anatomy_of(vit.model) == before
    assert torch._C._len_torch_function_stack() == 0


# -- how else models are run -----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", few_by_day(TRACED))
def test_a_fixed_model_can_be_compiled_and_notices_the_undo(name: str) -> None:
    vit = built(name)
    with torch.no_grad(), FIX.applied_to(vit):
        fixed = vit(images(vit))
    with compiled(vit, backend="eager") as run:
        with FIX.applied_to(vit):
            close(run(images(vit)), fixed)
        with torch._dynamo.config.patch(error_on_recompile=True), pytest.raises(RecompileError):
            run(images(vit))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm vit", "hf dinov2", "timm beit"])
def test_a_compiled_model_sees_fixes_come_and_go(name: str) -> None:
    few = built(name)
    with compiled(few, backend="eager") as run:
        plain = few(images(few))
        close(run(images(few)), plain)
        with FIX.applied_to(few):
            fixed = few(images(few))
            close(run(images(few)), fixed)
            with OTHER.applied_to(few):
                close(run(images(few)), few(images(few)))
            close(run(images(few)), fixed)
        close(run(images(few)), plain)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm vit", "hf dinov2"])
def test_inductor_gives_the_eager_answer(name: str) -> None:
    vit = built(name)
    with FIX.applied_to(vit), compiled(vit) as run:
        close(run(images(vit)), vit(images(vit)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm vit", "hf dinov2"])
def test_a_model_that_was_compiled_in_place_can_be_fixed(name: str) -> None:
    few = built(name)
    vit = twin(few)
    with torch.no_grad(), FIX.applied_to(few):
        fixed = few(images(vit))
    torch._dynamo.reset()
    vit.model.compile(backend="eager", fullgraph=True)
    with torch.no_grad(), unchecked():
        plain = vit(images(vit))
        with FIX.applied_to(vit.model):
            close(vit(images(vit)), fixed)
        close(vit(images(vit)), plain, 1e-6)
    assert vit.model._compiled_call_impl is not None


def test_the_anatomy_of_a_compiled_model_is_found(few: vitreg.Backbone) -> None:
    whole = torch.compile(few.model, backend="eager")
    assert backbone_of(whole).model is few.model
    with FIX.applied_to(whole):
        assert applied(few.model)[0].fix == FIX
    parts = twin(few)
    for block in parts.anatomy.block_modules(parts.model):
        block.compile(backend="eager")
    assert backbone_of(parts.model).anatomy == backbone_of(few.model).anatomy


def test_training_with_and_without_gradient_checkpointing(vit: vitreg.Backbone) -> None:
    with training(vit):
        plain = gradients(vit)
        with FIX.applied_to(vit):
            fixed = gradients(vit)
            with checkpointed(vit):
                again = gradients(vit)
    assert len(fixed) == len(plain)
    assert all(x.isfinite().all() for x in fixed)
    assert different(fixed, plain)
    close(again, fixed)


def test_gradients_are_those_of_the_function(few: vitreg.Backbone) -> None:
    """Against finite differences, in float64."""
    vit = twin(few)
    vit.model.double()
    batch = images(vit).double()
    along = torch.randn(batch.shape, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        return sum(y.square().mean() for y in tensors(vit(x)))

    with FIX.applied_to(vit):
        given = batch.clone().requires_grad_()
        loss(given).backward()
        with torch.no_grad():
            slope = (loss(batch + 1e-6 * along) - loss(batch - 1e-6 * along)) / 2e-6
    assert float((given.grad * along).sum()) == pytest.approx(float(slope), rel=1e-4)


def test_checkpointed_blocks_keep_what_a_hook_made_of_the_stream(few: vitreg.Backbone) -> None:
    hook = few.anatomy.block_modules(few.model)[0].register_forward_hook(
        lambda module, args, output: replaced(output, first_tensor(output) * 1.5)
    )
    with removing([hook]), FIX.applied_to(few):
        fixed = gradients(few)
        with checkpointed(few):
            close(gradients(few), fixed)


def test_blocks_checkpointed_together(few: vitreg.Backbone) -> None:
    """A segment of several blocks is computed again as a whole."""
    blocks = few.anatomy.block_modules(few.model)
    x = torch.randn(2, few.layout.tokens, few.anatomy.width, requires_grad=True)
    if few.anatomy.masked or "rope" in str(few.model).lower():
        pytest.skip("its blocks need more than the stream")

    def run(x: Tensor) -> Tensor:
        for block in blocks:
            x = first_tensor(block(x))
        return x

    def gradient(y: Tensor) -> Tensor:
        return torch.autograd.grad(y.square().mean(), x)[0]

    with FIX.applied_to(few):
        expected = gradient(run(x))
        close(gradient(checkpoint(run, x, use_reentrant=False)), expected)


def test_reentrant_checkpointing_is_refused(vit: vitreg.Backbone) -> None:
    refused = pytest.raises(vitreg.UnsupportedModelError, match="use_reentrant=False")
    with training(vit), FIX.applied_to(vit), checkpointed(vit, reentrant=True), refused:
        gradients(vit)
    vit.model.zero_grad(set_to_none=True)


def test_the_librarys_own_checkpointing() -> None:
    for name, switch in {
        "timm vit": lambda model: model.set_grad_checkpointing(),
        "hf dinov2": lambda model: model.activation_checkpointing_enable(),
        "open_clip vit": lambda model: model.set_grad_checkpointing(),
    }.items():
        vit = CATALOG[name].backbone()
        with training(vit), FIX.applied_to(vit):
            expected = gradients(vit)
            switch(vit.model)
            close(gradients(vit), expected)


def test_autocast(vit: vitreg.Backbone) -> None:
    with torch.no_grad(), FIX.applied_to(vit):
        exact = residuals(vit, images(vit))
    with torch.autocast("cpu", torch.bfloat16):
        plain = residuals(vit, images(vit))
        with FIX.applied_to(vit):
            found = residuals(vit, images(vit))
    assert found.dtype == plain.dtype
    assert (found - exact).float().norm() < 0.1 * exact.norm()
    assert (found - plain).float().norm() > (found - exact).float().norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_weights_of_another_type(few: vitreg.Backbone, dtype: torch.dtype) -> None:
    vit = twin(few)
    for initial in ("zero", "random", "prenorm"):
        vit.model.float()
        with TestTimeRegisters(NEURONS, registers=2, initial=initial).applied_to(vit):
            exact = residuals(vit, images(vit))
            vit.model.to(dtype)
            found = residuals(vit, images(vit))
        assert found.dtype == dtype
        close(found.float(), exact, 1e-5 if dtype == torch.float64 else 0.05)


def test_threads_get_answers_of_their_own(vit: vitreg.Backbone) -> None:
    batches = [images(vit, 1, seed=seed) for seed in range(8)]
    barrier = threading.Barrier(8, timeout=60)

    def run(batch: Tensor) -> Any:
        barrier.wait()
        with torch.no_grad():
            return [vit(batch) for _ in range(2)]

    with FIX.applied_to(vit), torch.no_grad():
        expected = [vit(batch) for batch in batches]
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(run, batches))
    for each, one in zip(found, expected, strict=True):
        assert same(each, [one, one])


# -- copies ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved_and_loaded])
def test_a_copy_is_fixed_and_independent(
    vit: vitreg.Backbone, copied: Callable[[nn.Module], nn.Module], request: pytest.FixtureRequest
) -> None:
    model = vit.model
    if copied is not copy.deepcopy:  # some of transformers' models cannot be saved once they have run
        model = CATALOG[request.node.callspec.params["vit"]].module()
        try:
            pickle.dumps(model)
        except (AttributeError, pickle.PicklingError) as error:
            pytest.skip(f"the unfixed model cannot be saved either: {error}")
    with FIX.applied_to(vit.with_model(model, "original")):
        other, another = (vit.with_model(copied(model), "copy") for _ in range(2))
    with torch.no_grad():
        plain = vit(images(vit))
        with FIX.applied_to(vit):
            fixed = vit(images(vit))
            assert same(other(images(vit)), fixed)
            with pytest.raises(vitreg.FixError, match="already applied"):
                FIX.apply(other)
            applied(other.model)[-1].undo()
            assert same(other(images(vit)), plain)
            assert same(vit(images(vit)), fixed)
        assert same(another(images(vit)), fixed)
        assert same(vit(images(vit)), plain)


def test_a_baked_copy_leaves_the_model_as_it_is(vit: vitreg.Backbone) -> None:
    with torch.no_grad():
        plain = vit(images(vit))
        with FIX.applied_to(vit):
            fixed = vit(images(vit))
        baked = FIX.bake(vit.model)
        assert same(vit.with_model(baked, "baked")(images(vit)), fixed)
        assert same(vit(images(vit)), plain)


def replica_of(module: nn.Module, weight: Callable[[Tensor], Tensor]) -> nn.Module:
    """As torch.nn.parallel.replicate makes one, with weights of its own."""
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        replica._modules[name] = None if child is None else replica_of(child, weight)
    for name, parameter in module._parameters.items():
        if parameter is None:
            replica._parameters[name] = None
        else:
            setattr(replica, name, weight(parameter))
    for name, buffer in module._buffers.items():
        replica._buffers[name] = buffer
    return replica


@torch.no_grad()
def test_a_replica_runs_its_own_weights(vit: vitreg.Backbone) -> None:
    def weight(parameter: Tensor) -> Tensor:
        return parameter.detach() * 0.9

    expected = twin(vit)
    for parameter in expected.model.parameters():
        parameter.mul_(0.9)
    with FIX.applied_to(expected), FIX.applied_to(vit):
        replica = vit.with_model(replica_of(vit.model, weight), "replica")
        blocks = vit.anatomy.block_modules(replica.model)
        assert type(blocks[0]) is type(vit.anatomy.block_modules(vit.model)[0])
        run = partial(replica.forward or replica.model)  # a replica has no parameters to tell its dtype by
        close(run(images(vit)), expected(images(vit)))


# -- vitreg on a fixed model -----------------------------------------------------------------------


def test_a_fixed_model_is_wrapped_as_what_it_is(vit: vitreg.Backbone) -> None:
    for fix in (FIX, TestTimeRegisters({1: [3]}, entry=1)):
        with fix.applied_to(vit):
            assert vitreg.wrap(vit.model, image_size=vit.image_size).anatomy == vit.anatomy


@torch.no_grad()
def test_a_trace_has_more_tokens_inside_the_blocks_and_not_outside(vit: vitreg.Backbone) -> None:
    n, layout = vit.layout.tokens, vit.layout
    with (
        FIX.applied_to(vit),
        vitreg.trace(vit, residuals=True, neurons=True, attention="full", qkv=True) as t,
        vitreg.trace(vit, attention=[7, 0, 11]) as patches,
        vitreg.trace(vit, attention="registers") as regs,
    ):
        vit(images(vit))
    assert t.layout == layout
    assert t.norms.shape[2] == t.residuals.shape[2] == n
    assert t.attention.shape[-2:] == (n + 2, n + 2)
    assert t.q.shape[3] == t.k.shape[3] == t.v.shape[3] == t.neurons.shape[2] == n + 2
    assert t.inner == patches.inner == vitreg.TokenLayout(layout.prefix, layout.registers + 2, layout.grid)
    full = t.attention
    close(full.sum(-1), torch.ones(full.shape[:-1]))
    close(patches.attention, full[..., t.inner.patch_slice, :][..., [7, 0, 11], :])
    close(regs.attention, full[..., t.inner.register_slice, :])
    assert regs.attention.shape[3] == layout.registers + 2
    if layout.prefix:
        with FIX.applied_to(vit), vitreg.trace(vit, attention="cls") as cls:
            vit(images(vit))
        close(cls.attention, full[..., :1, :])
    vit(images(vit, 1))
    assert t.norms.shape[1] == 2


@torch.no_grad()
def test_layers_before_and_after_the_entry_cannot_be_stacked(few: vitreg.Backbone) -> None:
    late = TestTimeRegisters({1: [3]}, entry=1)
    with late.applied_to(few), vitreg.trace(few, neurons=True, attention="full") as t:
        few(images(few))
    assert t.norms.shape[2] == few.layout.tokens
    with pytest.raises(AttributeError, match="other tokens in some layers"):
        _ = t.neurons
    with late.applied_to(few), vitreg.trace(few, neurons=True, layers=[0]) as t:
        few(images(few))
    assert t.inner == few.layout
    assert t.neurons.shape[2] == few.layout.tokens


@torch.no_grad()
def test_a_diagnosis_of_a_fixed_model_reads_its_patches(vit: vitreg.Backbone) -> None:
    batch = images(vit, 4)
    with FIX.applied_to(vit):
        report = vitreg.diagnose(vit, [batch])
        with vitreg.trace(vit, attention="full", qkv=True) as t:
            vit(batch)
    s, patches = report.statistics, t.inner.patch_slice
    norms = t.norms[..., vit.layout.patch_slice]
    close(s.largest.float(), norms.amax((1, 2)))
    rows = t.attention[2][..., query_tokens(t.inner), :][..., patches]
    share = (rows / rows.sum(-1, keepdim=True)).mean((1, 2))
    close(torch.from_numpy(report.examples[1].attention[2]).flatten(), share[1])
    values = t.v[2][:, :, patches].norm(dim=(1, 3))
    assert float(s.values[2].sum()) == pytest.approx(float(values.sum()), rel=1e-4)
    assert report.register_tokens == vit.layout.registers


def test_weights_of_a_fixed_model_load_into_a_plain_one(vit: vitreg.Backbone) -> None:
    other = twin(vit)
    with torch.no_grad():
        plain = vit(images(vit))
        for parameter in other.model.parameters():
            parameter.zero_()
        with FIX.applied_to(vit):
            other.model.load_state_dict(vit.model.state_dict())
        assert same(other(images(vit)), plain)


# -- order -----------------------------------------------------------------------------------------


def test_fixes_are_undone_in_reverse_order(few: vitreg.Backbone) -> None:
    with torch.no_grad():
        plain = few(images(few))
        first = FIX.apply(few)
        one = few(images(few))
        second = OTHER.apply(few)
        assert [handle.fix for handle in applied(few.model)] == [FIX, OTHER]
        assert different(few(images(few)), one)
        with pytest.raises(vitreg.FixError, match="reverse order: undo 'registers'"):
            first.undo()
        second.undo()
        assert same(few(images(few)), one)
        with pytest.raises(vitreg.FixError, match="undone before"):
            second.undo()
        first.undo()
        with pytest.raises(vitreg.FixError, match="undone before"):
            first.undo()
        assert same(few(images(few)), plain)


def test_a_fix_is_applied_once(few: vitreg.Backbone) -> None:
    with FIX.applied_to(few):
        for again in (FIX, TestTimeRegisters(NEURONS, registers=2)):
            with pytest.raises(vitreg.FixError, match="already applied"):
                again.apply(few.model if backbone_of(few.model) == few else few)
        with TestTimeRegisters(NEURONS, registers=1).applied_to(few):
            assert len(applied(few.model)) == 2
    assert applied(few.model) == []


def test_a_fix_of_another_geometry_is_refused(few: vitreg.Backbone) -> None:
    before = anatomy_of(few.model)
    for wrong in ({7: [3]}, {0: [100_000]}, {0: [-1]}):
        with pytest.raises(vitreg.FixError, match="another model"):
            TestTimeRegisters(wrong).apply(few)
    with pytest.raises(vitreg.FixError, match="3 blocks"):
        TestTimeRegisters({}, entry=3).apply(few)
    assert anatomy_of(few.model) == before


@pytest.mark.parametrize("first", ["the fix", "the forward"])
def test_a_block_with_a_forward_of_its_own(few: vitreg.Backbone, first: str) -> None:
    """As accelerate's hooks put there: the class' own forward is never called again."""
    vit = twin(few)
    block = vit.anatomy.block_modules(vit.model)[1]
    handle = FIX.apply(vit) if first == "the fix" else None
    called: list[int] = []
    own = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        called.append(1)
        return own(*args, **kwargs)

    block.forward = forward
    handle = handle or FIX.apply(vit)
    with torch.no_grad():
        plain = few(images(few))
        with FIX.applied_to(few):
            fixed = few(images(few))
        assert same(vit(images(few)), fixed)
        handle.undo()
        assert same(vit(images(few)), plain)
        with FIX.applied_to(vit):
            assert same(vit(images(few)), fixed)
        del block.forward
        assert same(vit(images(few)), plain)
    assert len(called) == 3
