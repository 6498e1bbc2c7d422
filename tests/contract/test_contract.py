"""What holds for every supported model: one contract, checked on the whole catalog.

Models are tiny and random (see catalog.py). The reference for attention is what the model's own
library computes when told to do so step by step.
"""

import copy
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from authors_models import Authors
from catalog import CATALOG, Truth, built, images
from looking import footprint, image_with_and_without_a_change, most_changed, removing, same, tensors
from paired_models import Paired
from softmaxes import Softmaxes
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import vitreg
from vitreg.models.probe import first_tensor

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
EVERYTHING: dict[str, Any] = {"residuals": True, "neurons": True, "attention": "full", "qkv": True}
RECORDED = ("norms", "residuals", "neurons", "attention", "q", "k", "v")


@pytest.fixture(params=CATALOG)
def vit(request: pytest.FixtureRequest) -> vitreg.Backbone:
    """A model that is built once: tests leave it as they found it."""
    return built(request.param)


@pytest.fixture(params=CATALOG)
def fresh(request: pytest.FixtureRequest) -> vitreg.Backbone:
    """A model of the test's own, to be changed."""
    return CATALOG[request.param].backbone()


# -- looking at models without vitreg --------------------------------------------------------------


class AttentionResults(TorchFunctionMode):
    """Keeps what each attention inside the blocks returns, before its output projection is undone."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[tuple[Tensor, tuple[Any, ...]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            self.results.append((result, ()))
        elif func is F.multi_head_attention_forward:
            self.results.append((result[0], (args[11], args[12])))  # out_proj_weight, out_proj_bias
        return result


def eager_attention(vit: vitreg.Backbone, batch: Tensor) -> Tensor:
    """(l, b, h, n, n) attention of a copy of the model, as its own library computes it step by step."""
    model = copy.deepcopy(vit.model)
    maps: list[Tensor] = []
    if isinstance(model, Authors | Paired):
        with Softmaxes() as softmaxes, torch.no_grad():
            model(batch)
        return torch.stack([x.reshape(len(batch), -1, *x.shape[-2:]) for x in softmaxes.results])
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")
    hooks = [
        hook
        for block in vit.anatomy.block_modules(model)
        for module in block.modules()
        for hook in _step_by_step(module, maps)
    ]
    with removing(hooks), torch.no_grad():
        vit.with_model(model, "eager")(batch)
    return torch.stack(maps)


def _step_by_step(module: nn.Module, maps: list[Tensor]) -> Iterator[Any]:
    """Make one attention module compute its map where a hook can see it."""

    def softmaxed(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        maps.append(args[0])

    def returned(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, tuple) and len(output) > 1 and output[1] is not None:
            maps.append(output[1])

    def with_weights(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"need_weights": True, "average_attn_weights": False}

    if isinstance(module, nn.MultiheadAttention):
        yield module.register_forward_pre_hook(with_weights, with_kwargs=True)
        yield module.register_forward_hook(returned)
    elif hasattr(module, "fused_attn"):  # timm
        module.fused_attn = False
        yield module.attn_drop.register_forward_pre_hook(softmaxed)
    elif hasattr(module, "use_fsdpa"):  # open_clip, whose unfused path does not run: from q and k
        queries: list[Tensor] = []
        yield module.ln_q.register_forward_hook(lambda *a: queries.append(a[2]))
        yield module.ln_k.register_forward_hook(
            lambda *a: maps.append((queries[-1] @ a[2].mT * module.scale).softmax(-1))
        )
    elif "SdpaSelfAttention" in type(module).__name__:
        module.__class__ = type(module).__base__  # transformers' older way: a class for each kernel
        yield module.dropout.register_forward_pre_hook(softmaxed)
    elif "Attention" in type(module).__name__:  # transformers
        yield module.register_forward_hook(returned)


# -- the parts -------------------------------------------------------------------------------------


def test_the_parts_are_found(vit: vitreg.Backbone, request: pytest.FixtureRequest) -> None:
    a, layout = vit.anatomy, vit.layout
    found = Truth(layout.prefix, layout.registers, layout.grid, a.depth, a.width, a.neurons, a.heads)
    assert found == CATALOG[request.node.callspec.params["vit"]].truth


def test_the_patch_embedding_of_each_patch_is_found(vit: vitreg.Backbone) -> None:
    """A change of one patch of the image changes the embedding of that patch the most."""
    with torch.no_grad(), vitreg.trace(vit, embedding=True) as t:
        vit(image_with_and_without_a_change(vit, row=1, column=2))
    one, other = t.embedding
    assert t.embedding.shape[1] == vit.layout.patches
    assert vit.layout.patch_slice.start + most_changed(one, other) == vit.layout.patch(1, 2)


def test_the_token_of_each_patch_is_found(vit: vitreg.Backbone) -> None:
    """Of all the tokens that enter block 0, a change of one patch changes that patch's the most."""
    entering: list[Tensor] = []
    block = vit.anatomy.block_modules(vit.model)[0]
    hook = block.register_forward_pre_hook(
        lambda module, args, kwargs: entering.append(first_tensor((args, kwargs))), with_kwargs=True
    )
    with removing([hook]), torch.no_grad():
        vit(image_with_and_without_a_change(vit, row=1, column=2))
    assert most_changed(*entering[0]) == vit.layout.patch(1, 2)


