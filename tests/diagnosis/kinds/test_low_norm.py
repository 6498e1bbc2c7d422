"""Low-norm outliers: exactly those that were planted, and no tails or dim photos."""

import pytest
import torch
from catalog import CATALOG
from scenes import finding, scenes
from tiers import seeds

from vitreg.diagnosis.bins import LogBins
from vitreg.diagnosis.kinds import Context
from vitreg.diagnosis.kinds.low_norm import LowNorm, LowNormFinding
from vitreg.phantoms.low_norm import plant_low_norms

KIND = "low-norm outliers"
PLANTED = [
    "timm vit",
    "timm dinov2 registers",
    "timm dinov3",
    "timm siglip",
    "hf dinov2",
    "hf clip",
    "torchvision vit",
]


@pytest.mark.parametrize("seed", seeds(3))
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


def measured(norms: torch.Tensor) -> LowNormFinding:
    """What is found where patches (b, p) have these norms after each block."""
    vit = CATALOG["timm vit"].backbone()
    meter = LowNorm(vit, vit.layout)
    tokens = torch.cat([torch.ones(len(norms), vit.layout.patch_slice.start), norms], 1)
    for layer in range(vit.anatomy.depth):
        meter.block(layer, torch.zeros(*tokens.shape, vit.anatomy.width), tokens)
    return meter.finding(Context(len(norms), (None,) * vit.anatomy.depth))


def one_place(norm: float, photos: int = 48) -> torch.Tensor:
    """Norms of 1, and of `norm` at row 2, column 3 of the first so many of 48 photos."""
    norms = torch.ones(48, 20)
    norms[:photos, 13] = norm
    return norms


TAILS = {
    "lognormal": lambda: torch.exp(0.8 * torch.randn(48, 20)),
    "Pareto": lambda: torch.rand(48, 20) ** 0.5,
    "Student": lambda: torch.distributions.StudentT(torch.tensor(3.0)).sample((48, 20)).abs(),
    "dim photos": lambda: torch.where(torch.arange(48) % 8 == 0, 0.1, 1.0)[:, None].expand(48, 20),
    "a little lower": lambda: one_place(0.6),
    "a handful": lambda: one_place(0.1, photos=7),
    "flat halves": lambda: torch.where(torch.arange(20) < 9, 0.1, 1.0).expand(48, 20),
}


@pytest.mark.parametrize("name", TAILS)
def test_tails_and_dim_photos_are_no_population(name):
    for _ in range(20):
        found = measured(TAILS[name]())
        assert not found.present, found


def test_a_fixed_place_of_low_norm():
    found = measured(one_place(0.4))
    assert (found.present, found.per_image) == (True, 1.0)
    assert torch.tensor(found.positions).nonzero().tolist() == [[2, 3]]
    assert found.ratio == pytest.approx(0.4, rel=0.05)
    assert found.gap == pytest.approx(2.5, rel=0.1)


def test_bins_below_an_edge_are_those_before_it():
    bins = LogBins(-3, 2)
    for number, edge in enumerate(bins.edges.tolist()):
        for same in (edge, edge * (1 + 1e-6), edge * (1 - 1e-6)):
            assert int(bins.below(same).sum()) == number
    assert bins.below(None).all()
    assert bins.index(bins.edges[:-1] * 1.02).tolist() == [*range(bins.count)]
