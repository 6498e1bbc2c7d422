"""The no-op test: what readers see of known directions, and what attention does without known tokens."""

import json
from dataclasses import replace

import pytest
import torch
from catalog import CATALOG, images
from phantoms import crops

import vitreg
from vitreg.fixes.neurons import RegisterNeurons
from vitreg.hooks.attention_mode import intercept
from vitreg.models.head import find_readout
from vitreg.studies.noop import _centred, _others, _seen, _value_reader, _visibility, _Without, noop_test

LAYER = 1
KINDS_OF_ATTENTION = ["timm vit", "timm dinov3", "timm relpos cls", "torchvision vit", "open_clip vit"]


def make(name: str):
    vit = CATALOG[name].backbone()
    photos = crops(vit, 96, 0)
    phantom = vitreg.plant(vit, photos, LAYER)
    report = vitreg.diagnose(phantom.vit, [photos])
    return phantom, photos, report, RegisterNeurons.of({LAYER: list(phantom.neurons)})


@pytest.fixture(scope="module")
def planted():
    return make("timm vit")


@pytest.fixture(scope="module")
def found(planted):
    phantom, photos, report, neurons = planted
    return noop_test(phantom.vit, [photos], neurons, report)


# -- of the weights --------------------------------------------------------------------------------


def test_nothing_is_seen_of_the_null_space_and_all_of_a_random_direction():
    read = torch.randn(10, 32)
    hidden = torch.linalg.svd(read).Vh[10:].T  # (32, 22): the null space
    assert _seen(read, hidden).max() < 1e-5
    random = torch.nn.functional.normalize(torch.randn(32, 20_000), dim=0)
    assert _seen(read, random).square().mean() == pytest.approx(1, rel=0.02)
    assert torch.allclose(_seen(read, 1000 * random), _seen(read, random))  # a matter of direction only


def test_layer_norm_hides_what_all_channels_share():
    read, ones = torch.randn(10, 32), torch.ones(32, 1)
    assert _seen(_centred(read, torch.nn.LayerNorm(32)), ones) < 1e-5
    assert _seen(_centred(read, torch.nn.RMSNorm(32)), ones) > 0.1


@pytest.mark.parametrize("name", ["timm vit", "hf clip", "torchvision vit"])
def test_phantoms_hide_from_the_next_values(name):
    """Later values of a phantom are made to ignore what is written, and the test finds so."""
    phantom, photos, report, neurons = make(name)
    assert phantom.listens
    seen = [
        x
        for x in noop_test(phantom.vit, [photos], neurons, report).visibility
        if x.reader.startswith("the values")
    ]
    assert len(seen) == 4
    assert all(x.ratio < 0.2 and x.rank < 0.05 for x in seen)
    others = RegisterNeurons.of({LAYER: [i for i in range(20) if i not in phantom.neurons]})
    ordinary = noop_test(phantom.vit, [photos], others, report).visibility
    assert min(x.ratio for x in ordinary) > 0.3


@pytest.mark.parametrize("name", ["timm vit", "torchvision vit", "open_clip vit", "hf clip"])
def test_values_are_read_as_the_model_reads_them(name):
    """In a pass, values less their mean over tokens are the reader times the stream less its mean."""
    vit = CATALOG[name].backbone()
    photos = images(vit, 3)
    read = _value_reader(vit, photos, 2)
    with vitreg.trace(vit, qkv=True, residuals=True) as t, torch.no_grad():
        vit(photos)
    values = t.v[2].transpose(1, 2).flatten(2)  # (b, n, h * c)
    stream = torch.nn.functional.layer_norm(t.residuals[1], (vit.anatomy.width,))
    expected = (stream - stream.mean(1, keepdim=True)) @ read.T
    assert torch.allclose(values - values.mean(1, keepdim=True), expected, atol=1e-3)


def test_the_head_does_not_see_what_it_is_blind_to(planted):
    """The direction of a phantom, projected out of the head's weights."""
    phantom, photos, report, neurons = planted
    vit = CATALOG["timm vit"].backbone()
    vit.model.load_state_dict(phantom.vit.model.state_dict())
    blind = vit.model.norm.weight * (phantom.write - phantom.write.mean())
    with torch.no_grad():
        weight = vit.model.head.weight
        weight -= torch.outer(weight @ blind, blind) / blind.square().sum()
    seen = [x for x in noop_test(vit, [photos], neurons, report).visibility if x.reader == "the head"]
    assert max(x.ratio for x in seen) < 1e-4


