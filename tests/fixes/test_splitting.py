"""Token splitting: every other token stays what it was, and copies are what they ought to be."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from catalog import CATALOG, STEP_BY_STEP, images
from paired_models import Paired
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import vitreg
from vitreg.fixes import TokenSplitting, applied
from vitreg.fixes.neurons import RegisterNeuron, RegisterNeurons

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(params=sorted(CATALOG))
def vit(request) -> vitreg.Backbone:
    return CATALOG[request.param].backbone()


def marking(
    vit: vitreg.Backbone, batch: Tensor, chosen=((0, 3), (0, 5), (1, 7)), share=0.08
) -> TokenSplitting:
    """A fix whose neurons mark their highest activations among the patches of a batch."""
    with torch.no_grad(), vitreg.trace(vit, neurons=True) as t:
        vit(batch)
    found = []
    for layer, index in chosen:
        values = t.neurons[layer][:, t.layout.patch_slice].flatten(0, 1)
        count = max(2, round(share * len(values)))
        level = values.sort(0).values[-count]
        index = index if level[index] > 0.05 else int(level.argmax())
        found.append(RegisterNeuron(layer, index, threshold=0.999 * float(level[index])))
    return TokenSplitting(RegisterNeurons(tuple(found)), capacity=0.6)


class Given(TorchFunctionMode):
    """Attention over keys and values from elsewhere (the reference's own mechanism)."""

    def __init__(self, keys: list[Tensor], record: bool, block: Any) -> None:
        super().__init__()
        self.keys, self.record = keys, record
        self.authors = [module for module in block.modules() if hasattr(module, "mix")]

    def __enter__(self) -> Any:
        for module in self.authors:
            module.mix = partial(self.mixed, module.mix)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for module in self.authors:
            del module.mix

    def mixed(self, mix: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.record:
            self.keys += [k, v]
        return mix(q, *self.keys)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            q, k, v, *rest = args
            if self.record:
                self.keys += [k, v]
            else:
                k, v = self.keys
            return func(q, k, v, *rest, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def reference(vit: vitreg.Backbone, batch: Tensor, fix: TokenSplitting) -> tuple[Tensor, Tensor]:
    """The stream after the last block with copies in the grid (b, n, d), and where they are (b, n).

    One token at a time: a copy takes its original's place, and attends to what the unfixed model's tokens
    are to each other.
    """
    if isinstance(vit.model, Paired):
        vit = vitreg.wrap(vit.model.joined(), image_size=vit.image_size)
    blocks = vit.anatomy.block_modules(vit.model)
    downs = vit.anatomy.down_projections(vit.model)
    calls: list[Any] = []
    with ExitStack() as stack:
        for block in blocks:
            saw = lambda module, args, kwargs: calls.append((args, kwargs))  # noqa: E731
            stack.callback(block.register_forward_pre_hook(saw, with_kwargs=True).remove)
        t = stack.enter_context(vitreg.trace(vit, neurons=True, residuals=True))
        vit(batch)
    out, forked = t.residuals[-1].clone(), torch.zeros(t.residuals.shape[1:3], dtype=torch.bool)
    start = t.layout.patch_slice.start
    by_layer = {n.layer: [m for m in fix.neurons.chosen if m.layer == n.layer] for n in fix.neurons.chosen}
    for image in range(len(batch)):
        for token in range(start, t.layout.tokens):
            stream: Tensor | None = None
            for layer, ((x, *args), kwargs) in enumerate(calls):
                here = by_layer.get(layer, [])
                marks = [t.neurons[layer][image, token, n.index] / n.threshold >= 1 for n in here]
                if stream is None and not any(marks):
                    continue
                keys: list[Tensor] = []
                with Given(keys, True, blocks[layer]):
                    blocks[layer](x, *args, **kwargs)
                changed = x.clone()
                if stream is not None:
                    changed[image, token] = stream
                silence = [n.index for n in here]

                def zero(module, given, image=image, token=token, silence=silence):
                    activation = given[0].clone()
                    activation[image, token, silence] = 0
                    return (activation,)

                hook = downs[layer].register_forward_pre_hook(zero)
                with Given(keys, False, blocks[layer]):
                    y = blocks[layer](changed, *args, **kwargs)
                hook.remove()
                stream = (y if isinstance(y, Tensor) else y[0])[image, token]
            if stream is not None:
                out[image, token], forked[image, token] = stream, True
    return out, forked


@pytest.mark.parametrize(
    "name",
    [
        "timm vit",
        "timm dinov2 registers",
        "timm dinov3",
        "timm eva02",
        "timm relpos cls",
        "timm srelpos",
        "timm rope mixed",
        "timm pe core",
        "timm siglip",
        "timm parallel attention",
        "timm beit",
        "hf dinov2 registers swiglu",
        "hf dinov3",
        "hf siglip2",
        "hf beit",
        "hf clip",
        *(name for name in STEP_BY_STEP if name.startswith("authors")),
    ],
)
def test_copies_are_those_of_the_slow_reference(name):
    vit = CATALOG[name].backbone()
    batch = images(vit, 2)
    fix = marking(vit, batch)
    expected, forked = reference(vit, batch, fix)
    with torch.no_grad(), fix.applied_to(vit), vitreg.trace(vit, residuals=True, layers=[2]) as t:
        vit(batch)
    assert int(forked.sum()) > 0
    scale = float(expected.abs().max())
    torch.testing.assert_close(t.residuals[0] / scale, expected / scale, rtol=1e-5, atol=1e-5)


def test_everything_else_stays_what_it_was(vit):
    batch = images(vit, 3)
    fix = marking(vit, batch)
    with torch.no_grad(), vitreg.trace(vit, residuals=True) as before:
        vit(batch)
    with torch.no_grad(), fix.applied_to(vit) as handle, vitreg.trace(vit, residuals=True) as after:
        vit(batch)
    fork = handle.carried
    forked = torch.zeros(after.residuals.shape[1:3], dtype=torch.bool).scatter(1, fork.position, fork.valid)
    difference = (after.residuals - before.residuals).abs().amax(-1)
    scale = float(before.residuals.abs().max())
    assert float(difference[:, ~forked].max()) < 1e-5 * scale
    assert float(difference[-1][forked].median()) > 1e-3 * scale
    original = before.residuals[-1].gather(1, fork.position[..., None].expand_as(fork.original))
    torch.testing.assert_close(fork.original[fork.valid] / scale, original[fork.valid] / scale, **CLOSE)


def test_each_image_is_on_its_own(vit):
    batch = images(vit, 3)
    fix = marking(vit, batch)
    with torch.no_grad(), fix.applied_to(vit), vitreg.trace(vit, residuals=True) as t:
        vit(batch)
        together = t.residuals
        for i in range(3):
            vit(batch[i : i + 1])
            scale = float(together.abs().max())
            torch.testing.assert_close(
                t.residuals[:, 0] / scale, together[:, i] / scale, rtol=1e-5, atol=1e-5
            )


def test_watchers_see_what_the_model_attends_to(vit):
    """Attention under the fix, without the copies and normalised again, is that of the unfixed model."""
    batch = images(vit, 2)
    fix = marking(vit, batch)
    with torch.no_grad(), vitreg.trace(vit, attention="full", neurons=True, layers=[2]) as before:
        vit(batch)
    with (
        torch.no_grad(),
        fix.applied_to(vit) as handle,
        vitreg.trace(vit, attention="full", neurons=True, layers=[2]) as after,
    ):
        vit(batch)
    fork = handle.carried
    start, room = before.layout.patch_slice.start, fork.position.shape[1]
    assert after.attention.shape[-1] == after.inner.tokens == before.layout.tokens + room
    rows = torch.cat([after.attention[-1][:, :, :, :start], after.attention[-1][:, :, :, start + room :]], -1)
    for image in range(len(batch)):
        copies = fork.position[image][fork.valid[image]]
        shown = rows[image].clone()  # over the model's own tokens: originals in place of their copies
        shown[..., copies] = after.attention[-1][image, :, :, start : start + room][..., fork.valid[image]]
        shown = shown / shown.sum(-1, keepdim=True)
        others = [i for i in range(before.layout.tokens) if i not in copies.tolist()]
        asking = [i if i < start else i + room for i in others]
        torch.testing.assert_close(shown[:, asking], before.attention[-1][image][:, others], **CLOSE)
        registers = [start + i for i in range(room) if fork.valid[image, i]]
        torch.testing.assert_close(shown[:, registers], before.attention[-1][image][:, copies], **CLOSE)
    # Neurons of an unforked token, seen in its place.
    assert after.neurons[-1].shape[1] == after.inner.tokens
    torch.testing.assert_close(after.neurons[-1][:, :start], before.neurons[-1][:, :start], **CLOSE)


SOME = [
    "timm vit",
    "timm dinov3",
    "timm beit",
    "hf dinov2 registers swiglu",
    "open_clip vit",
    "torchvision vit",
]


def fixed_output(vit: vitreg.Backbone, batch: Tensor, fix: TokenSplitting) -> Tensor:
    with torch.no_grad(), fix.applied_to(vit), vitreg.trace(vit, residuals=True, layers=[2]) as t:
        vit(batch)
    return t.residuals[0]


class Stream(nn.Module):
    """The model with the stream after its last block as output, so that a compiled one shows its copies."""

    def __init__(self, vit: vitreg.Backbone) -> None:
        super().__init__()
        self.model, self.forward_images = vit.model, vit.forward or vit.model
        self.block = vit.anatomy.block_modules(vit.model)[-1]

    def forward(self, batch: Tensor) -> Any:
        return self.forward_images(batch)


@pytest.mark.slow
@pytest.mark.parametrize("name", SOME)
def test_compiled(name):
    vit = CATALOG[name].backbone()
    batch, other = images(vit, 3), images(vit, 3, seed=5)
    fix = marking(vit, batch)
    compiled = torch.compile(vit.model, backend="eager", fullgraph=True)
    with torch.no_grad():
        plain = tensors(compiled(batch))
        with fix.applied_to(vit):
            expected = [tensors(vit.model(x)) for x in (batch, other)]
            found = [tensors(compiled(x)) for x in (batch, other)]
        again = tensors(compiled(batch))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.slow
def test_compiled_with_inductor():
    vit = CATALOG["timm dinov2"].backbone()
    batch = images(vit, 3)
    fix = marking(vit, batch)
    with torch.no_grad(), fix.applied_to(vit):
        expected = vit.model.forward_features(batch)
        torch.testing.assert_close(
            torch.compile(vit.model.forward_features, fullgraph=True)(batch), expected, **CLOSE
        )
    assert not torch.allclose(vit.model.forward_features(batch), expected, atol=1e-2)


def tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [x for value in values if value is not None for x in tensors(value)]


@pytest.mark.parametrize("name", SOME)
def test_nothing_marked_changes_nothing(name):
    vit = CATALOG[name].backbone()
    batch = images(vit, 2)
    fix = marking(vit, batch)
    never = replace(
        fix, neurons=RegisterNeurons(tuple(replace(n, threshold=1e6) for n in fix.neurons.chosen))
    )
    with torch.no_grad(), vitreg.trace(vit, residuals=True, layers=[2]) as t:
        vit(batch)
        plain = t.residuals[0]
    scale = float(plain.abs().max())
    torch.testing.assert_close(fixed_output(vit, batch, never) / scale, plain / scale, rtol=1e-5, atol=1e-6)


def test_batches_with_different_numbers_of_marked_patches():
    vit = CATALOG["timm vit"].backbone()
    batch = images(vit, 2)
    with torch.no_grad(), vitreg.trace(vit, neurons=True, layers=[0]) as t:
        vit(batch)
    peaks = t.neurons[0][:, t.layout.patch_slice, 3].amax(1)
    between = RegisterNeuron(0, 3, threshold=float(peaks.mean()))
    with torch.no_grad(), TokenSplitting(RegisterNeurons((between,))).applied_to(vit) as handle:
        vit(batch)
        counts = handle.carried.valid.sum(1)
    assert int(counts.max()) > 0 == int(counts.min())
    assert int(counts.argmax()) == int(peaks.argmax())


def test_too_many_marks_fork_the_strongest():
    vit = CATALOG["timm vit"].backbone()
    batch = images(vit, 2)
    fix = replace(marking(vit, batch, chosen=((0, 3),), share=0.5), capacity=0.1)  # 2 of 20
    with torch.no_grad(), vitreg.trace(vit, neurons=True, layers=[0]) as t:
        vit(batch)
    index = fix.neurons.chosen[0].index
    strongest = t.neurons[0][:, t.layout.patch_slice, index].topk(2).indices + t.layout.patch_slice.start
    with torch.no_grad(), fix.applied_to(vit) as handle:
        vit(batch)
        assert torch.equal(handle.carried.position.sort().values, strongest.sort().values)
        assert bool(handle.carried.valid.all())


@pytest.mark.parametrize("name", SOME)
def test_copies_of_the_model_are_fixed_too(name):
    vit = CATALOG[name].backbone()
    batch = images(vit, 2)
    fix = marking(vit, batch)
    with torch.no_grad():
        plain = tensors(vit(batch))
        handle = fix.apply(vit)
        expected = tensors(vit(batch))
        twins = [copy.deepcopy(vit.model), pickle.loads(pickle.dumps(vit.model))]
        handle.undo()
        for twin in twins:
            fixed = vit.with_model(twin, "twin")
            assert all(torch.equal(a, b) for a, b in zip(tensors(fixed(batch)), expected, strict=True))
            applied(twin)[-1].undo()
            assert all(torch.equal(a, b) for a, b in zip(tensors(fixed(batch)), plain, strict=True))


def test_threads_have_answers_of_their_own():
    vit = CATALOG["timm vit"].backbone()
    batches = [images(vit, 1 + i % 3, seed=i) for i in range(8)]
    fix = marking(vit, images(vit, 3))
    forward = torch.no_grad()(vit.model.forward_features)
    with fix.applied_to(vit):
        expected = [forward(batch) for batch in batches]
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(forward, batches * 4))
    assert all(torch.equal(a, b) for a, b in zip(found, expected * 4, strict=True))


def test_gradients_and_checkpointing():
    vit = CATALOG["timm vit"].backbone()
    batch = images(vit, 2)
    fix = marking(vit, batch)

    def gradients(model: nn.Module) -> list[Tensor]:
        model.forward_features(batch).square().mean().backward()
        found = [p.grad.clone() for p in model.blocks.parameters() if p.grad is not None]
        model.zero_grad(set_to_none=True)
        return found

    with fix.applied_to(vit):
        plain = gradients(vit.model)
        vit.model.set_grad_checkpointing()
        checkpointed = gradients(vit.model)
    torch.testing.assert_close(checkpointed, plain)


def test_autocast_keeps_the_other_tokens():
    vit = CATALOG["timm vit"].backbone()
    batch = images(vit, 2)
    fix = marking(vit, batch)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain = vit.model(batch)
        with fix.applied_to(vit):
            torch.testing.assert_close(vit.model(batch), plain, rtol=0.05, atol=0.05)


def test_a_block_that_normalises_what_its_mlp_writes_is_refused():
    import timm

    class Normed(timm.models.vision_transformer.Mlp):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.last = nn.LayerNorm(32)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(super().forward(x))

    small = {"embed_dim": 32, "depth": 3, "num_heads": 4, "patch_size": 8, "img_size": 32, "num_classes": 5}
    vit = vitreg.wrap(timm.models.VisionTransformer(**small, mlp_layer=Normed))
    fix = TokenSplitting(RegisterNeurons((RegisterNeuron(0, 3, threshold=0.1),)))
    with pytest.raises(vitreg.UnsupportedModelError, match="normalises what its MLP writes"):
        fix.apply(vit)


def test_neurons_without_thresholds_are_refused():
    with pytest.raises(vitreg.FixError, match=r"TokenSplitting\.calibrate"):
        TokenSplitting({0: [3]})


@pytest.mark.parametrize("capacity", [0, -0.1, 1.5])
def test_a_capacity_is_a_share(capacity):
    with pytest.raises(ValueError, match="share of the patches"):
        TokenSplitting(RegisterNeurons((RegisterNeuron(0, 3, threshold=0.1),)), capacity=capacity)


def test_splitting_comes_last():
    """A register applied after it would stand between originals and copies; before it, both work."""
    vit = CATALOG["timm vit"].backbone()
    batch = images(vit)
    register, splitting = vitreg.TestTimeRegisters({1: [9]}), marking(vit, batch)
    with splitting.applied_to(vit), pytest.raises(vitreg.FixError, match="apply this fix first"):
        register.apply(vit)
    with torch.no_grad(), register.applied_to(vit):
        fixed = vit.model(batch)
        with splitting.applied_to(vit) as handle:
            both = vit.model(batch)
            assert handle.carried.valid.any()
    torch.testing.assert_close(both, fixed, **CLOSE)  # CLS is read, and stays what it is under the register
