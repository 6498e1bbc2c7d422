"""Composite models: their tower is found with its own size, and gets one picture of each photo."""

import json
import re
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
import transformers
from checkpoints import message, rewrite_weights
from composites import COMPOSITES, IMAGE_TOKEN, TEXT, VISION, llava
from safetensors.torch import save_file

import vitreg
from vitreg.errors import ModelWarning
from vitreg.models.loading import load
from vitreg.models.preprocessing import HfPreprocess, hf_preprocess

PHOTOS = (
    PIL.Image.linear_gradient("L").convert("RGB").resize((90, 60)),
    PIL.Image.new("RGB", (60, 130), "white"),
)


def said(folder: Path, **options: Any) -> tuple[vitreg.Backbone, list[str]]:
    """A loaded model, and what was said about it."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", ModelWarning)
        vit = load(str(folder), **options)
    return vit, [str(w.message) for w in seen if w.category is ModelWarning]


@pytest.fixture(scope="session")
def composite(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a composite model, made once."""

    def folder(name: str) -> Path:
        path = tmp_path_factory.getbasetemp() / f"composite-{name}"
        if not path.exists():
            COMPOSITES[name].save(path)
        return path

    return folder


# A ViT-Pose is built for one size, and a DPT's neck for squares.
ASKED = {"vitpose": [None], "depth-anything": [None, (42, 56)], "dpt": [None, 56]}


@pytest.mark.parametrize(
    ("name", "asked"), [(name, asked) for name in COMPOSITES for asked in ASKED.get(name, [None, (32, 48)])]
)
def test_the_tower_gets_one_picture_of_its_size(composite: Any, name: str, asked: Any):
    entry = COMPOSITES[name]
    vit, notes = said(composite(name), size=asked)
    size = (asked, asked) if isinstance(asked, int) else asked or entry.size
    assert vit.image_size == size
    assert {tuple(vit.preprocess(photo).shape) for photo in PHOTOS} == {(3, *size)}
    assert [f"{entry.view} {size[0]}x{size[1]}." in note for note in notes] == ([True] if entry.view else [])
    found = vitreg.diagnose(vit, vitreg.read_images(list(PHOTOS), vit))
    patch = 14 if entry.size == (70, 70) else 16
    assert found.grid == (size[0] // patch, size[1] // patch)


PROCESSORS = {
    "mean and std": lambda: transformers.DPTImageProcessor(
        keep_aspect_ratio=True, image_mean=[0.1, 0.2, 0.3]
    ),
    "no normalisation": lambda: transformers.DPTImageProcessor(keep_aspect_ratio=True, do_normalize=False),
    "other scale": lambda: transformers.DPTImageProcessor(keep_aspect_ratio=True, rescale_factor=1 / 127.5),
    "unscaled": lambda: transformers.DPTImageProcessor(
        keep_aspect_ratio=True, do_rescale=False, image_mean=[100.0] * 3, image_std=[50.0] * 3
    ),
    "tiles": lambda: COMPOSITES["smolvlm"].processor(),
    "its own patches": lambda: transformers.PixtralImageProcessor(),
}


@pytest.mark.parametrize("make", PROCESSORS.values(), ids=PROCESSORS)
def test_a_view_is_normalised_as_the_processor_does(make: Any):
    processor = make()
    view, note = hf_preprocess(processor, None, (64, 64))
    assert "one view is read" in note
    for level in (0, 100, 255):
        photo = PIL.Image.new("RGB", (512, 512), (level,) * 3)
        theirs = HfPreprocess(processor, {})(photo).movedim(-3, 0).flatten(1).median(1).values
        torch.testing.assert_close(view(photo).mean((1, 2)), theirs, atol=1e-4, rtol=1e-4)


def test_pictures_that_are_patches_in_a_row_are_not_taken_for_photos():
    processor = transformers.MiniCPMV4_6ImageProcessor()
    assert HfPreprocess(processor, {})(PHOTOS[0]).shape[1] == 14
    view, note = hf_preprocess(processor, None, (64, 64))
    assert view(PHOTOS[0]).shape == (3, 64, 64)
    assert "gives no picture of one size" in note


def test_a_small_photo_is_no_proof_that_a_processor_does_not_tile():
    processor = transformers.Llama4ImageProcessor(size={"height": 64, "width": 64})
    assert "cuts a photo into several pictures" in hf_preprocess(processor, None, (64, 64))[1]


def test_transformers_wrapper_of_a_timm_model(tmp_path: Path):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    config = transformers.TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=sizes)
    transformers.TimmWrapperModel(config).save_pretrained(tmp_path)
    assert load(str(tmp_path)).layout.grid == (4, 4)


def test_encoders_that_cannot_be_run_are_named(tmp_path: Path):
    config = transformers.FuyuConfig(**TEXT, image_size=60, patch_size=30)
    transformers.FuyuForCausalLM(config).save_pretrained(tmp_path)
    assert "takes text, and has no part that takes pixel_values alone" in message(str(tmp_path))


# -- the composite's own output ------------------------------------------------------------------------


