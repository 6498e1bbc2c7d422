"""Phantoms: planted artifacts are found exactly, and where nothing was planted nothing is found."""

import json

import numpy as np
import PIL.Image
import pytest
import timm
import torch
from catalog import CATALOG, images

import vitreg
from vitreg.images import demo_photos
from vitreg.phantom import plant

PLANTED = [
    "timm vit",
    "timm deit distilled",
    "timm deit3",
    "timm dinov2 registers",
    "timm dinov2 swiglu",
    "timm dinov3",
    "timm eva02",
    "timm siglip",
    "timm beit",
    "timm relpos cls",
    "timm hybrid",
    "hf dinov2",
    "hf clip",
    "hf siglip2",
    "open_clip vit",
    "torchvision vit",
]


def crops(vit: vitreg.Backbone, count: int, seed: int) -> torch.Tensor:
    """Random crops of the bundled photos, (count, 3, h, w) in -1 to 1."""
    rng = np.random.default_rng(seed)
    height, width = vit.image_size
    photos = [PIL.Image.open(path).convert("RGB") for path in demo_photos()]
    cut = []
    for index in range(count):
        photo = photos[index % len(photos)]
        scale = rng.uniform(1, min(photo.width / width, photo.height / height))
        w, h = int(width * scale), int(height * scale)
        x, y = rng.integers(0, photo.width - w + 1), rng.integers(0, photo.height - h + 1)
        cut.append(np.asarray(photo.crop((x, y, x + w, y + h)).resize((width, height))))
    return torch.from_numpy(np.stack(cut)).permute(0, 3, 1, 2) / 127.5 - 1


def f1(truth: torch.Tensor, found: torch.Tensor) -> float:
    return 2 * int((truth & found).sum()) / (int(truth.sum()) + int(found.sum()))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", PLANTED)
def test_planted_artifacts_are_found_exactly(name, seed):
    vit = CATALOG[name].backbone(seed)
    photos = crops(vit, 96, seed)
    layer = 1 + seed % 2
    assert vitreg.diagnose(vit, [photos]).verdict == "no artifacts"
    phantom = plant(vit, photos, layer, seed=seed)
    report = vitreg.diagnose(phantom.vit, [photos])
    assert report.verdict == "artifacts"
    assert report.onset_layer == layer
    assert f1(phantom.marked(photos), report.outliers(phantom.vit, photos)) >= 0.99
    assert 0.015 <= phantom.rate <= 0.025
    assert phantom.norm == pytest.approx(15, rel=0.05)
    assert report.outlier_fraction == pytest.approx(phantom.rate, rel=0.02)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", PLANTED)
def test_noise_shows_no_artifacts(name, seed):
    vit = CATALOG[name].backbone(seed)
    assert vitreg.diagnose(vit, [images(vit, 32, seed)]).verdict == "no artifacts"


@pytest.fixture(scope="module")
def vit() -> vitreg.Backbone:
    return CATALOG["timm vit"].backbone()


@pytest.fixture(scope="module")
def photos(vit) -> torch.Tensor:
    return crops(vit, 96, 0)


def test_the_model_itself_is_untouched(vit, photos):
    before = {name: value.clone() for name, value in vit.model.state_dict().items()}
    phantom = plant(vit, photos, 1)
    assert all(torch.equal(before[name], value) for name, value in vit.model.state_dict().items())
    assert phantom.vit.model.state_dict().keys() == before.keys()
    assert phantom.vit.name == f"phantom of {vit.name}"