def test_layer_scale_is_part_of_what_a_neuron_writes():
    vit = CATALOG["timm dinov2 registers"].backbone()
    photos, block = images(vit, 3), vit.model.blocks[LAYER]
    with torch.no_grad():
        block.ls2.gamma.copy_(torch.rand(32) ** 4)
    seen = _visibility(vit, photos, RegisterNeurons.of({LAYER: [7]}), find_readout(vit))
    write = block.ls2.gamma.detach()[:, None] * block.mlp.fc2.weight.detach()
    by_hand = _seen(_value_reader(vit, photos, LAYER + 1), write)[7]
    assert seen[-1].reader == "the values of block 2"
    assert seen[-1].ratio == pytest.approx(float(by_hand), rel=1e-3)


# -- of the model ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS_OF_ATTENTION)
@pytest.mark.parametrize("silenced", [True, False])
def test_attention_without_some_tokens_is_what_it_would_be_by_hand(name, silenced):
    """The first block's residual update, computed from its own attention rows and values."""
    vit = CATALOG[name].backbone()
    photos, layout = images(vit, 3), vit.layout
    marked = torch.zeros(3, layout.tokens, dtype=torch.bool)
    marked[:, layout.patch(1, 2)] = True
    marked[1, layout.patch(0, 0)] = True
    block = vit.anatomy.block_modules(vit.model)[0]
    calls, out = [], []
    projections = [m for n, m in block.named_modules() if n.endswith(("attn.proj", "out_proj"))]
    assert len(projections) == 1
    attention = next(m for m in block.modules() if projections[0] in list(m.children()))
    hook = attention.register_forward_hook(lambda m, args, y: out.append(y[0] if isinstance(y, tuple) else y))
    with torch.no_grad():
        with intercept(lambda call: calls.append((call.rows(slice(None)), call.v))):
            vit(photos)
        with _Without(vit, marked, 0, silenced):
            vit(photos)
        hook.remove()
        rows, values = calls[0]
        rows = rows.masked_fill(marked[:, None, None], 0)
        if not silenced:
            rows = rows / rows.sum(-1, keepdim=True)
        expected = projections[0]((rows @ values).transpose(1, 2).flatten(2))
    assert not torch.allclose(out[0], out[1], atol=1e-2)
    assert torch.allclose(out[1], expected, atol=1e-4)


def test_earlier_blocks_are_left_alone_and_so_is_the_model(planted):
    phantom, photos, _, _ = planted
    vit, few = phantom.vit, photos[:4]
    marked = torch.ones(4, vit.layout.tokens, dtype=torch.bool)
    marked[:, 0] = False
    with vitreg.trace(vit, residuals=True) as plain, torch.no_grad():
        before = vit(few)
    with _Without(vit, marked, 2, True), vitreg.trace(vit, residuals=True) as t, torch.no_grad():
        vit(few)
    assert torch.equal(t.residuals[1], plain.residuals[1])
    assert not torch.allclose(t.residuals[2], plain.residuals[2])
    with torch.no_grad():
        assert torch.equal(vit(few), before)
    assert not any(block._forward_pre_hooks for block in vit.model.blocks)


def test_others_are_as_many_normal_patches_and_random():
    outliers = torch.rand(50, 40) < 0.1
    chosen = _others(outliers, 0)
    assert torch.equal(chosen.sum(1), outliers.sum(1))
    assert not (chosen & outliers).any()
    assert torch.equal(_others(outliers[10:], 10), chosen[10:])  # by image, not by batch
    assert (chosen.sum(0) > 0).float().mean() > 0.9


def test_a_phantoms_outliers_are_a_no_op(found, planted):
    phantom, photos, _, _ = planted
    affected = int(phantom.marked(photos).flatten(1).any(1).sum())
    assert (found.images, found.with_outliers, found.blocks) == (96, affected, (2, 2))
    assert found.reason.startswith("a no-op")
    effects = {(effect.how, effect.tokens): effect.measures for effect in found.effects}
    assert effects["silenced", "outliers"]["cls"].value > 0.999
    # They hand on nothing, but they take attention that others get when they are gone.
    assert effects["removed", "outliers"]["cls"].value < effects["silenced", "outliers"]["cls"].value - 0.01


