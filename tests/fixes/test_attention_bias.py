"""A constant key and value in place of a register: equal to the register on the image that they come from."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from catalog import CATALOG, images
from looking import same, tensors

import vitreg
from vitreg.errors import FixError
from vitreg.fixes import TestTimeRegisters
from vitreg.fixes.attention_bias import AttentionBias, _OneMoreKey
from vitreg.fixes.neurons import RegisterNeurons
from vitreg.hooks.attention_mode import intercept

NEURONS = RegisterNeurons.of({0: [1, 5], 1: [0, 7, 9]})
SOME = ["timm vit", "timm dinov3", "timm beit", "hf clip", "hf siglip2", "open_clip vit", "torchvision vit"]
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def residuals(vit: vitreg.Backbone, batch: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), vitreg.trace(vit, residuals=True) as t:
        vit(batch)
    return t.residuals


@pytest.fixture(params=SOME)
def vit(request: pytest.FixtureRequest) -> vitreg.Backbone:
    return CATALOG[request.param].backbone()


@pytest.mark.parametrize("name", CATALOG)
def test_on_the_image_it_was_calibrated_with_it_is_the_test_time_register(name):
    """The tokens read the register's own key and value: then nothing differs, in any block."""
    vit = CATALOG[name].backbone()
    image, other = images(vit, 1), images(vit, 1, seed=1)
    fix = AttentionBias.calibrate(vit, [image], NEURONS)
    untouched = residuals(vit, image)
    with TestTimeRegisters(NEURONS).applied_to(vit):
        register, register_of_other = residuals(vit, image), residuals(vit, other)
    with fix.applied_to(vit):
        biased, biased_other = residuals(vit, image), residuals(vit, other)
    torch.testing.assert_close(biased, register, **CLOSE)
    assert (biased - untouched).abs().max() > 0.1
    assert (biased_other - register_of_other).abs().max() > 1e-3  # for others it is a mean, not their own


@pytest.mark.parametrize(
    "options", [{"entry": 1, "neurons": {1: [0, 7], 2: [3]}}, {"initial": "mean"}, {"scale": 3.0}]
)
def test_it_stands_in_for_other_registers_too(options):
    vit = CATALOG["timm vit"].backbone()
    image = images(vit, 1)
    options = {"neurons": NEURONS} | options
    fix = AttentionBias.calibrate(vit, [image], **options)
    assert fix.tensors["keys"].shape == (3 - options.get("entry", 0), 4, 8)
    with TestTimeRegisters(**options).applied_to(vit):
        register = residuals(vit, image)
    with fix.applied_to(vit):
        torch.testing.assert_close(residuals(vit, image), register, **CLOSE)


def test_keys_and_values_are_means_over_images_whatever_the_batches():
    vit = CATALOG["timm vit"].backbone()
    many = images(vit, 5)
    whole, parts = (AttentionBias.calibrate(vit, many.split(size), NEURONS) for size in (5, 2))
    singles = [AttentionBias.calibrate(vit, [image[None]], NEURONS) for image in many]
    for name in ("keys", "values"):
        mean = torch.stack([one.tensors[name] for one in singles]).mean(0)
        torch.testing.assert_close(whole.tensors[name], mean)
        torch.testing.assert_close(parts.tensors[name], mean)


def test_undo_state_dict_and_batch_mates(vit):
    batch = images(vit, 3)
    keys, before = list(vit.model.state_dict()), residuals(vit, batch)
    with AttentionBias.calibrate(vit, [batch], NEURONS).applied_to(vit):
        assert list(vit.model.state_dict()) == keys
        together = residuals(vit, batch)
        torch.testing.assert_close(residuals(vit, batch[1:2]), together[:, 1:2], **CLOSE)
        assert same(residuals(copy.deepcopy(vit), batch), together)
        twin = vit.with_model(pickle.loads(pickle.dumps(vit.model)), "pickled")
        assert same(residuals(twin, batch), together)
    assert same(residuals(vit, batch), before)


