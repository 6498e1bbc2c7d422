"""Loading by name, from folders and from a hub's cache: the right model, its preprocessing, clear errors."""

import json
from pathlib import Path

import pytest
import timm
import torch
import transformers
from checkpoints import SMALL_HF, into_cache, message, rewrite_weights, tiny_timm
from gradients import gradient_photo
from timm.models._hub import save_for_hf

import vitreg
from vitreg.models.backbone import wrap
from vitreg.models.loading import load


@pytest.fixture
def timm_folder(tmp_path) -> Path:
    model = tiny_timm()
    folder = tmp_path / "timm-vit"
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    save_for_hf(
        model,
        folder,
        model_config={"architecture": "vit_tiny_patch16_224", "model_args": sizes},
        safe_serialization=True,
    )
    return folder


@pytest.fixture
def hf_folder(tmp_path) -> Path:
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7, mlp_ratio=2
    )
    folder = tmp_path / "hf-dinov2"
    transformers.Dinov2Model(config).save_pretrained(folder)
    transformers.BitImageProcessor(
        size={"shortest_edge": 32},
        crop_size={"height": 28, "width": 28},
        image_mean=[0.5] * 3,
        image_std=[0.25] * 3,
    ).save_pretrained(folder)
    return folder


# -- the right model ---------------------------------------------------------------------------------


def test_timm_folder(timm_folder):
    vit = load(str(timm_folder))
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(vit(images), tiny_timm()(images))
    assert (vit.image_size, vit.layout.grid) == ((32, 32), (4, 4))


def test_hf_folder(hf_folder):
    vit = load(str(hf_folder))
    images = torch.rand(2, 3, 28, 28)
    expected = transformers.Dinov2Model.from_pretrained(hf_folder).eval()(images).last_hidden_state
    assert torch.equal(vit(images).last_hidden_state, expected)
    assert (vit.image_size, vit.layout.grid) == ((28, 28), (4, 4))