def test_outliers_that_are_read_are_no_no_op(planted):
    """A phantom whose values listen: what a sink writes is taken up by every token."""
    _, photos, _, neurons = planted
    phantom = vitreg.plant(CATALOG["timm vit"].backbone(), photos, LAYER)
    vit = phantom.vit
    with torch.no_grad():  # values of block 2 read the direction that marks them
        qkv = vit.model.blocks[2].attn.qkv
        qkv.weight[-32:] += 3 * torch.outer(torch.randn(32), vit.model.blocks[2].norm1.weight * phantom.write)
    found = noop_test(vit, [photos], neurons, vitreg.diagnose(vit, [photos]))
    assert found.reason.startswith("no no-op"), found.reason
    assert found.more["silenced"].low > 0


@pytest.mark.parametrize(("value", "says"), [(0.5, "no no-op"), (-0.5, "a no-op: "), (0.0, "a no-op as far")])
def test_less_of_a_cosine_is_more_of_a_change(found, value, says):
    def reason(judged_by: str, value: float) -> str:
        estimate = replace(found.more["silenced"], value=value, low=value - 0.1, high=value + 0.1)
        return replace(found, judged_by=judged_by, more={"silenced": estimate}).reason

    assert reason("logit_change", value).startswith(says)
    assert reason("cls", -value).startswith(says)


def test_batches_make_no_difference(found, planted):
    phantom, photos, report, neurons = planted
    other = noop_test(phantom.vit, list(photos.split(7)), neurons, report)
    assert other.more["silenced"].value == pytest.approx(found.more["silenced"].value, rel=1e-3, abs=1e-5)
    for one, same in zip(found.effects, other.effects, strict=True):
        for name, estimate in one.measures.items():
            assert estimate.value == pytest.approx(same.measures[name].value, rel=1e-3, abs=1e-5)


def test_the_result_is_json_and_text(found):
    saved = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert {"reason", "visibility", "effects", "more"} <= saved.keys()
    text = str(found)
    assert "outliers silenced" in text
    assert "others removed" in text
    assert text.count("seen by the values of block 2") == 4


def test_wrong_requests(planted):
    phantom, photos, report, neurons = planted
    clean = vitreg.diagnose(CATALOG["timm vit"].backbone(), [photos])
    with pytest.raises(vitreg.FixError, match="no block comes after"):
        noop_test(phantom.vit, [photos], neurons, clean)
    with pytest.raises(vitreg.FixError, match="no block comes after"):
        noop_test(phantom.vit, [photos], neurons, replace(report, onset_layer=2))
    with pytest.raises(vitreg.ImageError, match="no images"):
        noop_test(phantom.vit, [], neurons, report)
    without = photos[~phantom.marked(photos).flatten(1).any(1)]
    with pytest.raises(vitreg.ImageError, match="none of these images"):
        noop_test(phantom.vit, [without], neurons, report)


# -- the real model --------------------------------------------------------------------------------


def test_the_real_register_neuron_writes_where_few_look(shared):
    """#417 of block 7: of 768 neurons the one that the head and the next values see least."""
    vit = vitreg.load(str(shared / "models/vit_tiny_patch16_224.augreg_in21k_ft_in1k"))
    paths = sorted((shared / "data/imagenet-sample-1000").iterdir())[::62]
    photos = list(vitreg.read_images(paths, vit, workers=0))
    found = noop_test(vit, photos, RegisterNeurons.of({7: [417]}), vitreg.diagnose(vit, photos))
    assert [x.reader for x in found.visibility] == ["the head", "the values of block 8"]
    assert all(x.ratio < 0.5 and x.rank < 0.005 for x in found.visibility)
    assert find_readout(vit).read.shape == (1000, 192)
    effects = {(effect.how, effect.tokens): effect.measures["cls"].value for effect in found.effects}
    # Its tokens are attended to, so that the others get less: without them CLS turns far, silenced little.
    assert effects["removed", "outliers"] < 0.95 < effects["silenced", "outliers"] < 0.995
    assert effects["removed", "others"] > 0.998