# -- what a trace records --------------------------------------------------------------------------


def test_residuals_and_norms_are_those_after_each_block(vit: vitreg.Backbone) -> None:
    seen: list[Tensor] = []
    blocks = vit.anatomy.block_modules(vit.model)
    hooks = [b.register_forward_hook(lambda *a: seen.append(first_tensor(a[2]).clone())) for b in blocks]
    with removing(hooks), torch.no_grad(), vitreg.trace(vit, residuals=True) as t:
        vit(images(vit))
    assert torch.equal(t.residuals, torch.stack(seen))
    torch.testing.assert_close(t.norms, torch.stack(seen).norm(dim=-1))


def test_neurons_recombine_to_what_the_mlp_returns(vit: vitreg.Backbone) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    downs = vit.anatomy.down_projections(vit.model)
    hooks = [down.register_forward_hook(lambda *a: seen.append((a[1][0], a[2]))) for down in downs]
    with removing(hooks), torch.no_grad(), vitreg.trace(vit, neurons=True) as t:
        vit(images(vit))
    assert t.neurons.shape == (vit.anatomy.depth, 2, vit.layout.tokens, vit.anatomy.neurons)
    for down, neurons, (entered, left) in zip(downs, t.neurons, seen, strict=True):
        assert torch.equal(neurons, entered)
        torch.testing.assert_close(down(neurons), left)


def test_attention_is_the_librarys_own(vit: vitreg.Backbone) -> None:
    batch = images(vit)
    with torch.no_grad(), vitreg.trace(vit, attention="full") as t:
        vit(batch)
    reference = eager_attention(vit, batch)
    assert reference.max() > 5 / vit.layout.tokens  # far from uniform, or this would show little
    torch.testing.assert_close(t.attention, reference, **CLOSE)


@pytest.mark.parametrize("rows", ["cls", "registers"])
def test_attention_rows_of_special_tokens_are_rows_of_the_full_map(vit: vitreg.Backbone, rows: Any) -> None:
    layout = vit.layout
    index = {"cls": range(min(layout.prefix, 1)), "registers": range(layout.prefix, layout.patch_slice.start)}
    if not index[rows]:
        with pytest.raises(vitreg.UnsupportedModelError, match=r"no (CLS|register)"):
            vitreg.trace(vit, attention=rows)
        return
    with torch.no_grad(), vitreg.trace(vit, attention="full") as full, vitreg.trace(vit, attention=rows) as t:
        vit(images(vit))
    torch.testing.assert_close(t.attention, full.attention[..., index[rows], :], **CLOSE)


def test_attention_rows_of_patches_are_rows_of_the_full_map(vit: vitreg.Backbone) -> None:
    with torch.no_grad(), vitreg.trace(vit, attention="full") as full:
        with vitreg.trace(vit, attention=[7, 0, 11]) as t:
            vit(images(vit))
        patches = full.attention[..., vit.layout.patch_slice, :]
    torch.testing.assert_close(t.attention, patches[..., [7, 0, 11], :], **CLOSE)


def test_queries_keys_and_values_give_what_attention_returned(vit: vitreg.Backbone) -> None:
    with torch.no_grad(), vitreg.trace(vit, attention="full", qkv=True) as t, AttentionResults() as seen:
        vit(images(vit))
    # A pooling head may attend too, after the blocks.
    for layer, (result, projection) in enumerate(seen.results[: vit.anatomy.depth]):
        mixed = t.attention[layer] @ t.v[layer]
        if projection:  # (n, b, d): nn.MultiheadAttention, which also projects
            mixed = F.linear(mixed.permute(2, 0, 1, 3).flatten(2), *projection)
        torch.testing.assert_close(mixed, result, rtol=1e-4, atol=1e-4)
    assert t.q.shape[:4] == (vit.anatomy.depth, 2, vit.anatomy.heads, vit.layout.tokens)
    assert t.k.shape == t.q.shape