def test_names_on_a_hub(timm_folder, hf_folder):
    into_cache(timm_folder, "vitreg-tests/tiny-timm")
    into_cache(hf_folder, "vitreg-tests/tiny-dinov2")
    assert load("timm:hf-hub:vitreg-tests/tiny-timm").anatomy == load(str(timm_folder)).anatomy
    assert load("hf:vitreg-tests/tiny-dinov2").anatomy == load(str(hf_folder)).anatomy


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm:vit_tiny_patch16_224", "hf:dinov2", "open_clip:ViT-S-32-alt"])
def test_random_weights_need_no_download_and_are_the_same_each_time(name):
    one = load(name, random_weights=True)
    torch.rand(5)  # whatever was drawn before
    other = load(name, random_weights=True)
    assert one.name == name
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_vision_tower_of_a_multimodal_checkpoint(tmp_path):
    vision = SMALL_HF | {"image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=SMALL_HF, vision_config=vision, projection_dim=16)
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    vit = load(str(tmp_path))
    assert (vit.anatomy.prefix, vit.layout.grid, vit.anatomy.width) == (1, (4, 4), 32)


def test_classifier_checkpoints_keep_their_head(tmp_path):
    config = transformers.ViTConfig(**SMALL_HF, image_size=32, patch_size=8)
    config.num_labels = 7
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    assert load(str(tmp_path))(torch.rand(1, 3, 32, 32)).logits.shape == (1, 7)


# -- preprocessing and size --------------------------------------------------------------------------


def test_timm_preprocessing_is_timms_own(shared):
    vit = load(str(shared / "models/vit_tiny_patch16_224.augreg_in21k_ft_in1k"))
    config = timm.data.resolve_model_data_config(vit.model)
    expected = timm.data.create_transform(**config, is_training=False)(gradient_photo())
    assert torch.equal(vit.preprocess(gradient_photo()), expected)
    assert float(expected.min()) < -0.9  # 0.5/0.5 normalisation, as this model wants


def test_hf_preprocessing_is_the_processors_own(hf_folder):
    processor = transformers.AutoImageProcessor.from_pretrained(hf_folder)
    expected = processor(gradient_photo(), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(load(str(hf_folder)).preprocess(gradient_photo()), expected)


def test_siglip_2_gets_whole_images_although_its_processor_cuts_patches(tmp_path):
    config = transformers.Siglip2VisionConfig(**SMALL_HF, patch_size=8, num_patches=16)
    transformers.Siglip2VisionModel(config).save_pretrained(tmp_path)
    transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=16).save_pretrained(tmp_path)
    vit = load(str(tmp_path))
    photos = vitreg.read_images([gradient_photo()], vit)
    assert vitreg.diagnose(vit, photos).grid == (4, 4)


def test_size_resamples_positions_as_the_library_does(timm_folder, hf_folder):
    vit = load(str(timm_folder), size=48)
    assert vit.layout.grid == (6, 6)
    sizes = {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
    expected = timm.create_model(f"local-dir:{timm_folder}", pretrained=True, **sizes)
    assert torch.equal(vit.model.pos_embed, expected.pos_embed)
    assert vit.preprocess(gradient_photo()).shape == (3, 48, 48)
    hf = load(str(hf_folder), size=42)
    assert (hf.layout.grid, hf.preprocess(gradient_photo()).shape) == ((6, 6), (3, 42, 42))
    hf(torch.rand(1, 3, 42, 42))


def test_size_for_models_that_interpolate_on_request(tmp_path):
    transformers.ViTModel(transformers.ViTConfig(**SMALL_HF, image_size=32, patch_size=8)).save_pretrained(
        tmp_path
    )
    vit = load(str(tmp_path), size=48)
    images = torch.rand(1, 3, 48, 48)
    expected = vit.model(images, interpolate_pos_encoding=True).last_hidden_state
    assert vit.layout.grid == (6, 6)
    assert torch.equal(vit(images).last_hidden_state, expected)


def test_size_for_open_clip():
    vit = load("open_clip:ViT-S-32-alt", size=96, random_weights=True)
    assert (vit.layout.grid, vit.preprocess(gradient_photo()).shape) == ((3, 3), (3, 96, 96))


def test_wrap_takes_a_timm_models_preprocessing_and_says_when_there_is_none():
    assert wrap(tiny_timm()).preprocess is not None
    plain = wrap(transformers.ViTModel(transformers.ViTConfig(**SMALL_HF, image_size=32, patch_size=8)))
    assert plain.preprocess is None
    with pytest.raises(vitreg.ImageError, match="wrapped without"):
        vitreg.read_images([gradient_photo()], plain)


def test_an_encoder_inside_a_larger_model_is_run_as_the_caller_says():
    class Captioner(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.words = tiny_timm(), torch.nn.Embedding(5, 32)

        def forward(self, pictures, words):
            return self.encoder.forward_features(pictures).mean(1) + self.words(words)

    model = Captioner().eval()
    words = torch.tensor([3])
    vit = wrap(model.encoder, forward=lambda images: model(images, words), image_size=32)
    images = torch.rand(2, 3, 32, 32)
    with vitreg.trace(vit) as t:
        assert torch.equal(vit(images), model(images, words))
    assert t.norms.shape == (2, 2, 17)
    with pytest.raises(vitreg.UnsupportedModelError, match="Give vitreg the vision encoder itself"):
        wrap(model, image_size=32)


def test_dtype_and_images_of_another_dtype(timm_folder):
    vit = load(str(timm_folder), dtype="bfloat16")
    assert vit(torch.rand(1, 3, 32, 32)).dtype == torch.bfloat16


# -- bad input: found, expected, what to do ----------------------------------------------------------


def test_unknown_names_suggest_the_nearest():
    assert "Did you mean timm:vit_tiny_patch16_224" in message("timm:vit_tiny_patch16_24")
    assert "Did you mean open_clip:ViT-B-32 or" in message("open_clip:ViT-B-3/laion2b")
    assert "needs one of these tags after a slash" in message("open_clip:ViT-B-32")
    assert "no model 'nonsense'" in message("nonsense")
    assert "timm:NAME" in message("nonsense")


def test_unreachable_hub_names_the_ways_out():
    said = message("hf:nobody/nothing")
    assert "could not load hf:nobody/nothing" in said
    assert "or give a local folder" in said
    assert "or give a local folder" in message("timm:hf-hub:nobody/nothing")


def test_folder_without_a_model(tmp_path):
    assert "holds no model: expected a config.json" in message(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    assert "not valid JSON" in message(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert "holds no model" in message(str(tmp_path))


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "model.pth").write_bytes(b"")
    assert "is a file; expected" in message(str(tmp_path / "model.pth"))


@pytest.mark.parametrize("library", ["timm", "hf"])
def test_missing_and_unexpected_keys(library, timm_folder, hf_folder):
    folder = timm_folder if library == "timm" else hf_folder
    key = "blocks.0.mlp.fc1.bias" if library == "timm" else "layernorm.weight"
    rewrite_weights(folder, lambda weights: weights.pop(key))
    said = message(str(folder))
    assert "does not fit" in said
    assert key in said
    strange = "layernorm.strange" if library == "hf" else "strange"
    rewrite_weights(
        folder,
        lambda weights: weights.update(
            {key: torch.ones(32 if library == "hf" else 128), strange: torch.ones(1)}
        ),
    )
    assert strange in message(str(folder))


def test_truncated_weights(timm_folder):
    weights = timm_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert f"could not load {timm_folder}" in message(str(timm_folder))


def test_nan_weights_name_the_parameter(timm_folder):
    rewrite_weights(timm_folder, lambda weights: weights["blocks.1.mlp.fc2.weight"].fill_(torch.nan))
    assert "blocks.1.mlp.fc2.weight holds NaN" in message(str(timm_folder))


def test_size_that_cuts_patches():
    said = message("timm:vit_tiny_patch16_224", size=225, random_weights=True)
    assert "225x225 is not a multiple of the patch of 16x16 pixels; use 224x224 or 240x240" in said


def test_device_and_dtype_that_do_not_exist(timm_folder):
    assert "device 'cuda:99' is not available" in message(str(timm_folder), device="cuda:99")
    assert "there is no dtype 'float7'. Did you mean float32?" in message(str(timm_folder), dtype="float7")


def test_no_vision_transformer_by_name():
    assert "found no stack of transformer blocks in ResNet" in message("timm:resnet18", random_weights=True)


def test_config_of_another_kind(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    assert str(tmp_path) in message(str(tmp_path))


def test_a_library_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "open_clip", None)
    with pytest.raises(vitreg.MissingExtraError, match=r"pip install 'vitreg\[open_clip\]'"):
        load("open_clip:ViT-B-32/openai")
