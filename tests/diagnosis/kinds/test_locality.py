"""Lost locality: measured as defined, found where planted, and nowhere else."""

from typing import Any

import pytest
import torch
from catalog import CATALOG, images
from phantoms import crops
from tiers import seeds

import vitreg
from vitreg.diagnosis.kinds.locality import Locality, Pairs
from vitreg.models.layout import TokenLayout
from vitreg.phantoms.changed_patches import patches_after
from vitreg.phantoms.locality import plant_lost_locality

# Random models whose photos' locality survives their blocks, so that there is something to lose.
PLANTED = [
    "timm beit",
    "timm relpos cls",
    "timm rope mixed",
    "timm naflexvit",
    "hf siglip2",
    "hf vit",
]


def found(vit: vitreg.Backbone, photos: Any) -> Locality:
    (finding,) = [
        x
        for x in vitreg.diagnose(vit, [photos] if isinstance(photos, torch.Tensor) else photos).kinds
        if isinstance(x, Locality)
    ]
    return finding


@pytest.mark.parametrize("seed", seeds(3))
@pytest.mark.parametrize("name", PLANTED)
def test_lost_locality_is_found_in_its_block(name, seed):
    vit = CATALOG[name].backbone(seed)
    photos, last = crops(vit, 96, seed), vit.anatomy.depth - 1
    clean = found(vit, photos)
    assert not clean.present
    assert clean.collapsed > 0.55
    planted = found(plant_lost_locality(vit, last, seed=seed).vit, photos)
    assert planted.present
    assert planted.kept[:-1] == pytest.approx(clean.kept[:-1], abs=1e-5)
    assert planted.kept[-1] < 0.25 * clean.kept[-1]
    assert "is left" in str(planted)


def test_the_cosines_are_those_of_neighbours_and_far_patches():
    vit = CATALOG["timm vit"].backbone()
    photos = images(vit, 3)
    x = torch.nn.functional.normalize(patches_after(vit, photos, 1), dim=-1).unflatten(1, (4, 5))
    cells = {int(n) for n in Pairs.spread((4, 5), torch.device("cpu")).cells}
    near, far = [], []
    for a in cells:
        for b in cells:
            down, across = abs(a // 5 - b // 5), abs(a % 5 - b % 5)
            cosine = (x[:, a // 5, a % 5] * x[:, b // 5, b % 5]).sum(-1).mean()
            near += [cosine] if down + across == 1 else []
            far += [cosine] if max(down, across) >= 2 else []
    finding = found(vit, photos)
    assert finding.near[1] == pytest.approx(float(torch.stack(near).mean()), abs=1e-5)
    assert finding.far[1] == pytest.approx(float(torch.stack(far).mean()), abs=1e-5)
    assert finding.locality[1] == pytest.approx(finding.near[1] - finding.far[1])
    assert finding.kept[1] == pytest.approx(finding.locality[1] / (1 - finding.far[1]))


@pytest.mark.parametrize("grid", [(1, 1), (1, 6), (5, 1), (2, 2), (4, 5), (14, 14), (37, 37)])
def test_pairs_are_beside_each_other_or_far_apart(grid):
    pairs = Pairs.spread(grid, torch.device("cpu"))
    assert len(pairs.cells) <= min(TokenLayout(1, 0, grid).patches, 48)
    place = torch.stack([pairs.cells // grid[1], pairs.cells % grid[1]]).float().T
    steps = torch.cdist(place, place, p=1)
    near, far = pairs.weights > 0
    assert (steps[near] == 1).all()
    assert (steps[far] >= max(min(grid) // 2, 2)).all()
    for weights in pairs.weights:
        assert float(weights.sum()) == pytest.approx(1) or not weights.any()


def test_few_images_and_noise_cannot_tell():
    vit = CATALOG["timm beit"].backbone()
    for batch in (crops(vit, 7, 0), images(vit, 32)):
        finding = found(plant_lost_locality(vit, 2).vit, batch)
        assert not finding.present
        assert finding.collapsed is None
        assert "too few" in str(finding)


def test_a_common_part_in_all_patches_is_no_loss():
    """Patches that come to share one large component are all alike, and still in their order."""
    from vitreg.phantoms.changed_patches import with_changed_patches

    vit = CATALOG["timm beit"].backbone()
    photos = crops(vit, 96, 0)
    alike = found(with_changed_patches(vit, 2, lambda x: x + 20, "alike"), photos)
    assert alike.far[-1] > 0.99
    assert not alike.present
    assert alike.collapsed > 0.5


def test_the_shuffle_is_the_truth():
    vit = CATALOG["hf vit"].backbone()
    photos, phantom = images(vit, 2), plant_lost_locality(vit, 1)
    torch.testing.assert_close(
        patches_after(phantom.vit, photos, 1), patches_after(vit, photos, 1)[:, phantom.order]
    )