def test_whoever_watches_attention_sees_one_more_key(vit):
    batch = images(vit, 2)
    fix = AttentionBias.calibrate(vit, [batch], NEURONS)
    tokens = vit.layout.tokens
    with torch.no_grad(), fix.applied_to(vit), vitreg.trace(vit, attention="full", qkv=True) as t:
        vit(batch)
    assert t.attention.shape[-2:] == (tokens, tokens + 1)
    torch.testing.assert_close(t.attention.sum(-1), torch.ones(t.attention.shape[:-1]), **CLOSE)
    assert t.q.shape[-2] == tokens
    for name, read in (("keys", t.k), ("values", t.v)):
        expected = fix.tensors[name][:, None].expand_as(read[:, :, :, -1])
        torch.testing.assert_close(read[:, :, :, -1], expected, **CLOSE)
    with fix.applied_to(vit):
        assert vitreg.diagnose(vit, [batch]).images == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm dinov3", "timm beit", "open_clip vit"])
def test_compiled_before_and_after(name):
    vit = CATALOG[name].backbone()
    batch = images(vit, 2)
    fix = AttentionBias.calibrate(vit, [batch], NEURONS)
    early = torch.compile(vit.model, fullgraph=True, backend="eager")
    with torch.no_grad():
        plain = tensors(early(batch))[0]
        with fix.applied_to(vit):
            eager = tensors(vit.model(batch))[0]
            for compiled in (early, torch.compile(vit.model, fullgraph=True, backend="eager")):
                torch.testing.assert_close(tensors(compiled(batch))[0], eager, **CLOSE)
        assert (plain - eager).abs().max() > 1e-2
        torch.testing.assert_close(tensors(early(batch))[0], plain, **CLOSE)


# -- one attention ---------------------------------------------------------------------------------


def inside(key, value):
    """The mode that adds a key, around no block in particular."""
    return _OneMoreKey(key, value)


