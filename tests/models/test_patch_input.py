"""Towers of transformers that take patches: each pixel goes where the family's own processor puts it."""

from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from packed_models import PACKED
from torch import Tensor

import vitreg
from vitreg.errors import UnsupportedModelError

TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 200,
}


def qwen() -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {
        "depth": 2,
        "hidden_size": 32,
        "num_heads": 4,
        "intermediate_size": 64,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [1],
    }
    rope = {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(vision_config=vision, text_config=TEXT | rope))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model with a vision tower, as it is saved."""
    from transformers import Qwen2VLImageProcessor

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("qwen")
    qwen().save_pretrained(path)
    Qwen2VLImageProcessor().save_pretrained(path)
    return path


def test_the_tower_of_a_saved_language_model_is_loaded(folder: Path) -> None:
    with pytest.warns(vitreg.ModelWarning, match="gives no picture of one size; one view is read"):
        vit = vitreg.load(str(folder))
    assert type(vit.model).__name__ == "Qwen2_5_VisionTransformerPretrainedModel"
    assert (vit.image_size, vit.layout.grid) == ((224, 224), (16, 16))
    with pytest.warns(vitreg.ModelWarning):
        random = vitreg.load(str(folder), random_weights=True)
    assert random.anatomy == vit.anatomy
    assert list(random.model.state_dict()) == list(vit.model.state_dict())


def test_the_tower_is_given_what_the_processor_gives(folder: Path) -> None:
    """What enters the blocks is what the processor's own patches of the same photo make."""
    from transformers import Qwen2VLImageProcessor

    with pytest.warns(vitreg.ModelWarning):
        vit = vitreg.load(str(folder))
    assert vit.preprocess is not None
    noise = torch.rand(224, 224, 3, generator=torch.Generator().manual_seed(0))
    photo = PIL.Image.fromarray((noise * 255).byte().numpy())
    given = Qwen2VLImageProcessor()(photo, return_tensors="pt", do_resize=False)
    seen: list[Tensor] = []
    block = vit.model.get_submodule("blocks.0")
    hook = block.register_forward_pre_hook(lambda m, args, kwargs: seen.append(args[0]), with_kwargs=True)
    with hook, torch.no_grad():
        vit.model(given["pixel_values"], grid_thw=given["image_grid_thw"])
        vit(vit.preprocess(photo)[None])
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen2-vl", "qwen3-vl", "glm-4v"])
def test_patches_of_several_images_are_those_of_the_processor(name: str) -> None:
    import transformers

    processor = (
        transformers.Glm4vImageProcessor() if name == "glm-4v" else transformers.Qwen2VLImageProcessor()
    )
    vit = PACKED[name].backbone()
    batch = torch.rand(3, 3, *vit.image_size, generator=torch.Generator().manual_seed(0))
    sizes = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2}
    untouched = dict.fromkeys(("do_resize", "do_rescale", "do_normalize"), False)
    expected = processor(list(batch), return_tensors="pt", **sizes, **untouched)
    given: list[dict[str, Any]] = []
    hook = vit.model.register_forward_pre_hook(
        lambda m, args, kwargs: given.append(kwargs | {"patches": args[0]}), with_kwargs=True
    )
    with hook, torch.no_grad():
        vit(batch)
    assert torch.equal(given[0]["patches"], expected["pixel_values"])
    assert torch.equal(given[0]["grid_thw"], expected["image_grid_thw"])


def test_images_that_do_not_divide_into_squares_are_refused() -> None:
    vit = PACKED["qwen2-vl"].backbone()
    with pytest.raises(UnsupportedModelError, match="sides are multiples of 16, found 40x80"):
        vit(torch.rand(1, 3, 40, 80))
