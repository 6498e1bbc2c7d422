"""The origin of outliers: each planted cause is named, triggers and what is removed elsewhere are not."""

import json
import threading
from dataclasses import replace

import pytest
import torch
from catalog import CATALOG, images
from phantoms import crops
from tiers import seeds
from torch import nn

import vitreg
from vitreg.fixes import TestTimeRegisters
from vitreg.phantoms import (
    OriginPhantom,
    origins,
    plant_attention_outliers,
    plant_patch_outliers,
    plant_position_outliers,
)
from vitreg.search.origin import Candidate, Origin, _as_many_others, find_origin
from vitreg.tracing.removal import Where, without_attention, without_mlps

pytestmark = pytest.mark.slow

# With nn.MultiheadAttention: open_clip vit, torchvision vit. With a norm before block 0, so that only blocks
# can be planted: hf clip, open_clip vit. Positions are resampled in hf siglip2, added in place in naflexvit.
BLOCKS = ["timm deit3", "timm dinov3 swiglu", "timm beit", "hf clip", "open_clip vit", "torchvision vit"]
STEMS = [
    "timm dinov2 registers",
    "timm siglip",
    "timm naflexvit",
    "hf siglip2",
    "open_clip timm tower",
    "torchvision vit",
]
POSITIONS = [(0, 0), (2, 3)]
NO_TABLE = ["timm dinov3", "timm relpos", "timm beit", "hf dinov3"]
NORMALISED = ["timm clip", "hf clip", "open_clip vit"]


def found(vit: vitreg.Backbone, photos: torch.Tensor) -> Origin:
    return find_origin(vit, [photos], vitreg.diagnose(vit, [photos]))


def named(origin: Origin, kind: str, *layers: int) -> bool:
    """Whether the origin is this one, all outliers are gone without it, and hardly any with the control."""
    return (origin.kind, origin.layers) == (kind, layers) and origin.removed > 0.95 and origin.control < 0.1


@pytest.mark.parametrize("seed", seeds(3))
@pytest.mark.parametrize("name", STEMS)
def test_a_planted_position_embedding_is_named(name, seed):
    vit = CATALOG[name].backbone(seed)
    phantom = plant_position_outliers(vit, POSITIONS, seed=seed)
    origin = found(phantom.vit, crops(vit, 32, seed))
    assert named(origin, "position embedding")
    assert origin.positions == phantom.positions
    assert set(POSITIONS) <= set(phantom.positions)
    assert origin.adds > 0.8


@pytest.mark.parametrize("seed", seeds(3))
@pytest.mark.parametrize("name", STEMS)
def test_a_planted_patch_embedding_is_named(name, seed):
    vit = CATALOG[name].backbone(seed)
    photos = crops(vit, 32, seed)
    phantom = plant_patch_outliers(vit, photos, seed=seed)
    origin = found(phantom.vit, photos)
    assert named(origin, "patch embedding")
    assert origin.positions == ()
    assert origin.adds > 0.8


@pytest.mark.parametrize("seed", seeds(3))
@pytest.mark.parametrize("name", BLOCKS)
def test_a_planted_attention_output_is_named(name, seed):
    vit = CATALOG[name].backbone(seed)
    photos = crops(vit, 32, seed)
    phantom = plant_attention_outliers(vit, photos, seed, seed=seed)
    origin = found(phantom.vit, photos)
    assert named(origin, "attention output", seed)
    assert origin.adds > 0.8


@pytest.mark.parametrize("seed", seeds(3))
@pytest.mark.parametrize("name", BLOCKS)
def test_planted_neurons_are_named(name, seed):
    vit = CATALOG[name].backbone(seed)
    photos = crops(vit, 32, seed)
    origin = found(vitreg.plant(vit, photos, seed, seed=seed).vit, photos)
    assert named(origin, "neurons", seed)
    assert origin.adds > 0.8


@pytest.fixture(scope="module")
def vit() -> vitreg.Backbone:
    return CATALOG["timm vit"].backbone()


@pytest.fixture(scope="module")
def photos(vit) -> torch.Tensor:
    return crops(vit, 96, 0)


@pytest.fixture(scope="module")
def phantom(vit, photos) -> vitreg.Phantom:
    return vitreg.plant(vit, photos, 1)


@pytest.fixture(scope="module")
def diagnosis(phantom, photos) -> vitreg.Diagnosis:
    return vitreg.diagnose(phantom.vit, [photos])


# -- what is not an origin ---------------------------------------------------------------------------


