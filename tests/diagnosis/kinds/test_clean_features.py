"""Kinds that are no high norms: none in random models of every architecture, and what real ones have."""

import pytest
import torch
from catalog import CATALOG, images
from phantoms import crops

import vitreg
from vitreg.diagnosis.kinds.base import Finding

KINDS = ("position pattern", "locality", "token content")


def kinds(vit: vitreg.Backbone, photos: vitreg.data.images.Images | list[torch.Tensor]) -> dict[str, Finding]:
    found = {finding.kind: finding for finding in vitreg.diagnose(vit, photos, examples=0).kinds}
    return {kind: found[kind] for kind in KINDS}


@pytest.mark.parametrize("name", CATALOG)
def test_random_models_have_none(name):
    vit = CATALOG[name].backbone(1)
    for batch in (crops(vit, 32, 1), images(vit, 24, 1)):
        for finding in kinds(vit, [batch]).values():
            assert not finding.present, str(finding)
            assert str(finding)


def of_real(shared, name: str, blocks: int | None = None) -> dict[str, Finding]:
    vit = vitreg.load(str(shared / "models" / name))
    if blocks:
        vit.model.blocks = vit.model.blocks[:blocks]
        vit = vitreg.wrap(vit.model, vit.preprocess, image_size=vit.image_size)
    return kinds(vit, vitreg.read_images(shared / "data/imagenet-sample-1000", vit, limit=32))


def test_deit_ti_repeats_its_soft_outliers(shared):
    found = of_real(shared, "deit_tiny_patch16_224")
    assert [found[kind].present for kind in KINDS] == [False, False, True]
    assert found["position pattern"].share == pytest.approx(0.02, abs=0.01)
    assert found["token content"].fixed == pytest.approx(0.055, abs=0.02)
    assert found["token content"].proxies <= 0.005
    assert 0.65 < found["locality"].collapsed < 0.85


def test_vit_ti_repeats_its_corners(shared):
    found = of_real(shared, "vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    assert [found[kind].present for kind in KINDS] == [True, False, True]
    assert found["position pattern"].share == pytest.approx(0.89, abs=0.03)
    assert found["position pattern"].effective_rank == pytest.approx(1, abs=0.05)
    assert found["token content"].fixed == pytest.approx(0.02, abs=0.008)
    bound = torch.tensor(found["position pattern"].positions)
    assert bound[[0, 0, -1, -1], [0, -1, 0, -1]].min() > 0.9 > bound[1:-1].max()


@pytest.mark.parametrize(
    ("name", "blocks"), [("deit_tiny_patch16_224", 6), ("vit_tiny_patch16_224.augreg_in21k_ft_in1k", 5)]
)
def test_real_models_before_their_artifacts_have_none(shared, name, blocks):
    found = of_real(shared, name, blocks)
    assert not any(finding.present for finding in found.values())
    assert found["token content"].fixed == 0
