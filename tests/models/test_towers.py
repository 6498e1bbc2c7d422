"""The vision towers inside whole multimodal models of transformers: found, and read as by hooks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from catalog import CATALOG, HF_SMALL, images, randomise
from torch import Tensor, nn

import vitreg
from vitreg.errors import UnsupportedModelError
from vitreg.models.from_transformers import vision_towers
from vitreg.models.probe import first_tensor

TEXT: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 300,
    "head_dim": 8,
    "pad_token_id": 0,
}
VISION = HF_SMALL | {"intermediate_size": 128}


def whole(model: str, config: str, text: str, vision: Any, **settings: Any) -> Callable[[], nn.Module]:
    """A multimodal model, small."""

    def build() -> nn.Module:
        import transformers

        parts = {"text_config": {"model_type": text} | TEXT, "vision_config": vision}
        built: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**parts | settings))
        return built

    return build


def pixtral() -> dict[str, Any]:
    return {"model_type": "pixtral"} | VISION


CLIP, SIGLIP = ({"model_type": kind} | VISION for kind in ("clip_vision_model", "siglip_vision_model"))
NEXT = {"image_grid_pinpoints": [[32, 64]], "image_token_id": 5}
WHOLE = {
    "LLaVA-NeXT": whole("LlavaNextForConditionalGeneration", "LlavaNextConfig", "llama", CLIP, **NEXT),
    "LLaVA-OneVision": whole(
        "LlavaOnevisionForConditionalGeneration", "LlavaOnevisionConfig", "qwen2", SIGLIP, **NEXT
    ),
    "LLaVA with Pixtral": whole(
        "LlavaForConditionalGeneration", "LlavaConfig", "llama", pixtral(), image_token_id=5
    ),
    "PaliGemma": whole(
        "PaliGemmaForConditionalGeneration", "PaliGemmaConfig", "gemma", SIGLIP, image_token_id=5
    ),
    "Gemma 3": whole(
        "Gemma3ForConditionalGeneration", "Gemma3Config", "gemma3_text", SIGLIP, mm_tokens_per_image=4
    ),
    "Idefics3": whole(
        "Idefics3ForConditionalGeneration", "Idefics3Config", "llama", VISION, image_token_id=5
    ),
    "SmolVLM": whole("SmolVLMForConditionalGeneration", "SmolVLMConfig", "llama", VISION, image_token_id=5),
    "InternVL": whole(
        "InternVLForConditionalGeneration",
        "InternVLConfig",
        "qwen2",
        VISION | {"image_size": (32, 32), "patch_size": (8, 8)},
        image_token_id=5,
    ),
}


@pytest.mark.parametrize("name", WHOLE)
def test_the_tower_of_a_whole_model_is_read_as_by_hooks(name: str) -> None:
    torch.manual_seed(0)
    tower = next(vision_towers(randomise(WHOLE[name]()).eval()))
    vit = vitreg.wrap(tower, image_size=(32, 32))
    left: list[Tensor] = []
    entered: list[Tensor] = []
    hooks: list[Any] = [
        block.register_forward_hook(lambda m, a, y: left.append(first_tensor(y)))
        for block in vit.anatomy.block_modules(vit.model)
    ]
    hooks += [
        down.register_forward_pre_hook(lambda m, a: entered.append(a[0]))
        for down in vit.anatomy.down_projections(vit.model)
    ]
    with torch.no_grad(), vitreg.trace(vit, residuals=True, neurons=True) as t:
        vit(images(vit, 3))
    for hook in hooks:
        hook.remove()
    assert vit.layout.grid == (4, 4)
    assert torch.equal(t.residuals, torch.stack(left).reshape(t.residuals.shape))
    assert torch.equal(t.neurons, torch.stack(entered).reshape(t.neurons.shape))


def test_a_fix_on_a_packed_tower_reaches_the_language_model() -> None:
    """In its forward and in generate, for two photos of one size."""
    import transformers

    text = TEXT | {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    vision = {"depth": 2, "embed_dim": 32, "num_heads": 4, "hidden_size": 16, "mlp_ratio": 2}
    tokens = {"image_token_id": 5, "vision_start_token_id": 7, "vision_end_token_id": 8}
    config = transformers.Qwen2VLConfig(vision_config=vision, text_config=text, **tokens)
    torch.manual_seed(0)
    whole = randomise(transformers.Qwen2VLForConditionalGeneration(config)).eval()
    vit = vitreg.wrap(whole.model.visual, image_size=(56, 56))
    photos = list(torch.rand(2, 3, 56, 56))
    given = transformers.Qwen2VLImageProcessor()(photos, return_tensors="pt", do_resize=False)
    ids = torch.tensor([[1, 7, 5, 5, 5, 5, 8, 2], [1, 7, 5, 5, 5, 5, 8, 3]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **given}
    inputs["mm_token_type_ids"] = (ids == 5).long()
    with torch.no_grad():
        plain = whole(**inputs).logits
        with vitreg.TestTimeRegisters({0: [1, 2], 1: [3]}).applied_to(vit):
            fixed = whole(**inputs).logits
            answer = whole.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert torch.equal(whole(**inputs).logits, plain)
    assert float((fixed - plain).abs().max()) > 1e-3
    assert torch.equal(answer[:, 8], fixed[:, -1].argmax(-1))


@pytest.mark.parametrize("initial", ["zero", "mean", "random"])
@pytest.mark.parametrize("peak", ["signed", "absolute"])
def test_padding_counts_for_nothing_in_registers(initial: Any, peak: Any) -> None:
    """SigLIP 2 (NaFlex) takes images of several grids, padded to one length. Who reads them is refused."""
    vit = CATALOG["hf siglip2"].backbone()
    grids = torch.tensor([[3, 6], [2, 5]])
    mask = (torch.arange(18) < grids.prod(1)[:, None]).long()
    patches = 3 * torch.rand(2, 18, 192, generator=torch.Generator().manual_seed(0))
    patches[1, 10:] = 9  # nobody is to notice
    with (
        vitreg.trace(vit),
        pytest.raises(UnsupportedModelError, match="images of 2 patch grids in one batch"),
    ):
        vit.model(patches, mask, grids)
    fix = vitreg.TestTimeRegisters({0: [3, 7], 1: [11]}, initial=initial, peak=peak)
    with torch.no_grad(), fix.applied_to(vit):
        together = first_tensor(vit.model(patches, mask, grids))
        alone = first_tensor(vit.model(patches[1:, :10], mask[1:, :10], grids[1:]))
    torch.testing.assert_close(together[1, :10], alone[0], rtol=1e-4, atol=1e-4)
