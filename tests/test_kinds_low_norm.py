"""Low-norm outliers: exactly those that were planted, and no tails or dim photos."""

import pytest
import torch
from catalog import CATALOG
from scenes import finding, scenes
from test_phantom import crops

import vitreg
from vitreg.phantoms.low_norm import plant_low_norms

KIND = "low-norm outliers"
PLANTED = [
    "timm vit",
    "timm deit3",
    "timm dinov2 registers",
    "timm dinov3",
    "timm siglip",
    "hf dinov2",
    "hf clip",
    "torchvision vit",
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", PLANTED)
def test_planted_low_norms_are_found_where_they_are(name, seed):
    vit = CATALOG[name].backbone(seed)
    photos = scenes(vit, 48, seed)
    assert not finding(vit, photos, KIND).present
    phantom = plant_low_norms(vit, photos, seed, rate=0.04, seed=seed)
    found = finding(phantom.vit, photos, KIND)
    assert (found.present, found.layer) == (True, seed)
    assert found.fraction == pytest.approx(phantom.rate, rel=0.05)
    truth = phantom.marked(photos).double().mean(0)
    assert float((torch.tensor(found.positions) - truth).abs().sum()) <= 0.05 * float(truth.sum())
    assert found.per_image == pytest.approx(found.fraction * vit.layout.patches)
    assert 0.5 * phantom.norm < found.ratio < 2 * phantom.norm
    assert found.ratio < found.threshold < 1
    assert f"have norms {found.ratio:.2f} times the others' after block {seed}" in str(found)


def scaled(vit: vitreg.Backbone, factors) -> vitreg.Backbone:
    """The model with its patches multiplied by factors(b, p) after block 0."""

    def scale(module, args, x):
        x, patches = x.clone(), vit.layout.patch_slice
        x[:, patches] *= factors(len(x), vit.layout.patches)[..., None]
        return x

    vit.model.blocks[0].register_forward_hook(scale)
    return vit


def lone(photos: int, patches: int) -> torch.Tensor:
    factors = torch.ones(photos, patches)
    factors[:7, 3] = 0.1
    return factors


TAILS = {
    "lognormal": lambda b, p: torch.exp(0.8 * torch.randn(b, p)),
    "Pareto": lambda b, p: torch.rand(b, p) ** 0.5,
    "Student": lambda b, p: torch.distributions.StudentT(torch.tensor(3.0)).sample((b, p)).abs(),
    "dim photos": lambda b, p: torch.where(torch.arange(b) % 4 == 0, 0.1, 1.0)[:, None].expand(b, p),
    "a little lower": lambda b, p: torch.where(torch.arange(p) == 3, 0.7, 1.0).expand(b, p),
    "a handful": lone,
}


@pytest.mark.parametrize("name", TAILS)
def test_tails_and_dim_photos_are_no_population(name):
    vit = scaled(CATALOG["timm vit"].backbone(), TAILS[name])
    assert not finding(vit, crops(vit, 96, 0), KIND).present


def test_a_fixed_place_of_low_norm():
    vit = scaled(
        CATALOG["timm vit"].backbone(), lambda b, p: torch.where(torch.arange(p) == 13, 0.1, 1.0).expand(b, p)
    )
    found = finding(vit, crops(vit, 32, 0), KIND)
    assert (found.present, found.layer, found.per_image) == (True, 0, 1.0)
    assert torch.tensor(found.positions).nonzero().tolist() == [[2, 3]]