def test_a_fix_on_the_tower_reaches_the_composites_own_output():
    """It is what the composite makes of the fixed tower's tokens, in its forward and in generate."""
    whole = llava().eval()
    vit = vitreg.wrap(whole.model.vision_tower)
    images = torch.rand(1, 3, 64, 64)
    ids = torch.tensor([[1, *[IMAGE_TOKEN] * 16, 2, 3]])
    inputs = {"input_ids": ids, "pixel_values": images, "attention_mask": torch.ones_like(ids)}
    fix = vitreg.TestTimeRegisters(vitreg.RegisterNeurons.of({0: [1, 2], 1: [3]}))
    with torch.no_grad():
        plain = whole(**inputs).logits
        with fix.applied_to(vit):
            fixed = whole(**inputs).logits
            tokens = vit.model(images, output_hidden_states=True)
            answer = whole.generate(**inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
        hook = whole.model.vision_tower.register_forward_hook(lambda module, args, output: tokens)
        expected = whole(**inputs).logits
        hook.remove()
        assert torch.equal(whole(**inputs).logits, plain)
    torch.testing.assert_close(fixed, expected)
    assert (fixed - plain).abs().max() > 1e-4
    assert answer.sequences.shape == (1, ids.shape[1] + 2)


# -- keys that do not matter, and keys that do ----------------------------------------------------------


def vit_classifier(folder: Path) -> None:
    transformers.ViTForImageClassification(transformers.ViTConfig(**VISION)).save_pretrained(folder)


def clip_vision(folder: Path) -> None:
    transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION)).save_pretrained(folder)


def dinov2(folder: Path) -> None:
    config = {k: v for k, v in VISION.items() if k != "intermediate_size"}
    transformers.Dinov2Model(transformers.Dinov2Config(**config, mlp_ratio=2)).save_pretrained(folder)


def depth(folder: Path) -> None:
    COMPOSITES["depth-anything"].model().save_pretrained(folder)  # type: ignore[operator]


def named(value: Any) -> str:
    """A name of a case that is the same in every process."""
    return getattr(value, "__name__", str(value))


HARMLESS = [
    (vit_classifier, "classifier.weight", "lacks"),
    (vit_classifier, "pooler.dense.weight", "has"),
    (vit_classifier, "decoder.embed_tokens.weight", "has"),
    (dinov2, "embeddings.mask_token", "lacks"),
    (dinov2, "classifier.bias", "has"),
    (depth, "neck.fusion_stage.layers.0.residual_layer1.convolution1.weight", "lacks"),
    (depth, "head.conv9.weight", "has"),
    (clip_vision, "visual_projection.weight", "has"),
]


@pytest.mark.parametrize(("save", "key", "how"), HARMLESS, ids=named)
def test_keys_outside_of_what_is_read_are_named_in_a_note(tmp_path: Path, save: Any, key: str, how: str):
    save(tmp_path)
    change = (lambda w: w.pop(key)) if how == "lacks" else (lambda w: w.update({key: torch.ones(3)}))
    rewrite_weights(tmp_path, change)
    _, notes = said(tmp_path)
    assert re.search(rf"the checkpoint {how} 1 key \({re.escape(key)}\)", notes[0])
    assert len(notes) == 1


NEEDED = [
    (vit_classifier, r"layer\.1\..*weight", "lacks"),
    (vit_classifier, r"position_embeddings", "lacks"),
    (vit_classifier, r"vit\.layernorm\.weight|vit\.norm\.weight", "lacks"),
    (dinov2, r"cls_token", "lacks"),
    (dinov2, r"patch_embeddings\.projection\.bias", "lacks"),
    (depth, r"backbone.*layer\.2\..*bias", "lacks"),
    (clip_vision, r"pre_layrnorm\.weight", "lacks"),
    (clip_vision, r"layers\.0\..*bias", "lacks"),
]


@pytest.mark.parametrize(("save", "pattern", "how"), NEEDED, ids=named)
def test_a_key_of_what_is_read_is_an_error_when_it_is_missing(
    tmp_path: Path, save: Any, pattern: str, how: str
):
    save(tmp_path)

    def drop(weights: dict[str, Any]) -> None:
        del weights[next(key for key in sorted(weights) if re.search(pattern, key))]

    rewrite_weights(tmp_path, drop)
    text = message(
        str(tmp_path)
    )  # with transformers' own name of the key, which may be another than the file's
    assert "does not fit" in text
    assert "1 missing key (" in text


@pytest.mark.parametrize(
    ("save", "pattern", "extra"),
    [
        (vit_classifier, r"(.*layer)\.1\.", "2.strange.weight"),
        (vit_classifier, r"(.*layer\.0)\.", "ls1.gamma"),
        (dinov2, r"(embeddings)\.", "register_tokens"),
        (clip_vision, r"(.*layers)\.1\.", "2.mlp.fc1.weight"),
    ],
    ids=named,
)
def test_a_key_too_many_where_it_matters_is_an_error(tmp_path: Path, save: Any, pattern: str, extra: str):
    save(tmp_path)

    def add(weights: dict[str, Any]) -> None:
        found = next(filter(None, (re.match(pattern, key) for key in sorted(weights))))
        weights[f"{found[1]}.{extra}"] = torch.ones(32)

    rewrite_weights(tmp_path, add)
    text = message(str(tmp_path))
    assert "1 unexpected key" in text
    assert extra in text


# -- code that comes with a checkpoint ------------------------------------------------------------------

CODE = """
from transformers import PreTrainedModel, ViTConfig, ViTModel


class OwnConfig(ViTConfig):
    model_type = "vitreg-own"


class OwnModel(ViTModel):
    config_class = OwnConfig
"""


def test_code_of_a_checkpoint_is_run_only_where_it_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "own"
    folder.mkdir()
    weights = transformers.ViTModel(transformers.ViTConfig(**VISION)).state_dict()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "own.py").write_text(CODE)
    config = transformers.ViTConfig(**VISION).to_dict() | {
        "model_type": "vitreg-own",
        "architectures": ["OwnModel"],
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    text = message(str(folder))
    assert "comes with Python code of its own" in text
    assert "--trust-remote-code" in text
    vit = load(str(folder), trust_remote_code=True)
    assert type(vit.model).__name__ == "OwnModel"
    assert vit.layout.grid == (4, 4)
    shutil.rmtree(tmp_path / "modules")
