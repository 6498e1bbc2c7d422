"""Fixed patterns and global proxies: each found where planted, told apart, and found nowhere else."""

from typing import Any

import pytest
import torch
from catalog import CATALOG, images
from phantoms import crops, save_crops
from ranked import copied, differences, of_each
from tiers import seeds

import vitreg
from vitreg.data.images import read_images
from vitreg.diagnosis.kinds import strip_test
from vitreg.diagnosis.kinds.token_content import TokenContent, fixed_and_proxies
from vitreg.diagnosis.kinds.token_sample import Sampled, TokenSample
from vitreg.errors import ImageError
from vitreg.phantoms.changed_patches import patches_after
from vitreg.phantoms.token_content import plant_token_content

PLANTED = [
    "timm vit",
    "timm deit3",
    "timm siglip",
    "timm relpos cls",
    "hf ijepa",
    "hf clip",
]


def found(vit: vitreg.Backbone, photos: Any) -> TokenContent:
    (finding,) = [
        x
        for x in vitreg.diagnose(vit, [photos] if isinstance(photos, torch.Tensor) else photos).kinds
        if isinstance(x, TokenContent)
    ]
    return finding


@pytest.mark.parametrize("seed", seeds(3))
@pytest.mark.parametrize("name", PLANTED)
def test_each_kind_is_found_and_told_from_the_other(name, seed):
    vit = CATALOG[name].backbone(seed)
    photos, last = crops(vit, 40, seed), vit.anatomy.depth - 1
    assert not found(vit, photos).present
    of = {
        says: plant_token_content(vit, photos, last, says=says, rate=0.2, seed=seed).vit
        for says in ("the same", "the photo")
    }
    same, photo = (found(planted, photos) for planted in of.values())
    assert same.present
    assert photo.present
    assert same.fixed == pytest.approx(0.2, abs=0.02)
    assert 0.08 <= photo.proxies <= 0.2  # some have no far companion that shows something else
    assert same.proxies <= 0.01 >= photo.fixed
    assert "in every photo" in str(same)
    assert "far patches of their photo" in str(photo)
    same_strip, photo_strip = (strip_test(planted, photos[:16]) for planted in of.values())
    assert same_strip.fixed.float().mean() > max(0.04, 1.2 * same_strip.proxies.float().mean())
    assert photo_strip.proxies.float().mean() > max(0.04, 1.2 * photo_strip.fixed.float().mean())


