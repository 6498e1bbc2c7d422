"""Massive dimensions: those that were planted, their share and the cosines with and without them."""

import pytest
import torch
import torch.nn.functional as F
from catalog import CATALOG
from phantoms import crops
from scenes import finding, scenes
from tiers import seeds

import vitreg
from vitreg.phantoms.massive_dimensions import plant_massive_dimensions

KIND = "massive dimensions"
PLANTED = [
    "timm vit",
    "timm dinov2 registers",
    "timm eva02",
    "timm siglip",
    "hf dinov2 swiglu",
    "hf clip",
    "open_clip vit layer scale",
    "torchvision vit",
]


@pytest.mark.parametrize("seed", seeds(3))
@pytest.mark.parametrize("name", PLANTED)
def test_planted_dimensions_are_named(name, seed):
    vit = CATALOG[name].backbone(seed)
    photos = crops(vit, 32, seed)
    assert not finding(vit, photos, KIND).present
    phantom = plant_massive_dimensions(vit, photos, seed, dimensions=1 + seed, seed=seed)
    found = finding(phantom.vit, photos, KIND)
    assert (found.present, found.layer) == (True, seed)
    assert sorted(found.dimensions) == list(phantom.dimensions)
    assert found.share == pytest.approx(phantom.share, abs=0.02)
    assert found.sizes == sorted(found.sizes, reverse=True)
    assert all(f"{dimension}" in str(found) for dimension in phantom.dimensions)


@pytest.mark.parametrize("seed", seeds(3))
def test_cosines_are_those_between_patches_of_one_photo(seed):
    vit = CATALOG["timm vit"].backbone(seed)
    photos = scenes(vit, 8, seed)
    phantom = plant_massive_dimensions(vit, photos, 1, share=0.9, seed=seed)
    found = finding(phantom.vit, photos, KIND)
    with torch.no_grad(), vitreg.trace(phantom.vit, residuals=True, layers=[found.layer]) as t:
        phantom.vit(photos)
    patches = t.residuals[0][:, t.layout.patch_slice]
    assert found.cosine == pytest.approx(mean_cosine(patches), abs=1e-4)
    patches[..., found.dimensions] = 0
    assert found.cosine_without == pytest.approx(mean_cosine(patches), abs=0.02)
    assert found.cosine > found.cosine_without + 0.05


def mean_cosine(patches: torch.Tensor) -> float:
    """Of all pairs of different patches in one photo."""
    unit = F.normalize(patches, dim=-1)
    cosines = unit @ unit.transpose(1, 2)
    count = cosines.shape[-1]
    return float((cosines.sum((1, 2)) - count).mean()) / (count * (count - 1))


def written(vit: vitreg.Backbone, patches: slice | list[int], dimensions: list[int]) -> vitreg.Backbone:
    """The model with large values in some dimensions of some patches, after block 1."""

    def write(module, args, x):
        x = x.clone()
        start = vit.layout.patch_slice.start
        rows = torch.arange(start, x.shape[1])[patches]
        x[:, rows[:, None], torch.tensor(dimensions)] += 100.0
        return x

    vit.model.blocks[1].register_forward_hook(write)
    return vit


@pytest.mark.parametrize(
    ("patches", "dimensions", "present"),
    [
        (slice(None), [3], True),
        (slice(None), [3, 7, 9, 12, 20, 21, 22, 23], True),
        (slice(None), [3, 7, 9, 12, 20, 21, 22, 23, 24], False),  # no few
        ([5], [3], False),  # one outlier in 20 patches
        (slice(0, 14), [3], False),  # most tokens, not every one
    ],
)
def test_few_dimensions_of_every_token_are_massive_and_nothing_else(patches, dimensions, present):
    vit = written(CATALOG["timm vit"].backbone(), patches, dimensions)
    found = finding(vit, crops(vit, 16, 0), KIND)
    assert found.present == present
    if present:
        assert sorted(found.dimensions) == dimensions


def test_the_largest_is_named_where_none_is_massive():
    vit = CATALOG["timm vit"].backbone()
    found = finding(vit, crops(vit, 16, 0), KIND)
    assert len(found.dimensions) == len(found.sizes) == 1
    assert f"The largest, {found.dimensions[0]}, is" in str(found)


def test_what_cannot_be_planted_is_refused():
    vit = CATALOG["hf aimv2"].backbone()
    with pytest.raises(vitreg.UnsupportedModelError, match="ends without a bias"):
        plant_massive_dimensions(vit, crops(vit, 8, 0), 1)
    vit = CATALOG["timm vit"].backbone()
    vit.model.blocks[1].register_forward_hook(lambda module, args, x: x.clamp(-1, 1))
    with pytest.raises(vitreg.UnsupportedModelError, match="normalises what its MLP writes"):
        plant_massive_dimensions(vit, crops(vit, 8, 0), 1)