def test_triggers_are_tried_and_not_blamed(vit, photos):
    """Without the content and the position that it marks, attention writes nothing; and yet it writes."""
    phantom = plant_attention_outliers(vit, photos, 2)
    origin = found(phantom.vit, photos)
    position, content, *_ = origin.candidates
    assert (position.kind, content.kind) == ("position embedding", "patch embedding")
    assert max(position.left, content.left) < 0.2
    assert max(abs(position.adds), abs(content.adds)) < 0.05
    assert named(origin, "attention output", 2)


def test_a_mark_at_one_place_in_every_photo_is_content(vit, photos):
    """Positions are what is added to the patch embedding, not what photos have in common."""
    marked = photos.clone()
    marked[:, :, 8:16, 8:16] = 40.0
    origin = found(vit, marked)
    assert named(origin, "patch embedding")
    assert abs(origin.candidates[0].adds) < 0.1


def test_what_no_candidate_makes_is_unknown(vit, photos, monkeypatch):
    """A massive vector that is put between two blocks."""
    monkeypatch.setattr(origins, "_attention_module", lambda vit, layer: f"blocks.{layer}")
    phantom = plant_attention_outliers(vit, photos, 0)
    blocks = phantom.vit.model.blocks
    blocks[0]._forward_hooks.clear()
    blocks[1].register_forward_pre_hook(lambda block, args: (phantom.writer(block, args, args[0]),))
    origin = found(phantom.vit, photos)
    assert (origin.kind, origin.layers, origin.removed) == ("unknown", (), 0)
    assert max(candidate.explains for candidate in origin.candidates) == 0
    assert max(candidate.adds for candidate in origin.candidates) > 0.9  # what no MLP adds, by attention
    assert str(origin).startswith("nothing that can be named makes them: no part of the model")


def test_of_two_that_explain_them_the_one_that_adds_most_is_named(phantom, photos, diagnosis, monkeypatch):
    both = [Candidate("neurons", (1,), adds, left, 1.0) for adds, left in ((0.3, 0.0), (0.7, 0.1))]
    monkeypatch.setattr("vitreg.search.origin._tried", lambda passes: both)
    assert find_origin(phantom.vit, [photos], diagnosis).adds == 0.7


def test_two_causes_of_half_of_them_each_are_not_one(vit, photos):
    both = vitreg.plant(plant_position_outliers(vit, [(2, 3)]).vit, photos, 0, rate=0.05).vit
    origin = found(both, photos)
    assert origin.kind == "unknown"
    halves = [c for c in origin.candidates if 0.4 < c.explains < 0.6]
    assert {half.kind for half in halves} == {"position embedding", "neurons"}
    assert all(f"{half.name}, {half.explains:.0%}" in str(origin) for half in halves)


def test_a_removal_that_does_the_same_elsewhere_does_not_count(phantom, photos, diagnosis, monkeypatch):
    monkeypatch.setattr("vitreg.search.origin._as_many_others", lambda mask, generator: mask)
    origin = find_origin(phantom.vit, [photos], diagnosis)
    assert origin.kind == "unknown"
    assert "without the MLP of block 1 they are gone, but they also are when" in str(origin)


def test_the_control_takes_as_many_patches_of_each_image_and_no_outlier():
    mask = torch.rand(50, 30, generator=torch.Generator().manual_seed(0)) < 0.3
    mask[0] = False
    others = _as_many_others(mask, torch.Generator().manual_seed(1))
    assert torch.equal(others.sum(1), mask.sum(1))
    assert not (others & mask).any()
    assert not torch.equal(others, _as_many_others(mask, torch.Generator().manual_seed(2)))


def test_the_shares_of_the_excess_sum_to_one(phantom, photos, diagnosis, monkeypatch):
    monkeypatch.setattr("vitreg.search.origin.TRIED", -1e9)  # every branch of every block
    single = [c for c in find_origin(phantom.vit, [photos], diagnosis).candidates if len(c.layers) <= 1]
    assert len(single) == 2 + 2 * (diagnosis.detect_layer + 1)
    assert sum(candidate.adds for candidate in single) == pytest.approx(1, abs=1e-4)


# -- the result, and what is refused -----------------------------------------------------------------


def test_it_says_what_it_found(phantom, photos, diagnosis):
    origin = find_origin(phantom.vit, [photos], diagnosis)
    assert str(origin).startswith(
        "the MLP of block 1 makes them: without what it writes at these patches 100% of the outliers are gone"
    )
    assert (origin.images, origin.outliers) == (64, int(phantom.marked(photos[:64]).sum()))
    saved = json.loads(json.dumps(origin.to_json()))
    assert (saved["kind"], saved["layers"], saved["text"]) == ("neurons", [1], str(origin))
    assert {"name": "the MLP of block 1", "kind": "neurons", "layers": [1]}.items() <= saved["candidates"][
        2
    ].items()


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        ((7,), "block 7"),
        ((5, 6, 7), "blocks 5 to 7"),
        ((5, 6), "blocks 5 and 6"),
        ((2, 4, 5), "blocks 2, 4 and 5"),
    ],
)
def test_several_blocks_in_words(layers, text):
    several = "the MLP of" if len(layers) == 1 else "the MLPs of"
    assert str(Origin("neurons", layers, (), 1.0, 1.0, 0.0, (), 1, 1)).startswith(f"{several} {text} make")


