"""Zero-shot classification against open_clip's own pipeline, with a small CLIP of random weights."""

import json
import re
import sys
from functools import cache

import numpy as np
import open_clip
import PIL.Image
import pytest
import torch

import vitreg
from vitreg.cli.main import main
from vitreg.config.settings import with_settings
from vitreg.data.imagenet import wordnet_classes
from vitreg.errors import DataError, MissingExtraError, ModelLoadError, UnsupportedModelError
from vitreg.evals import find_task, zero_shot
from vitreg.evals.zero_shot import ZeroShotConfig, class_embeddings, evaluate, load
from vitreg.fixes import TestTimeRegisters

pytestmark = pytest.mark.slow

NAME = "open_clip:vitreg-tiny"
WORDNET = list(wordnet_classes(1000))
SMALL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 32, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


def register(folder, name: str = "vitreg-tiny", **changes) -> None:
    """Add a small architecture to those that open_clip knows."""
    path = folder / f"{name}.json"
    path.write_text(
        json.dumps(
            {
                key: value | changes.get(key, {}) if isinstance(value, dict) else value
                for key, value in SMALL.items()
            }
        )
    )
    open_clip.add_model_config(path)


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> zero_shot.TextBackbone:
    register(tmp_path_factory.mktemp("architectures"))
    return load(NAME, random_weights=True)


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> ZeroShotConfig:
    """Few templates, and a cache: 7000 texts take a while."""
    return ZeroShotConfig(templates="simple", workers=0, cache=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    random, folder = np.random.default_rng(0), tmp_path_factory.mktemp("pictures")
    for i in range(6):
        pixels = random.integers(0, 256, (4 + i, 4, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).resize((48, 40)).save(folder / f"{i}.png")
    return sorted(folder.iterdir())


@cache
def sentences(vit) -> torch.Tensor:
    tokenizer = open_clip.get_tokenizer("vitreg-tiny")
    return open_clip.build_zero_shot_classifier(
        vit.clip, tokenizer, open_clip.IMAGENET_CLASSNAMES, open_clip.SIMPLE_IMAGENET_TEMPLATES
    )


def ranked(vit, pictures) -> torch.Tensor:
    """Classes of each picture by open_clip's own pipeline, the best first (n, 1000)."""
    classifier = sentences(vit)
    transform = open_clip.image_transform(vit.clip.visual.image_size, is_train=False)
    pixels = torch.stack([transform(PIL.Image.open(path)) for path in pictures])
    with torch.no_grad():
        images = vit.clip.encode_image(pixels, normalize=True)
    return (vit.clip.logit_scale.exp() * images @ classifier).argsort(descending=True)


def named(pictures, classes, folder):
    """The same photos, each named as one of a class."""
    for path, label in zip(pictures, classes, strict=True):
        place = folder / WORDNET[int(label)]
        place.mkdir(parents=True, exist_ok=True)
        (place / path.name).write_bytes(path.read_bytes())
    return folder


def figures(result) -> list[float]:
    return [metric.value for metric in result.metrics.values()]


# -- what it measures --------------------------------------------------------------------------------


def test_photos_get_the_classes_of_open_clips_own_pipeline(vit, pictures, tmp_path, quick):
    ranks = ranked(vit, pictures)
    assert len(ranks[:, 0].unique()) > 1
    for place, expected in ((0, [1, 1]), (1, [0, 1]), (4, [0, 1]), (5, [0, 0])):
        result = evaluate(vit, named(pictures, ranks[:, place], tmp_path / str(place)), quick)
        assert figures(result) == expected
        assert result.n == 6
    mixed = torch.where(torch.arange(6) < 2, ranks[:, 0], ranks[:, 2])
    result = evaluate(vit, named(pictures, mixed, tmp_path / "mixed"), quick)
    assert figures(result) == pytest.approx([2 / 6, 1])


def test_a_fix_on_the_vision_tower_has_its_say(vit, pictures, tmp_path, quick):
    fix = TestTimeRegisters({0: list(range(40)), 1: list(range(40))})
    with fix.applied_to(vit):
        fixed = ranked(vit, pictures)
    assert not torch.equal(fixed[:, 0], ranked(vit, pictures)[:, 0])
    folder = named(pictures, fixed[:, 0], tmp_path / "named")
    with fix.applied_to(vit):
        after = evaluate(vit, folder, quick)
    assert figures(after) == [1, 1]
    assert after.fix == "registers (80 neurons, 1 register tokens)"
    assert figures(evaluate(vit, folder, quick))[0] < 1


def test_class_names_stand_in_the_order_of_wordnet_ids(vit):
    names = dict(zip(WORDNET, open_clip.IMAGENET_CLASSNAMES, strict=True))
    assert names["n01440764"] == "tench"
    assert names["n02979186"] == "cassette player"
    assert names["n03888257"] == "parachute"


def test_templates_may_be_chosen(vit, quick):
    config = with_settings(quick, {"templates": "openai"})
    assert len(zero_shot.TEMPLATES["openai"]) == 80
    assert len(zero_shot.TEMPLATES["simple"]) == 7
    with pytest.raises(DataError, match="templates=many"):
        with_settings(config, {"templates": "many"})


def test_text_embeddings_are_cached_by_weights_and_sentences(vit, tmp_path, monkeypatch):
    cached = ZeroShotConfig(templates="simple", cache=tmp_path)
    first = class_embeddings(vit, cached)
    assert first.shape == (16, 1000)
    assert torch.allclose(first.norm(dim=0), torch.ones(1000))
    built = []
    monkeypatch.setattr(
        open_clip, "build_zero_shot_classifier", lambda *a, **k: built.append(1) or torch.zeros(16, 1000)
    )
    assert torch.equal(class_embeddings(vit, cached), first)
    assert not built
    class_embeddings(vit, ZeroShotConfig(cache=tmp_path))
    assert len(built) == 1
    weight = vit.clip.token_embedding.weight
    with torch.no_grad():
        weight[0, 0] += 1
    try:
        class_embeddings(vit, cached)
    finally:
        with torch.no_grad():
            weight[0, 0] -= 1
    assert len(built) == 2


def test_coca_too(tmp_path, pictures, quick):
    """Its vision tower returns its tokens beside the embedding."""
    config = {
        "embed_dim": 16,
        "vision_cfg": SMALL["vision_cfg"]
        | {"attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True},
        "text_cfg": SMALL["text_cfg"] | {"embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
        "custom_text": True,
    }  # fmt: skip
    (tmp_path / "coca_vitreg.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "coca_vitreg.json")
    coca = load("open_clip:coca_vitreg", random_weights=True)
    folder = named(pictures, ranked(coca, pictures)[:, 0], tmp_path / "photos")
    assert figures(evaluate(coca, folder, quick)) == [1, 1]


# -- from the command --------------------------------------------------------------------------------


def test_from_the_command_line(vit, pictures, tmp_path, monkeypatch, capsys):
    ranks = ranked(vit, pictures)
    folder = named(pictures, [*ranks[:3, 0], *ranks[3:, 9]], tmp_path / "photos" / "val")
    with TestTimeRegisters({0: [1, 2, 3]}).applied_to(vit) as handle:
        handle.fix.save(tmp_path / "fix", vit=vit)
    arguments = ["eval", "zero-shot", NAME, folder.parent, "--random-weights", "--fix", tmp_path / "fix",
                 "--compare", "--set", "templates=simple", "--no-cache", "--json", tmp_path / "r.json",
                 "--workers", 0, "--device", "cpu"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["vitreg", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    out = capsys.readouterr().out
    assert not ended.value.code
    assert "zero-shot of open_clip:vitreg-tiny" in out
    assert re.search(r"  top-1 +50.0+%", out)
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["without"]["metrics"]["top-5"]["value"] == 0.5
    assert found["with"]["fix"] == "registers (3 neurons, 1 register tokens)"


def test_from_the_command_line_only_with_a_text_tower(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["vitreg", "eval", "zero-shot", "timm:vit_tiny_patch16_224", str(tmp_path)]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert "vit_tiny_patch16_224 has no text tower: expected open_clip:ARCH/TAG." in capsys.readouterr().err


# -- loading -----------------------------------------------------------------------------------------


def test_the_vision_tower_is_the_one_that_vitreg_loads(vit):
    alone = vitreg.load(NAME, random_weights=True)
    assert vit.clip.visual is vit.model
    assert vit.image_size == alone.image_size == (32, 32)
    state = alone.model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in vit.model.state_dict().items())


def test_size_and_dtype_reach_both_towers(vit, pictures, tmp_path, quick):
    other = load(NAME, size=48, random_weights=True, dtype="bfloat16")
    assert other.layout.grid == (6, 6)
    assert {p.dtype for p in other.clip.parameters()} == {torch.bfloat16}
    folder = named(pictures, ranked(vit, pictures)[:, 0], tmp_path / "photos")
    assert evaluate(other, folder, quick).n == 6


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf:openai/clip-vit-base-patch32", "has no text tower: expected open_clip:ARCH/TAG"),
        ("open_clip:", "has no text tower"),
        ("open_clip:ViT-B-99", "no architecture 'ViT-B-99'. Did you mean open_clip:ViT-B-"),
        ("open_clip:ViT-B-32/none", "needs one of these tags after a slash"),
    ],
)
def test_other_names_are_refused(name, message):
    with pytest.raises(ModelLoadError, match=message):
        load(name)


def test_a_tokenizer_that_cannot_be_had(tmp_path):
    register(tmp_path, "vitreg-foreign", text_cfg={"hf_tokenizer_name": "nobody/nothing"})
    with pytest.raises(ModelLoadError, match="could not load open_clip:vitreg-foreign"):
        load("open_clip:vitreg-foreign", random_weights=True)


def test_a_model_without_its_text_tower(pictures, tmp_path):
    alone = vitreg.load("timm:test_vit", random_weights=True)
    with pytest.raises(UnsupportedModelError, match=r"without a text tower\. Load it with"):
        evaluate(alone, named(pictures, range(6), tmp_path / "photos"))


def test_photos_without_a_class(vit, pictures, quick):
    with pytest.raises(DataError, match="6 of 6 photos have no class of this 1000-way head"):
        evaluate(vit, pictures[0].parent, quick)


def test_without_open_clip(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    monkeypatch.delitem(sys.modules, "vitreg.evals.zero_shot")
    with pytest.raises(MissingExtraError, match=r"pip install 'vitreg\[open_clip\]'"):
        _ = find_task("zero-shot").module
