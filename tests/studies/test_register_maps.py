"""What registers learn is read where they are: in a model of their own, added to one, or carried by a fix."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from catalog import CATALOG, images
from matplotlib.text import Text
from timm.models import VisionTransformer

import vitreg
from vitreg.errors import ImageError, UnsupportedModelError
from vitreg.fixes import TestTimeRegisters, TokenSplitting
from vitreg.fixes.added_registers import add_registers
from vitreg.fixes.neurons import RegisterNeuron, RegisterNeurons
from vitreg.plots.style import png
from vitreg.studies.register_maps import RegisterStudy, what_registers_learn

NEURON = RegisterNeurons((RegisterNeuron(1, 3, threshold=0.1),))


def study(vit: vitreg.Backbone, **options) -> RegisterStudy:
    return what_registers_learn(vit, [images(vit, 3), images(vit, 2, seed=1)], **options)


def names(count: int) -> list[str]:
    return ["CLS", *(f"register {i}" for i in range(count))]


@pytest.mark.parametrize("name", [name for name in CATALOG if CATALOG[name].truth.registers])
def test_a_models_own_registers_by_trace(name):
    """Both similarities and the maps, from the tensors that `trace` records."""
    entry = CATALOG[name]
    vit, r = entry.backbone(), entry.truth.registers
    found = study(vit, layer=1)
    cls = entry.truth.prefix > 0
    assert found.queries == names(r)[not cls :]
    outputs, maps = [], []
    for batch in (images(vit, 3), images(vit, 2, seed=1)):
        with vitreg.trace(vit, residuals=True, attention="full", layers=[1]) as t, torch.no_grad():
            vit(batch)
        stream, layout = t.residuals[0], t.layout
        tokens = [*range(cls), *range(layout.prefix, layout.prefix + r)]
        mean = stream[:, layout.patch_slice].mean(1, keepdim=True)
        outputs.append(torch.cat([stream[:, tokens], mean], 1))
        maps.append(t.attention[0].mean(1)[:, tokens, layout.patch_slice])
    for similarity, x in ((found.output_similarity, outputs), (found.map_similarity, maps)):
        x = torch.cat(x)
        torch.testing.assert_close(
            torch.tensor(similarity), F.cosine_similarity(x[:, :, None], x[:, None], dim=-1).mean(0)
        )
    np.testing.assert_allclose(found.examples[3].maps.reshape(cls + r, -1), maps[1][0], atol=1e-6)
    np.testing.assert_allclose(found.attention, torch.cat(maps).sum(2).mean(0), rtol=1e-4)
    assert [example.name for example in found.examples] == [f"image-{i}" for i in (0, 1, 2, 3)]


def with_own_registers(n: int) -> VisionTransformer:
    return VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=4, num_classes=0, reg_tokens=n,
        no_embed_class=True,
    ).eval()  # fmt: skip


def test_added_registers_are_read_as_the_same_ones_of_the_librarys_own():
    own = with_own_registers(2)
    torch.nn.init.normal_(own.reg_token)
    added = with_own_registers(0)
    added.load_state_dict({k: v for k, v in own.state_dict().items() if k != "reg_token"})
    add_registers(vitreg.wrap(added, image_size=32), 2, initial=own.reg_token.detach()[0])
    one, other = (study(vitreg.wrap(model, image_size=32)) for model in (own, added))
    assert one.queries == other.queries == names(2)
    for name in ("output_similarity", "map_similarity", "attention"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=1e-5)


@pytest.mark.parametrize("layer", [1, 2])
def test_test_time_registers_follow_the_models_own(layer):
    vit = vitreg.wrap(with_own_registers(2), image_size=32)
    fix = TestTimeRegisters(NEURON, 1, entry=1, initial="random")
    with fix.applied_to(vit) as handle:
        found = study(vit, layer=layer)
        carried = handle.carried
        with vitreg.trace(vit, attention="registers", layers=[layer]) as t, torch.no_grad():
            vit(images(vit, 2, seed=1))
    assert found.queries == names(3)
    rows = t.attention[0].mean(1)[:, :, t.inner.patch_slice]
    np.testing.assert_allclose(found.examples[3].maps[1:].reshape(3, -1), rows[0], atol=1e-6)
    if layer == 2:
        assert carried.shape == (2, 1, 32)
        last = what_registers_learn_of_last(vit, fix)
        assert last == pytest.approx(found.output_similarity[3][0], abs=1e-5)


def what_registers_learn_of_last(vit: vitreg.Backbone, fix: TestTimeRegisters) -> float:
    """Mean cosine of the carried register and CLS after the last block, by hand."""
    cosines = []
    with fix.applied_to(vit) as handle:
        for batch in (images(vit, 3), images(vit, 2, seed=1)):
            with vitreg.trace(vit, residuals=True, layers=[2]) as t, torch.no_grad():
                vit(batch)
            cosines.append(F.cosine_similarity(handle.carried[:, 0], t.residuals[0, :, 0]))
    return float(torch.cat(cosines).mean())


def test_a_model_without_a_cls_token():
    vit = CATALOG["hf siglip"].backbone()
    add_registers(vit, 2, initial=1.0)
    found = study(vit)
    assert found.queries == ["register 0", "register 1"]
    assert found.tokens == ["register 0", "register 1", "patches"]


def test_models_without_registers_say_so():
    vit = vitreg.wrap(with_own_registers(0), image_size=32, name="mine")
    with pytest.raises(
        UnsupportedModelError, match=r"mine has no registers in block 2\. Expected a model with register"
    ):
        study(vit)
    with pytest.raises(UnsupportedModelError, match="has no registers in block 2"):
        study(CATALOG["hf siglip"].backbone())  # nor a CLS token
    with (
        TestTimeRegisters(NEURON, 1, entry=1).applied_to(vit),
        pytest.raises(UnsupportedModelError, match="no registers in block 0"),
    ):
        study(vit, layer=0)
    everything = RegisterNeurons((RegisterNeuron(1, 3, threshold=-1e9),))
    with (
        TokenSplitting(everything).applied_to(vit),
        pytest.raises(UnsupportedModelError, match=r"a fix carries other tokens there \(token splitting\)"),
    ):
        study(vit)


def test_other_wrong_requests():
    vit = vitreg.wrap(with_own_registers(1), image_size=32)
    with pytest.raises(ValueError, match="found layer 3, but the model has layers 0 to 2"):
        study(vit, layer=3)
    with pytest.raises(ImageError, match="there are no images"):
        what_registers_learn(vit, [])


def test_words_json_and_figure():
    found = study(replace(vitreg.wrap(with_own_registers(2), image_size=32), planted=True), examples=2)
    text = found.full()
    assert f"register 1 {found.attention[2]:.1%}" in text
    assert f"{found.output_similarity[0][1]:6.2f}" in text
    assert "examples" not in json.loads(json.dumps(found.to_json()))
    figure = found.figure()
    texts = [t.get_text() for t in figure.findobj(Text)]
    assert f"reg. 1: {found.attention[2]:.0%}" in texts
    assert texts.count(f"{found.output_similarity[0][1]:.2f}") >= 2
    assert "a phantom: its artifacts were planted" in texts
    assert len([ax for ax in figure.axes if ax.images]) == 2 * 4 + 2
    assert png(found.figure(), dpi=60) == png(figure, dpi=60)
    assert png(replace(found, examples=[]).figure(), dpi=60)