def test_layers_are_recorded_as_asked_for(vit: vitreg.Backbone) -> None:
    with torch.no_grad(), vitreg.trace(vit, **EVERYTHING) as full, vitreg.trace(
        vit, **EVERYTHING, layers=[2, 0]
    ) as t:  # fmt: skip
        vit(images(vit))
    for name in RECORDED:
        assert torch.equal(getattr(t, name), getattr(full, name)[[2, 0]]), name


def test_only_the_latest_pass_is_kept(vit: vitreg.Backbone) -> None:
    with torch.no_grad(), vitreg.trace(vit, **EVERYTHING) as t:
        vit(images(vit, 3, seed=1))
        earlier = [weakref.ref(x) for record in t._record.values() for x in record.values()]
        vit(images(vit, 1))
    with torch.no_grad(), vitreg.trace(vit, **EVERYTHING) as alone:
        vit(images(vit, 1))
    assert [x for ref in earlier if (x := ref()) is not None] == []
    assert all(torch.equal(getattr(t, name), getattr(alone, name)) for name in RECORDED)


def test_images_do_not_depend_on_their_batch_mates(vit: vitreg.Backbone) -> None:
    batch = images(vit, 3)
    with torch.no_grad(), vitreg.trace(vit, **EVERYTHING) as together:
        vit(batch)
    for i in range(3):
        with torch.no_grad(), vitreg.trace(vit, **EVERYTHING) as alone:
            vit(batch[i : i + 1])
        for name in RECORDED:
            mine, theirs = getattr(alone, name)[:, 0], getattr(together, name)[:, i]
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


# -- what a trace leaves alone ---------------------------------------------------------------------


def test_the_output_is_bit_identical(vit: vitreg.Backbone) -> None:
    untraced = vit(images(vit))
    with vitreg.trace(vit, **EVERYTHING, embedding=True):
        traced = vit(images(vit))
    assert same(traced, untraced)


def test_the_output_without_gradients_is_that_of_the_inference_kernels(vit: vitreg.Backbone) -> None:
    """nn.MultiheadAttention has a faster kernel without gradients; a watched one takes its other path."""
    with torch.no_grad():
        untraced = vit(images(vit))
        with vitreg.trace(vit, **EVERYTHING, embedding=True):
            traced = vit(images(vit))
    own_kernel = any(isinstance(m, nn.MultiheadAttention) for m in vit.model.modules())
    if not own_kernel:
        assert same(traced, untraced)
    torch.testing.assert_close(tensors(traced), tensors(untraced), rtol=1e-4, atol=1e-4)


def test_nothing_is_left_behind(vit: vitreg.Backbone) -> None:
    before = footprint(vit.model)
    with torch.no_grad(), vitreg.trace(vit, **EVERYTHING, embedding=True):
        assert footprint(vit.model) != before
        vit(images(vit))
    assert footprint(vit.model) == before


def test_nothing_is_left_behind_by_a_failed_pass(vit: vitreg.Backbone) -> None:
    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    before = footprint(vit.model)
    untraced = vit(images(vit))
    hook = vit.anatomy.down_projections(vit.model)[1].register_forward_hook(fail)
    with removing([hook]), pytest.raises(KeyboardInterrupt), vitreg.trace(vit, **EVERYTHING, embedding=True):
        vit(images(vit))
    assert footprint(vit.model) == before
    assert same(vit(images(vit)), untraced)


def test_a_trace_goes_on_after_a_failed_pass(vit: vitreg.Backbone) -> None:
    def fail(*_: Any) -> None:
        raise ArithmeticError

    with torch.no_grad(), vitreg.trace(vit, **EVERYTHING) as expected:
        vit(images(vit))
    with torch.no_grad(), vitreg.trace(vit, **EVERYTHING) as t:
        hook = vit.anatomy.down_projections(vit.model)[1].register_forward_hook(fail)
        with removing([hook]), pytest.raises(ArithmeticError):
            vit(images(vit, 3, seed=1))
        with pytest.raises(AttributeError, match="layer"):
            _ = t.norms  # of a pass that did not reach the last layer
        vit(images(vit))
    assert all(torch.equal(getattr(t, name), getattr(expected, name)) for name in RECORDED)


