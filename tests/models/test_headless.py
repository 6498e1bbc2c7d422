"""Models whose head raises for images alone: the blocks are read as ever, the rest is said in a line."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from catalog import CATALOG, HF_SMALL, images, randomise
from headless_models import raising
from phantoms import crops
from torch import Tensor, nn

import vitreg
from vitreg import UnsupportedModelError
from vitreg.diagnosis.one_image import inspect_image
from vitreg.features.observer import Observer
from vitreg.models.head import find_readout
from vitreg.models.headless import without_output

VISION = HF_SMALL | {"image_size": 32, "intermediate_size": 128}


def transformers_model(build: Callable[[Any], nn.Module]) -> Callable[[], nn.Module]:
    def built() -> nn.Module:
        import transformers

        torch.manual_seed(0)
        return randomise(build(transformers)).eval()

    return built


def captioner(encoder: str, encoder_config: str, decoder: str) -> Callable[[Any], nn.Module]:
    def build(library: Any) -> nn.Module:
        text = {
            "GPT2Config": {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 64, "n_positions": 16},
            "TrOCRConfig": {
                "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 64,
                "vocab_size": 64, "cross_attention_hidden_size": 32,
            },
        }[decoder]  # fmt: skip
        last = getattr(library, decoder)(**text, is_decoder=True, add_cross_attention=True)
        config = library.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
            getattr(library, encoder_config)(**VISION), last
        )
        return library.VisionEncoderDecoderModel(config=config)

    return build


MODELS = {
    "ViT-GPT2": transformers_model(captioner("ViTModel", "ViTConfig", "GPT2Config")),
    "TrOCR": transformers_model(captioner("DeiTModel", "DeiTConfig", "TrOCRConfig")),
}


ERRORS = [TypeError("text?"), KeyError("input_ids"), AssertionError(), RuntimeError("a\nb"), StopIteration()]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_whatever_the_head_raises_the_blocks_are_read(error: Exception) -> None:
    whole, vit = CATALOG["timm vit"].backbone(), raising(error)
    assert vit.anatomy.head_error.startswith(type(error).__name__)
    assert "\n" not in vit.anatomy.head_error
    assert vit(images(vit)) is None
    assert find_readout(vit).norm is vit.model.norm
    assert find_readout(vit).classes is None
    for each in (whole, vit):
        with vitreg.trace(each, residuals=True, attention="full") as t:
            each(images(each))
        seen = (t.residuals, t.attention) if each is whole else seen
    assert torch.equal(seen[0], t.residuals)
    assert torch.equal(seen[1], t.attention)


@pytest.mark.parametrize("name", MODELS)
def test_a_captioner_is_diagnosed(name: str) -> None:
    vit = vitreg.wrap(MODELS[name](), image_size=32)
    with vitreg.TestTimeRegisters({0: [1]}).applied_to(vit):
        report = vitreg.diagnose(vit, [images(vit)])
    assert len(report.layers) == vit.anatomy.depth
    assert vit(images(vit)) is None


def test_a_captioner_is_fixed_and_verified() -> None:
    vit = vitreg.wrap(MODELS["ViT-GPT2"](), image_size=32)
    photos = [crops(vit, 12, 0)]
    phantom = vitreg.plant(vit, photos, 1).vit
    report = vitreg.diagnose(phantom, photos)
    assert report.has_artifacts
    neurons = vitreg.find_register_neurons(phantom, photos, report=report)
    for fix in (
        vitreg.TestTimeRegisters.calibrate(phantom, photos, neurons),
        vitreg.AttentionBias.calibrate(phantom, photos, neurons),
        vitreg.ShiftAverage(views=1),
    ):
        with fix.applied_to(phantom):
            vitreg.diagnose(phantom, photos)
    verdict = vitreg.verify(phantom, fix, photos, report=report, controls=False)
    assert "has no output for images alone: behind its blocks it raises" in verdict.full()
    assert inspect_image(phantom, photos[0][:1]).logits is None
    assert vitreg.noop_test(phantom, photos, neurons, report).judged_by == "cls"
    with vitreg.TestTimeRegisters(neurons).applied_to(phantom):
        assert vitreg.what_registers_learn(phantom, photos)
    found = Observer(phantom, ["cls", "mean", "keys@0"])(photos[0])
    assert found["cls"].shape == (12, 32)


@pytest.mark.parametrize("feature", ["logits", "output"])
def test_what_needs_the_output_says_why_there_is_none(feature: str) -> None:
    vit = raising(TypeError("text?"))
    with pytest.raises(UnsupportedModelError, match=r"no output for images alone.*TypeError: text\?"):
        Observer(vit, [feature])
    assert without_output(vit)
    assert without_output(CATALOG["timm vit"].backbone()) == ""


def test_errors_of_the_blocks_and_of_watchers_are_errors() -> None:
    vit = raising(TypeError("text?"))

    def refuse(layer: int, residual: Tensor) -> None:
        raise ZeroDivisionError

    with vitreg.watch(vit, on_block=refuse), pytest.raises(ZeroDivisionError):
        vit(images(vit))
    with pytest.raises(Exception, match=r"doesn't match model|size"):
        vit(torch.zeros(1, 3, 8, 8))  # of another size
    before = len(vit.model.blocks[-1]._forward_hooks)
    vit(images(vit))
    assert len(vit.model.blocks[-1]._forward_hooks) == before
