"""What a LLaVA's text attends to in the image, against transformers' own eager attention."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from catalog import randomise
from PIL import Image
from ranked import differences, of_each

import vitreg
from vitreg.distributed import ALONE, Ranks
from vitreg.errors import ModelLoadError, UnsupportedModelError
from vitreg.evals.vlm import Vlm, VlmConfig, evaluate, image_attention, load
from vitreg.phantoms.phantom import Phantom, plant

pytestmark = pytest.mark.slow

transformers = pytest.importorskip("transformers")

WORDS = ["<image>", "<pad>", "USER", "ASSISTANT", "describe", "count", "this", "image"]
IMAGE = WORDS.index("<image>")
VISION = {"image_size": 48, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 4,
          "num_attention_heads": 4, "intermediate_size": 128}  # fmt: skip
TEXT = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 32, "pad_token_id": 1}  # fmt: skip


def config(**changes: object) -> "transformers.LlavaConfig":
    return transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        **changes,
    )


def untrained(folder: Path, **changes: object) -> Vlm:
    """From a folder that holds a configuration only, with weights that make attention far from even."""
    config(**changes).save_pretrained(folder)
    vlm = load(str(folder), random_weights=True)
    randomise(vlm.whole)
    return vlm


def checkpoint(folder: Path) -> Path:
    """Weights, a tokenizer that knows eight words, and an image processor, as transformers saves them."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(1)
    randomise(transformers.LlavaForConditionalGeneration(config())).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", extra_special_tokens={"image_token": "<image>"}
    )
    images = transformers.CLIPImageProcessor(
        size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}
    )
    transformers.LlavaProcessor(
        images, fast, patch_size=8, vision_feature_select_strategy="default", image_token="<image>",
        num_additional_image_tokens=1,
        chat_template="USER {% for x in messages[0]['content'] %}{% if x['type'] == 'image' %}<image> "
        "{% else %}{{ x['text'] }} {% endif %}{% endfor %}ASSISTANT",
    ).save_pretrained(folder)  # fmt: skip
    return folder


def photos(folder: Path, count: int = 5) -> Path:
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(count):
        small = random.integers(0, 256, (9, 12, 3), dtype=np.uint8)
        Image.fromarray(small).resize((64, 52)).save(folder / f"{i}.png")
    return folder