def test_a_copy_is_a_model_of_its_own(vit: vitreg.Backbone) -> None:
    twin = copy.deepcopy(vit.model)
    before = footprint(twin)
    wrapped = vitreg.wrap(twin, image_size=vit.image_size)
    assert wrapped.anatomy == vit.anatomy
    with torch.no_grad(), vitreg.trace(vit) as t:
        vit(images(vit))
        assert footprint(twin) == before
        wrapped(images(vit, 3, seed=1))  # must not enter the trace of the other
        norms = t.norms
    with torch.no_grad(), vitreg.trace(wrapped) as theirs:
        wrapped(images(vit))
    assert torch.equal(norms, theirs.norms)


def test_a_copy_made_while_traced_is_a_model_of_its_own(vit: vitreg.Backbone) -> None:
    with vitreg.trace(vit, **EVERYTHING, embedding=True):
        twin = vit.with_model(copy.deepcopy(vit.model), "twin")
    with vitreg.trace(vit) as t:
        untraced = vit(images(vit))
        assert same(twin(images(vit)), untraced)
        twin(images(vit, 3, seed=1))
        assert t.norms.shape[1] == 2


def test_the_models_other_ways_to_run_are_unchanged(fresh: vitreg.Backbone) -> None:
    """timm's forward_intermediates and transformers' hidden states keep their shapes and values."""
    run = fresh
    if hasattr(fresh.model, "forward_intermediates"):
        run = fresh.model.forward_intermediates
    elif hasattr(fresh.model, "config"):
        fresh.model.config.output_hidden_states = True
    else:
        pytest.skip("the library has no other way")
    untraced = run(images(fresh))
    with vitreg.trace(fresh, **EVERYTHING) as t:
        traced = run(images(fresh))
    assert same(traced, untraced)
    assert len(tensors(untraced)) > fresh.anatomy.depth
    assert t.norms.shape == (fresh.anatomy.depth, 2, fresh.layout.tokens)


# -- how else models are run -----------------------------------------------------------------------


def test_autocast(vit: vitreg.Backbone) -> None:
    with torch.no_grad(), vitreg.trace(vit, attention="full") as exact:
        vit(images(vit))
    with torch.autocast("cpu", torch.bfloat16):
        untraced = vit(images(vit))
        with vitreg.trace(vit, **EVERYTHING) as t:
            traced = vit(images(vit))
    assert same(traced, untraced)
    assert t.norms.dtype == t.attention.dtype == torch.float32
    torch.testing.assert_close(t.norms, exact.norms, rtol=0.1, atol=0.1)
    torch.testing.assert_close(t.attention.sum(-1), torch.ones(t.attention.shape[:-1]), **CLOSE)


def test_gradient_checkpointing(fresh: vitreg.Backbone) -> None:
    """What a backward pass computes again is not recorded, and gradients are those of the untraced model."""
    model = fresh.model.train()
    for name in (
        "set_grad_checkpointing",
        "activation_checkpointing_enable",
        "gradient_checkpointing_enable",
    ):
        if hasattr(model, name):
            getattr(model, name)()
            break
    else:
        pytest.skip("the library has no gradient checkpointing")

    def gradients() -> list[Tensor]:
        torch.manual_seed(0)  # rotary positions are jittered in training, and dropout may be on
        sum(x.float().square().mean() for x in tensors(fresh(images(fresh)))).backward()
        found = [p.grad for p in model.parameters() if p.grad is not None]
        model.zero_grad(set_to_none=True)
        return found

    try:
        untraced = gradients()
    except TypeError as error:
        pytest.skip(f"the library's own gradient checkpointing does not run: {error}")
    blocks: list[int] = []
    neurons: list[int] = []
    attention: list[int] = []
    with vitreg.watch(
        fresh,
        on_block=lambda layer, residual: blocks.append(layer),
        on_neurons=lambda layer, a: neurons.append(layer),
        on_attention=lambda layer, call: attention.append(layer),
    ):
        traced = gradients()
    assert blocks == neurons == attention == list(range(fresh.anatomy.depth))
    assert same(traced, untraced)


def test_threads_get_answers_of_their_own(vit: vitreg.Backbone) -> None:
    batches = [images(vit, 1, seed=seed) for seed in range(8)]
    barrier = Barrier(8, timeout=60)

    def traced(batch: Tensor, wait: bool = True) -> list[Tensor]:
        with torch.no_grad():
            if wait:
                barrier.wait()
            with vitreg.trace(vit, **EVERYTHING) as t:
                vit(batch)
            return [getattr(t, name) for name in RECORDED]

    expected = [traced(batch, wait=False) for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(traced, batches))
    assert all(same(one, other) for one, other in zip(found, expected, strict=True))
