"""Position-bound patterns: measured without bias, found where planted, and nowhere else."""

from typing import Any

import pytest
import torch
from catalog import CATALOG, images
from phantoms import crops
from ranked import copied, differences, of_each
from tiers import seeds

import vitreg
from vitreg.data.images import read_images
from vitreg.diagnosis.kinds.position_pattern import PositionPattern, components
from vitreg.phantoms.changed_patches import patches_after
from vitreg.phantoms.position_pattern import plant_position_pattern

PLANTED = [
    "timm vit",
    "timm dinov3",
    "timm beit",
    "timm siglip",
    "hf dinov2 registers",
    "torchvision vit",
]


def found(vit: vitreg.Backbone, photos: Any) -> PositionPattern:
    (finding,) = [
        x
        for x in vitreg.diagnose(vit, [photos] if isinstance(photos, torch.Tensor) else photos).kinds
        if isinstance(x, PositionPattern)
    ]
    return finding


@pytest.mark.parametrize("seed", seeds(3))
@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_pattern_is_found_with_its_share_and_rank(name, seed):
    vit = CATALOG[name].backbone(seed)
    photos, last, rank = crops(vit, 32, seed), vit.anatomy.depth - 1, 1 + seed
    clean = found(vit, photos)
    assert not clean.present
    phantom = plant_position_pattern(vit, photos, last, share=0.7, rank=rank, seed=seed)
    planted = found(phantom.vit, photos)
    assert planted.present
    assert planted.layer == last
    assert 0.7 <= planted.share <= 0.7 + 0.5 * clean.share + 0.01
    assert planted.effective_rank == pytest.approx(rank, rel=0.25)
    assert planted.shares[-1] == planted.share > planted.shares[-2]
    bound = torch.tensor(planted.positions).flatten().double()
    strength = phantom.pattern.square().sum(1).double()
    assert torch.corrcoef(torch.stack([bound, strength / (strength + strength.mean() * 3 / 7)]))[0, 1] > 0.8
    assert "Project it out" in str(planted)


def test_the_shares_are_those_of_the_textbook():
    """Balanced two-way analysis of variance, from explicit cell residuals."""
    vit = CATALOG["timm vit"].backbone()
    photos = crops(vit, 12, 0)
    x = patches_after(vit, photos, 2).double()
    n, p = x.shape[:2]
    rows, columns, whole = x.mean(1, keepdim=True), x.mean(0, keepdim=True), x.mean((0, 1))
    rest = (x - rows - columns + whole).square().sum() / ((n - 1) * (p - 1))
    position = ((columns - whole).square().sum() * n / (p - 1) - rest) / n
    photo = ((rows - whole).square().sum() * p / (n - 1) - rest) / p
    finding = found(vit, photos)
    assert finding.share == pytest.approx(float(position / (position + photo + rest)), rel=1e-4)
    assert finding.photo_share == pytest.approx(float(photo / (position + photo + rest)), rel=1e-4)


@pytest.mark.parametrize("photos", [2, 3, 10])
def test_few_photos_show_no_pattern_where_there_is_none(photos):
    generator = torch.Generator().manual_seed(photos)
    shares = []
    for _ in range(40):
        x = torch.randn(photos, 20, 8, generator=generator) + torch.randn(photos, 1, 8, generator=generator)
        parts = components(
            x.mean(0).double(), float(x.square().sum()), float(x.mean(1).square().sum()), photos
        )
        shares.append(parts.position / parts.total)
    naive = 1 / photos / 2  # half of the variance is no photo's, and a mean over photos keeps so much of it
    assert sum(shares) / len(shares) < 0.15 * naive
    assert max(shares) < 0.6 * naive


def test_batches_and_processes_do_not_matter(tmp_path):
    from phantoms import save_crops

    vit, folder = CATALOG["timm dinov3"].backbone(), save_crops(tmp_path / "photos", 14)
    one = found(vit, read_images(folder, vit)).to_json()
    for found_by in of_each(
        2, lambda ranks: found(copied(vit), read_images(folder, vit, batch_size=3, ranks=ranks)).to_json()
    ):
        assert differences(found_by, one, 1e-5) == []


@pytest.mark.parametrize("shade", ["blank", "one colour each"])
def test_images_without_content_cannot_tell(shade):
    vit = CATALOG["timm vit"].backbone()
    shades = torch.zeros(16, 3, 1, 1) if shade == "blank" else torch.rand(16, 3, 1, 1)
    finding = found(vit, shades.expand(16, 3, *vit.image_size).clone())
    assert not finding.present
    assert finding.share is None
    assert "too much alike" in str(finding)


def test_one_image_cannot_tell():
    vit = CATALOG["timm vit"].backbone()
    assert found(vit, images(vit, 1)).share is None


def test_wrong_requests():
    vit = CATALOG["timm vit"].backbone()
    photos = images(vit, 4)
    for wrong in ({"layer": 9}, {"layer": 1, "share": 1.0}, {"layer": 1, "rank": 0}):
        with pytest.raises(ValueError, match="expected"):
            plant_position_pattern(vit, photos, **wrong)