def eager(vlm: Vlm, pixels: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Attention of the last token to the image's, by transformers' own step by step attention."""
    vlm.whole.set_attn_implementation("eager")
    tokens = ids.expand(len(pixels), -1)
    with torch.no_grad():
        output = vlm.whole(input_ids=tokens, pixel_values=pixels, output_attentions=True)
    vlm.whole.set_attn_implementation("sdpa")
    found = torch.stack(output.attentions).mean((0, 2))[:, -1]
    return found[:, ids == IMAGE]


def planted(vlm: Vlm, seed: int = 0) -> Phantom:
    """Artifacts of known neurons in the vision tower of the model itself."""
    generator = torch.Generator().manual_seed(seed)
    phantom = plant(vlm, torch.rand(16, 3, 48, 48, generator=generator) * 2 - 1, layer=1)
    vlm.model.load_state_dict(phantom.vit.model.state_dict())
    return phantom


def cure(phantom: Phantom) -> vitreg.TestTimeRegisters:
    return vitreg.TestTimeRegisters({phantom.layer: phantom.neurons})


def pixels(count: int = 3, seed: int = 5) -> torch.Tensor:
    return torch.rand(count, 3, 48, 48, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("strategy", ["default", "full"])
def test_attention_is_that_of_transformers(tmp_path: Path, strategy: str) -> None:
    vlm = untrained(tmp_path / "m", vision_feature_select_strategy=strategy)
    ids = vlm.prompt("ignored")
    assert int((ids == IMAGE).sum()) == 36 + (strategy == "full")
    found = image_attention(vlm, pixels(), ids)
    assert found.shape == (3, 36)
    torch.testing.assert_close(found, eager(vlm, pixels(), ids)[:, -36:])
    assert found.std() > 1e-4


def test_the_towers_own_attention_is_not_counted(tmp_path: Path) -> None:
    """Also where a prompt happens to be as long as the tower's sequence."""
    vlm = untrained(tmp_path / "m")
    ids = vlm.prompt("")[: vlm.layout.tokens]
    assert len(ids) == 37
    torch.testing.assert_close(image_attention(vlm, pixels(), ids), eager(vlm, pixels(), ids))


def test_a_fix_changes_what_text_attends_to_and_no_shape(tmp_path: Path) -> None:
    vlm = untrained(tmp_path / "m")
    phantom, ids = planted(vlm), vlm.prompt("")
    before = vlm.answer(pixels(), ids).logits
    attention = image_attention(vlm, pixels(), ids)
    with cure(phantom).applied_to(vlm):
        after = vlm.answer(pixels(), ids).logits
        torch.testing.assert_close(image_attention(vlm, pixels(), ids), eager(vlm, pixels(), ids))
        assert not torch.allclose(image_attention(vlm, pixels(), ids), attention, rtol=0.01)
    assert after.shape == before.shape == (3, 44, 32)
    assert not torch.allclose(after, before, rtol=0.01)
    assert torch.equal(vlm.answer(pixels(), ids).logits, before)


def test_the_metrics_follow_the_same_patches_under_a_fix(tmp_path: Path) -> None:
    vlm, data = untrained(tmp_path / "m"), photos(tmp_path / "photos", 12)
    phantom = planted(vlm)
    settings = VlmConfig(batch_size=4, workers=0)
    before = evaluate(vlm, data, settings)
    images = torch.stack([vlm.preprocess(Image.open(path)) for path in sorted(data.iterdir())])  # type: ignore[misc]
    marked = phantom.marked(images).flatten(1)
    assert marked.any()

    ids = vlm.prompt(settings.prompt)

    def checked(result: vitreg.evals.Result) -> dict[str, float]:
        rows = eager(vlm, images, ids)
        shares = rows / rows.sum(1, keepdim=True)
        values = {name: metric.value for name, metric in result.metrics.items()}
        assert values == pytest.approx(
            {
                "attention to image tokens": float(rows.sum(1).mean()),
                "of it on former outliers": float((shares * marked).sum(1).mean()),
                "entropy over image tokens, nats": float(-(shares * shares.log()).sum(1).mean()),
            },
            rel=1e-4,
        )
        return values

    one = checked(before)
    with cure(phantom).applied_to(vlm):
        other = checked(evaluate(vlm, data, settings))
    assert one != pytest.approx(other, rel=1e-2)
    assert any(f"{float(marked.float().mean()):.2%} of the image tokens" in note for note in before.notes)
    assert any("made up" in note for note in before.notes)


def test_several_processes_share_the_photos(tmp_path: Path) -> None:
    vlm, data = untrained(tmp_path / "m"), photos(tmp_path / "photos", 12)
    planted(vlm)
    (data / "3b.png").write_text("no picture")
    answered = []

    def run(ranks: Ranks) -> Any:
        mine = copy.deepcopy(vlm)
        mine.whole.register_forward_hook(lambda *_: answered.append(ranks.rank))
        return evaluate(mine, data, VlmConfig(batch_size=2, workers=0, ranks=ranks)).to_json()

    whole = run(ALONE)
    assert "of it on former outliers" in whole["metrics"]
    answered.clear()
    for found in of_each(3, run):
        assert differences(found, whole) == []
    assert sorted(answered) == [0, 0, 0, 1, 1, 2, 2]


def test_a_tower_without_artifacts_has_no_former_outliers(tmp_path: Path) -> None:
    vlm, data = untrained(tmp_path / "m"), photos(tmp_path / "photos")
    (data / "broken.png").write_text("no picture")
    result = evaluate(vlm, data, VlmConfig(workers=0))
    assert result.n == 5
    assert "of it on former outliers" not in result.metrics
    assert any("no artifacts" in note for note in result.notes)
    assert any(note.startswith("1 photos could not be read") for note in result.notes)


def test_limit_spreads_over_the_photos(tmp_path: Path) -> None:
    vlm, data = untrained(tmp_path / "m"), photos(tmp_path / "photos")
    result = evaluate(vlm, data, VlmConfig(workers=0, limit=2))
    full = evaluate(vlm, data, VlmConfig(workers=0))
    name = "attention to image tokens"
    assert result.metrics[name].samples == pytest.approx(full.metrics[name].samples[[0, 2]])


def test_a_checkpoint_brings_its_tokenizer(tmp_path: Path) -> None:
    vlm = load(str(checkpoint(tmp_path / "m")))
    ids = vlm.prompt("describe this image").tolist()
    assert [WORDS[i] for i in ids if i != IMAGE] == ["USER", "describe", "this", "image", "ASSISTANT"]
    assert ids[1:37] == [IMAGE] * 36
    data = photos(tmp_path / "photos")
    one = evaluate(vlm, data, VlmConfig(workers=0, prompt="describe this image"))
    other = evaluate(vlm, data, VlmConfig(workers=0, prompt="count"))
    assert not any("made up" in note for note in one.notes)
    name = "attention to image tokens"
    assert one.metrics[name].value != pytest.approx(other.metrics[name].value, rel=1e-4)


def test_a_fix_found_on_the_tower_fits_the_whole(tmp_path: Path) -> None:
    """`vitreg fix` loads the tower alone; its fix is for the same weights."""
    folder = str(checkpoint(tmp_path / "m"))
    tower = vitreg.load(folder)
    neurons = vitreg.RegisterNeurons.of({1: [3]})
    saved = vitreg.TestTimeRegisters(neurons).save(tmp_path / "fix", vit=tower)
    vlm = load(folder)
    with vitreg.load_fix(saved).applied_to(vlm):
        assert evaluate(vlm, photos(tmp_path / "photos"), VlmConfig(workers=0)).fix == (
            "registers (1 neurons, 1 register tokens)"
        )


def test_a_copy_of_the_tower_is_no_vlm(tmp_path: Path) -> None:
    """The whole would still run the first tower."""
    vlm = untrained(tmp_path / "m")
    copied = vlm.with_model(copy.deepcopy(vlm.model), "copy")
    assert type(copied) is vitreg.Backbone
    assert copied.name == "copy"


def test_what_is_no_vlm_is_refused(tmp_path: Path) -> None:
    data = photos(tmp_path / "photos")
    tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION))
    with pytest.raises(UnsupportedModelError, match="has no text model"):
        evaluate(vitreg.wrap(tower), data)
    config().save_pretrained(tmp_path / "m")
    with pytest.raises(ModelLoadError, match="leave out --size"):
        load(str(tmp_path / "m"), random_weights=True, size=96)
    with pytest.raises(ModelLoadError, match="could not load hf:nobody/llava"):
        load("hf:nobody/llava")
    checkpoint(tmp_path / "c")
    for path in (tmp_path / "c").glob("token*"):
        path.unlink()
    with pytest.raises(ModelLoadError, match="could not load"):
        load(str(tmp_path / "c"))


def test_step_by_step_attention_is_read_as_well(tmp_path: Path) -> None:
    vlm = untrained(tmp_path / "m")
    fused = image_attention(vlm, pixels(), vlm.prompt(""))
    vlm.whole.model.language_model.set_attn_implementation("eager")
    torch.testing.assert_close(image_attention(vlm, pixels(), vlm.prompt("")), fused, atol=1e-5, rtol=0)