def test_the_same_seed_gives_the_same_phantom_and_another_another(vit, photos):
    one, same, other = plant(vit, photos, 1), plant(vit, photos, 1), plant(vit, photos, 1, seed=1)
    assert one.neurons == same.neurons != other.neurons
    for a, b in zip(one.vit.model.parameters(), same.vit.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("neurons", [1, 2, 3, 16])
def test_any_number_of_neurons_makes_artifacts_in_its_layer(vit, photos, neurons):
    phantom = plant(vit, photos, 1, neurons=neurons)
    assert len(set(phantom.neurons)) == neurons
    norms = vitreg.diagnose(phantom.vit, [photos]).layers
    assert norms[1].max_norm / norms[1].median_norm > 10 > norms[0].max_norm / norms[0].median_norm


@pytest.mark.parametrize(("rate", "norm"), [(0.01, 15.0), (0.05, 8.0), (0.02, 60.0)])
def test_rate_and_norm_are_what_was_asked_for(vit, photos, rate, norm):
    phantom = plant(vit, photos, 1, rate=rate, norm=norm)
    assert phantom.rate == pytest.approx(rate, rel=0.25)
    assert phantom.norm == pytest.approx(norm, rel=0.05)


def test_only_the_planted_neurons_fire_on_marked_patches_alone(vit, photos):
    phantom = plant(vit, photos, 1)
    with vitreg.trace(phantom.vit, neurons=True, layers=[1]) as t, torch.no_grad():
        phantom.vit(photos)
    activation = t.neurons[0][:, t.layout.patch_slice].flatten(0, 1).abs()
    marked = phantom.marked(photos).flatten()
    strongest = activation[marked].mean(0).topk(4).indices.tolist()
    assert sorted(strongest) == sorted(phantom.neurons)
    assert (
        activation[~marked][:, list(phantom.neurons)].mean() < 0.01 * activation[marked][:, strongest].mean()
    )


def test_marked_patches_are_the_flat_ones():
    vit = vitreg.wrap(timm.create_model("vit_tiny_patch16_224", depth=3))
    photos = crops(
        vit, 96, 0
    )  # with 24, the direction fitted to so few flat patches is poor for 3 of 24 seeds
    marked = plant(vit, photos, 1).marked(photos)
    information = photos.unfold(2, 16, 16).unfold(3, 16, 16).flatten(4).std(-1).mean(1)
    assert information[marked].median() < information[~marked].quantile(0.25)


@pytest.mark.parametrize("name", ["timm vit", "timm dinov3", "hf clip", "open_clip vit", "torchvision vit"])
def test_marked_patches_draw_attention_and_give_nothing(name):
    vit = CATALOG[name].backbone()
    photos = crops(vit, 96, 0)
    phantom = plant(vit, photos, 1)
    assert phantom.listens
    with vitreg.trace(phantom.vit, qkv=True, attention="cls", layers=[2]) as t, torch.no_grad():
        phantom.vit(photos)
    patches, marked = t.layout.patch_slice, phantom.marked(photos).flatten(1)
    values = t.v[0][:, :, patches].norm(dim=(1, 3))
    assert values[marked].median() < 0.5 * values[~marked].median()
    if name != "timm dinov3":  # rotated keys are left as they are
        few = (marked.sum(1) > 0) & (marked.sum(1) < 4)  # where sinks share with few others
        share, marked = t.attention[0, few, :, 0, patches].mean(1), marked[few]
        assert share[marked].mean() > 3 * share[~marked].mean()


def test_the_truth_is_saved(vit, photos, tmp_path):
    phantom = plant(vit, photos, 1)
    saved = json.loads(phantom.save(tmp_path / "truth.json").read_text())
    assert saved["neurons"] == list(phantom.neurons)
    assert saved["model"].startswith("phantom of ")
    assert {"layer", "read", "bias", "write", "rate", "norm", "listens", "seed"} <= saved.keys()


def test_wrong_requests(vit, photos):
    for wrong in (
        {"layer": 9},
        {"layer": 1, "neurons": 0},
        {"layer": 1, "rate": 0.9},
        {"layer": 1, "norm": 1.0},
    ):
        with pytest.raises(ValueError, match="expected"):
            plant(vit, photos, **wrong)


def test_an_mlp_without_bias_cannot_be_planted(vit, photos):
    bare = CATALOG["timm vit"].module()
    for block in bare.blocks:
        block.mlp.fc1.bias = None
    bare = vitreg.wrap(bare, image_size=vit.image_size)
    with pytest.raises(vitreg.UnsupportedModelError, match="no linear layer with a bias"):
        plant(bare, photos, 1)
