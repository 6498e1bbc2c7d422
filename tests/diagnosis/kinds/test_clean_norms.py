"""Sinks, low norms and massive dimensions: none where nobody planted them, and what real models have."""

from pathlib import Path

import pytest
import torch
from catalog import CATALOG, images
from phantoms import crops
from ranked import of_each
from scenes import findings

import vitreg
from vitreg.diagnosis.diagnosing import collect
from vitreg.diagnosis.kinds import Finding
from vitreg.diagnosis.kinds.low_norm import LowNorm
from vitreg.diagnosis.kinds.massive_dimensions import MassiveDimensions
from vitreg.diagnosis.kinds.sinks import Sinks

METERS = (Sinks, LowNorm, MassiveDimensions)
KINDS = ("attention sinks", "low-norm outliers", "massive dimensions")


def of_kinds(diagnosis: vitreg.Diagnosis) -> list[Finding]:
    return [finding for finding in diagnosis.kinds if finding.kind in KINDS]


@pytest.mark.parametrize("name", CATALOG)
def test_random_weights_show_none_of_them(name):
    vit = CATALOG[name].backbone(seed=3)
    for batch in (images(vit, 16, 3), crops(vit, 16, 3)):
        found = findings(vit, batch)
        for kind in KINDS:
            assert not found[kind].present, found[kind]
            assert str(found[kind])


def test_ranks_add_up_and_batches_do_not_matter():
    vit = CATALOG["timm dinov2 registers"].backbone()
    photos = crops(vit, 12, 0)
    whole, parts = collect(vit, [photos], 0).meters, photos.split(5)

    def of_one(ranks):
        mine = collect(vit, parts[ranks.rank : ranks.rank + 1], 0).meters
        for meter in mine:
            meter.all_reduce(ranks)
        return mine

    for meters in (collect(vit, parts, 0).meters, *of_each(3, of_one)):
        for meter, expected in zip(meters, whole, strict=True):
            if type(meter) in METERS:
                for name in meter.sums():
                    torch.testing.assert_close(
                        getattr(meter, name), getattr(expected, name), rtol=1e-5, atol=1e-5
                    )


def cut(folder: Path, blocks: int) -> vitreg.Backbone:
    """A real model that ends before its artifacts appear."""
    whole = vitreg.load(str(folder))
    whole.model.blocks = whole.model.blocks[:blocks]
    return vitreg.wrap(whole.model, whole.preprocess)


@pytest.mark.parametrize(
    ("name", "clean"), [("deit_tiny_patch16_224", 6), ("vit_tiny_patch16_224.augreg_in21k_ft_in1k", 5)]
)
def test_real_models(shared, name, clean):
    """No low norms and no massive dimensions; what draws attention in the late blocks has high norms."""
    whole = vitreg.load(str(shared / "models" / name))
    photos = [b.pixels for b in vitreg.read_images(shared / "data/imagenet-sample-1000", whole, limit=24)]
    sinks, low, massive = of_kinds(vitreg.diagnose(whole, photos))
    assert [x.present for x in (sinks, low, massive)] == [False, False, False]
    assert sinks.layer >= 10
    assert sinks.high_norm_attention > 0.2
    assert 0.5 < low.lowest < 0.65
    largest = {"deit_tiny_patch16_224": 21}.get(name, 41)
    assert massive.dimensions == [largest]
    for found in of_kinds(vitreg.diagnose(cut(shared / "models" / name, clean), photos)):
        assert not found.present, found