def test_positions_in_words():
    text = str(Origin("position embedding", (), ((0, 1), (3, 2)), 0.97, 1.0, 0.01, (), 1, 1))
    assert text == (
        "the position embedding makes them at (row, column) (0, 1), (3, 2): with that of neighbouring patches"
        " 97% of the outliers are gone (1% with the same change at as many ordinary patches)."
    )


def test_the_model_is_left_as_it_was(phantom, photos, diagnosis):
    model = phantom.vit.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        output = model(photos)
        find_origin(phantom.vit, [photos], diagnosis)
        assert torch.equal(model(photos), output)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_fix_on_the_model_is_looked_past(phantom, photos, diagnosis):
    plain = find_origin(phantom.vit, [photos], diagnosis)
    with TestTimeRegisters({1: phantom.neurons}).applied_to(phantom.vit):
        assert find_origin(phantom.vit, [photos], diagnosis) == plain


def test_without_artifacts_there_is_no_origin(vit, photos):
    with pytest.raises(vitreg.FixError, match="no artifacts"):
        find_origin(vit, [photos], vitreg.diagnose(vit, [photos]))


def test_images_without_outliers_are_refused(phantom, photos, diagnosis):
    clean = photos[~phantom.marked(photos).flatten(1).any(1)][:10]
    with pytest.raises(vitreg.ImageError, match="none of these 10 images has an outlier"):
        find_origin(phantom.vit, [clean], diagnosis)


# -- removal -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["timm vit", "hf clip", "open_clip vit", "torchvision vit"])
@pytest.mark.parametrize("without", [without_mlps, without_attention])
def test_only_the_chosen_patches_change_in_the_block_and_in_this_thread(name, without):
    vit = CATALOG[name].backbone()
    noise = images(vit, 3)
    at = torch.zeros(3, vit.layout.patches, dtype=torch.bool)
    at[0, 2] = at[1, :4] = True
    where = Where(at, ~at, vit.layout.patch_slice)
    plain, changed, elsewhere = after_block_0(vit, noise), None, []
    with without(vit, [0], where):
        changed = after_block_0(vit, noise)
        other = threading.Thread(target=lambda: elsewhere.append(after_block_0(vit, noise)))
        other.start()
        other.join()
    differs = (changed - plain).abs().amax(-1) > 1e-5
    assert torch.equal(differs[:, vit.layout.patch_slice], at)
    assert not differs[:, : vit.layout.patch_slice.start].any()
    assert torch.allclose(elsewhere[0], plain, atol=1e-6)
    assert torch.equal(after_block_0(vit, noise), plain)


def after_block_0(vit: vitreg.Backbone, noise: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), vitreg.trace(vit, residuals=True, layers=[0]) as t:
        vit(noise)
    return t.residuals[0]


def test_the_mean_of_ordinary_patches_takes_the_place():
    at = torch.tensor([[True, False, False, False]])
    ordinary = torch.tensor([[False, True, True, False]])
    x = torch.tensor([[9.0, 100.0, 1.0, 3.0, 50.0]])[..., None]  # a prefix token first
    assert Where(at, ordinary, slice(1, 5)).averaged(x).flatten().tolist() == [9, 2, 1, 3, 50]


# -- phantoms ----------------------------------------------------------------------------------------


def plant_any(vit: vitreg.Backbone, photos: torch.Tensor, kind: str) -> OriginPhantom:
    if kind == "attention output":
        return plant_attention_outliers(vit, photos, 1)
    if kind == "patch embedding":
        return plant_patch_outliers(vit, photos)
    return plant_position_outliers(vit, POSITIONS)