@pytest.mark.parametrize("mask", [None, "bool", "float", "broadcast"])
@pytest.mark.parametrize("shared_heads", [1, 2])
def test_one_attention_by_hand(mask, shared_heads):
    """softmax(q [K; k']^T) [V; v'], where the mask hides tokens and never the constant key."""
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 5, 8), torch.randn(2, 4, 5, 6)
    k, v = k[:, ::shared_heads], v[:, ::shared_heads]
    key, value = (torch.randn(4 // shared_heads, c).repeat_interleave(shared_heads, 0) for c in (8, 6))
    hidden = torch.rand(5, 5) < 0.4
    masks = {"bool": ~hidden, "float": torch.randn(2, 1, 5, 5), "broadcast": torch.randn(2, 4, 5, 1)}
    given = masks.get(mask)
    with inside(key, value):
        found = F.scaled_dot_product_attention(q, k, v, given, enable_gqa=True)
    k, v = (x.repeat_interleave(shared_heads, 1) for x in (k, v))
    logits = q @ k.transpose(-2, -1) * 8**-0.5
    if mask == "bool":
        logits = logits.masked_fill(hidden, -torch.inf)
    elif mask:
        logits = logits + given
    extra = (q * key[:, None]).sum(-1, keepdim=True) * 8**-0.5
    attention = torch.cat([logits, extra], -1).softmax(-1)
    torch.testing.assert_close(found, attention[..., :-1] @ v + attention[..., -1:] * value[:, None])


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_a_multihead_attention_by_hand(masked, weights):
    """nn.MultiheadAttention, and what those who watch it see, against the same numbers step by step."""
    module, x = torch.nn.MultiheadAttention(32, 4), torch.randn(6, 2, 32)
    key, value, hidden = torch.randn(4, 8), torch.randn(4, 8), torch.rand(6, 6) < 0.4
    calls = []
    with intercept(calls.append), inside(key, value):
        found, _ = module(x, x, x, need_weights=weights, attn_mask=hidden if masked else None)
    projected = F.linear(x, module.in_proj_weight, module.in_proj_bias)
    q, k, v = projected.unflatten(-1, (3, 4, 8)).permute(2, 1, 3, 0, 4)
    logits = (q @ k.transpose(-2, -1)).masked_fill(hidden, -torch.inf) if masked else q @ k.transpose(-2, -1)
    extra = (q * key[:, None]).sum(-1, keepdim=True)
    attention = (torch.cat([logits, extra], -1) * 8**-0.5).softmax(-1)
    mixed = attention[..., :-1] @ v + attention[..., -1:] * value[:, None]
    torch.testing.assert_close(found, module.out_proj(mixed.permute(2, 0, 1, 3).flatten(2)), **CLOSE)
    if not weights:
        torch.testing.assert_close(calls[0].rows(slice(None)), attention, **CLOSE)


def test_what_is_refused():
    vit = CATALOG["timm vit"].backbone()
    batch = images(vit, 1)
    for wrong in ({"registers": 2}, {"left": "mean"}, {"keep_prefix": True}):
        with pytest.raises(ValueError, match="expected one register"):
            AttentionBias.calibrate(vit, [batch], NEURONS, **wrong)
    with pytest.raises(vitreg.ImageError, match="no images to calibrate"):
        AttentionBias.calibrate(vit, [], NEURONS)
    with pytest.raises(FixError, match="expected keys and values of 3 blocks"):
        AttentionBias(NEURONS).apply(vit)
    fix = AttentionBias.calibrate(vit, [batch], NEURONS)
    with pytest.raises(FixError, match="expected keys and values of 3 blocks"):
        AttentionBias(NEURONS, {k: v[1:] for k, v in fix.tensors.items()}).apply(vit)
    q = torch.randn(1, 4, 5, 8)
    constant = torch.randn(4, 8)
    with inside(constant, constant), pytest.raises(vitreg.UnsupportedModelError, match="is causal"):
        F.scaled_dot_product_attention(q, q, q, is_causal=True)
    module, x, mask = (
        torch.nn.MultiheadAttention(32, 4),
        torch.randn(5, 1, 32),
        torch.ones(5, 5).triu(1).bool(),
    )
    with inside(constant, constant), pytest.raises(vitreg.UnsupportedModelError, match="is causal"):
        module(x, x, x, attn_mask=mask, is_causal=True)


def test_fixes_with_other_constants_are_other_fixes():
    vit = CATALOG["timm vit"].backbone()
    one, again, other = (AttentionBias.calibrate(vit, [images(vit, 1, seed)], NEURONS) for seed in (0, 0, 1))
    assert one == again != other
    assert hash(one) == hash(again)
    assert one != TestTimeRegisters(NEURONS)
    handle = one.apply(vit)
    with pytest.raises(FixError, match="already applied"):
        again.apply(vit)
    other.apply(vit).undo()
    handle.undo()


# -- the real model --------------------------------------------------------------------------------


def test_vit_ti_without_its_artifacts(shared):
    vit = vitreg.load(str(shared / "models/vit_tiny_patch16_224.augreg_in21k_ft_in1k"))
    photos = [b.pixels for b in vitreg.read_images(shared / "data/imagenet-sample-1000", vit, limit=40)]
    neurons = RegisterNeurons.of({7: [417]})
    fix = AttentionBias.calibrate(vit, photos, neurons)
    batch = torch.cat(photos)[:20]

    def last(fix):
        with torch.no_grad(), fix.applied_to(vit), vitreg.trace(vit, residuals=True, layers=[11]) as t:
            output = vit(batch)
        return t.residuals[0], output

    biased, scores = last(fix)
    register, expected = last(TestTimeRegisters(neurons))
    assert biased[:, 1:].norm(dim=-1).max() < 60
    assert torch.cosine_similarity(biased, register, dim=-1).mean() > 0.98
    assert (scores.argmax(-1) == expected.argmax(-1)).float().mean() > 0.9