@pytest.mark.parametrize("name", PLANTED)
def test_the_strip_test_clears_what_was_not_planted(name):
    vit = CATALOG[name].backbone()
    tested = strip_test(vit, crops(vit, 16, 0))
    assert tested.fixed.shape == (16, vit.layout.grid[0] // 2, vit.layout.grid[1])
    assert float(tested.fixed.float().mean()) + float(tested.proxies.float().mean()) <= 0.02


def test_positions_are_those_of_the_planted_patches():
    vit = CATALOG["timm vit"].backbone()
    photos = crops(vit, 32, 0)
    phantom = plant_token_content(vit, photos, 2, says="the same", rate=0.2)
    places = phantom.marked(photos).double().mean(0)
    assert torch.tensor(found(phantom.vit, photos).positions).double() == pytest.approx(
        places.numpy(), abs=0.1
    )
    x, clean = (patches_after(v, photos, 2) for v in (phantom.vit, vit))
    changed = (x - clean).abs().sum(-1) > 0
    assert torch.equal(vit.layout.as_grid(changed), phantom.marked(photos))


@pytest.mark.parametrize("says", ["the same", "the photo"])
def test_batches_order_and_processes_do_not_matter(says, tmp_path):
    vit, folder = CATALOG["timm deit3"].backbone(), save_crops(tmp_path / "photos", 36)
    photos = torch.cat([batch.pixels for batch in read_images(folder, vit)])
    vit = plant_token_content(vit, photos, 2, says=says, rate=0.2).vit
    one = found(vit, photos).to_json()
    assert one["photos"] <= 32
    assert differences(found(vit, photos.flip(0).split(5)).to_json(), one) == []
    for shared in of_each(
        2, lambda ranks: found(copied(vit), read_images(folder, vit, batch_size=3, ranks=ranks)).to_json()
    ):
        assert differences(shared, one) == []


def test_the_sample_is_of_fixed_size_and_the_same_for_any_order():
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(50, 30, 6, generator=generator)
    embedded = torch.randn(50, 30, 4, generator=generator)
    forth, back = (TokenSample((5, 6), photos=8, tokens=10) for _ in range(2))
    for order, sample in ((torch.arange(50), forth), (torch.arange(50).flip(0), back)):
        for some in order.split(7):
            sample.add(patches[some], patches[some].norm(dim=-1), embedded[some])
    assert forth.sampled is not None
    assert back.sampled is not None
    for name, value in vars(forth.sampled).items():
        assert len(value) == 8
        torch.testing.assert_close(value, getattr(back.sampled, name))
    assert forth.sampled.cells.shape == (8, 10)
    assert all(len(cells.unique()) == 10 for cells in forth.sampled.cells)
    drawn = TokenSample((5, 6), photos=50, tokens=10)
    drawn.add(patches, patches.norm(dim=-1), embedded)
    assert drawn.sampled is not None
    assert torch.bincount(drawn.sampled.cells.flatten(), minlength=30).min() > 0  # every place has its turn


def test_few_photos_cannot_tell():
    vit = CATALOG["timm vit"].backbone()
    finding = found(vit, crops(vit, 5, 0))
    assert not finding.present
    assert finding.fixed is None
    assert "too few" in str(finding)


@pytest.mark.parametrize(
    "images_", [torch.zeros(24, 3, 32, 40), torch.rand(24, 3, 1, 1).expand(24, 3, 32, 40)]
)
def test_blank_images_are_no_pattern(images_):
    assert found(CATALOG["timm vit"].backbone(), images_.clone()).fixed is None


def test_wrong_requests():
    vit = CATALOG["timm vit"].backbone()
    photos = images(vit, 4)
    for wrong in ({"layer": 9}, {"layer": 1, "rate": 0.01}, {"layer": 1, "rate": 0.9}):
        with pytest.raises(ValueError, match="expected"):
            plant_token_content(vit, photos, says="the same", **wrong)
    with pytest.raises(ImageError, match="at least 2 photos"):
        strip_test(vit, photos[:1])


def sample_of_noise(photos: int = 12, tokens: int = 20) -> Sampled:
    """Tokens that say nothing in common; those of column 3 show something else in each photo."""
    features, contents = torch.randn(2, photos, tokens, 256)
    contents[:, 3, :photos] = 100 * (torch.eye(photos) - 1 / photos)
    cells = torch.arange(tokens).expand(photos, tokens)
    return Sampled(
        torch.rand(photos), cells, features, contents, torch.zeros(photos, tokens, dtype=torch.bool)
    )


def test_what_is_alike_is_fixed_only_if_it_shows_something_else():
    sampled, said = sample_of_noise(), 3 * torch.randn(256)
    assert not fixed_and_proxies(sampled, 20)[0].any()
    sampled.features[:, 3] = said
    fixed, _ = fixed_and_proxies(sampled, 20)
    assert fixed[:, 3].all()
    assert int(fixed.sum()) == 12
    sampled.contents[:, 3] = said  # the same thing in every photo
    assert not fixed_and_proxies(sampled, 20)[0].any()


def test_what_few_photos_say_is_not_fixed():
    sampled = sample_of_noise()
    sampled.features[:4, 3] = 3 * torch.randn(256)
    assert not fixed_and_proxies(sampled, 20)[0].any()  # 3 of 11 others; 4 would be enough
    assert fixed_and_proxies(sampled, 200)[0][:4, 3].all()  # a quarter is enough of a small sample


def test_proxies_are_neither_fixed_nor_alike_to_others_by_chance():
    sampled = sample_of_noise()
    sampled.alone[:, 3] = True
    assert fixed_and_proxies(sampled, 20)[1][:, 3].sum() == 12
    sampled.features[:4, 3] = 3 * torch.randn(256)  # too few to be fixed, too many for a proxy
    proxies = fixed_and_proxies(sampled, 20)[1]
    assert proxies[4:, 3].all()
    assert not proxies[:4].any()


@pytest.mark.parametrize(("place", "alone"), [((4, 4), True), ((1, 1), False), ((0, 1), False)])
def test_an_echo_counts_from_afar_only(place, alone):
    patches, shown = torch.randn(3, 36, 256), torch.randn(3, 36, 256)
    patches[:, place[0] * 6 + place[1]] = patches[:, 0]
    shown[:, place[0] * 6 + place[1]] = -shown[:, 0]
    sample = TokenSample((6, 6), photos=3, tokens=36)
    sample.add(patches, patches.norm(dim=-1), shown)
    assert sample.sampled is not None
    assert sample.sampled.alone[sample.sampled.cells == 0].tolist() == [alone] * 3
    assert int(sample.sampled.alone.sum()) == 6 * alone


def test_what_patches_beside_say_too_is_no_proxy():
    patches, shown = torch.randn(1, 36, 256), torch.randn(1, 36, 256)
    beside = [1, 6, 7, 8, 13]  # (0, 1), (1, 0) and (1, 2): those around (1, 1), and itself
    patches[:, beside], shown[:, 28] = patches[:, 28:29].clone(), -shown[:, 7]
    sample = TokenSample((6, 6), photos=1, tokens=36)
    sample.add(patches, patches.norm(dim=-1), shown)
    assert sample.sampled is not None
    assert not sample.sampled.alone[sample.sampled.cells == 7].any()
    assert sample.sampled.alone[sample.sampled.cells == 28].all()