@pytest.mark.parametrize("kind", ["attention output", "patch embedding", "position embedding"])
def test_a_phantom_is_a_copy_that_says_so_and_knows_its_outliers(vit, photos, kind):
    before = {name: value.clone() for name, value in vit.model.state_dict().items()}
    phantom = plant_any(vit, photos, kind)
    assert all(torch.equal(before[name], value) for name, value in vit.model.state_dict().items())
    assert phantom.vit.model.state_dict().keys() == before.keys()
    assert phantom.vit.name == f"phantom of {vit.name}"
    assert phantom.kind == kind
    assert phantom.norm == pytest.approx(15, rel=0.02)
    report = vitreg.diagnose(phantom.vit, [photos])
    marked = phantom.marked(photos)
    assert torch.equal(report.outliers(phantom.vit, photos), marked)
    assert float(marked.float().mean()) == pytest.approx(phantom.rate)
    assert phantom.rate == pytest.approx(0.1 if kind == "position embedding" else 0.02, rel=0.15)
    assert report.onset_layer == (1 if kind == "attention output" else 0)
    assert json.loads(json.dumps(phantom.to_json()))["kind"] == kind


@pytest.mark.parametrize("kind", ["attention output", "patch embedding", "position embedding"])
def test_the_same_seed_gives_the_same_phantom(vit, photos, kind):
    one, same = plant_any(vit, photos, kind), plant_any(vit, photos, kind)
    with torch.no_grad():
        assert torch.equal(one.vit(photos[:4]), same.vit(photos[:4]))
    assert torch.equal(one.write, same.write)


@pytest.mark.parametrize("name", NO_TABLE)
def test_a_model_without_a_table_of_positions_is_refused(name):
    with pytest.raises(vitreg.UnsupportedModelError, match="adds no table of positions"):
        plant_position_outliers(CATALOG[name].backbone(), POSITIONS)


def test_what_is_added_to_every_patch_alike_is_no_table_of_positions():
    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.ones(1, 32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.shift

    model = CATALOG["timm beit"].module()
    model.pos_drop = Shift()
    with pytest.raises(vitreg.UnsupportedModelError, match="adds no table of positions"):
        plant_position_outliers(vitreg.wrap(model, image_size=(32, 40)), POSITIONS)


@pytest.mark.parametrize("name", NORMALISED)
def test_a_norm_behind_the_patch_embedding_is_refused(name):
    vit = CATALOG[name].backbone()
    with pytest.raises(vitreg.UnsupportedModelError, match="normalised before block 0"):
        plant_patch_outliers(vit, crops(vit, 16, 0))
    with pytest.raises(vitreg.UnsupportedModelError, match="normalised before block 0"):
        plant_position_outliers(vit, POSITIONS)


def test_attention_without_a_module_is_refused():
    vit = CATALOG["timm parallel attention"].backbone()
    with pytest.raises(vitreg.UnsupportedModelError, match="in no module"):
        plant_attention_outliers(vit, crops(vit, 4, 0), 1)


def test_a_patch_embedding_that_is_not_known_is_refused(vit, photos):
    unknown = replace(vit, anatomy=replace(vit.anatomy, patch_embedding=None))
    with pytest.raises(vitreg.UnsupportedModelError, match="Pass an Anatomy"):
        plant_patch_outliers(unknown, photos)


def test_wrong_requests(vit, photos):
    for positions in ([], [(4, 0)], [(0, -1)]):
        with pytest.raises(ValueError, match="expected some within 4x5"):
            plant_position_outliers(vit, positions)
    with pytest.raises(ValueError, match="expected 0 to 2"):
        plant_attention_outliers(vit, photos, 3)
    for wrong in ({"rate": 0.9}, {"norm": 1.0}):
        with pytest.raises(ValueError, match="expected a rate"):
            plant_patch_outliers(vit, photos, **wrong)


# -- real models -------------------------------------------------------------------------------------


def photos_of(shared, vit: vitreg.Backbone, count: int) -> list[torch.Tensor]:
    paths = sorted((shared / "data/imagenet-sample-1000").iterdir())[:: 1000 // count][:count]
    return [batch.pixels for batch in vitreg.read_images(paths, vit)]


def test_the_corners_of_the_real_vit_ti_are_made_by_the_mlp_of_block_7(shared):
    """The position of a corner triggers it: without that, nothing is left either."""
    vit = vitreg.load(str(shared / "models/vit_tiny_patch16_224.augreg_in21k_ft_in1k"))
    photos = torch.cat(photos_of(shared, vit, 32))
    origin = found(vit, photos)
    assert named(origin, "neurons", 7)
    assert origin.adds > 0.9
    position = origin.candidates[0]
    assert position.kind == "position embedding"
    assert position.left < 0.05
    assert position.adds < 0.05


def test_the_soft_outliers_of_the_real_deit_ti_are_made_by_several_mlps_together(shared):
    vit = vitreg.load(str(shared / "models/deit_tiny_patch16_224"))
    photos = torch.cat(photos_of(shared, vit, 32))
    origin = found(vit, photos)
    assert named(origin, "neurons", 5, 6, 7, 8, 9, 10)
    assert origin.adds > 0.7
