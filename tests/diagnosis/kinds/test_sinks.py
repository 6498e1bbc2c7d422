"""Attention sinks of ordinary norm: found where planted, told from high norms, content and lone queries."""

import pytest
import torch
from catalog import CATALOG, images
from phantoms import crops
from scenes import LARGER_GRID, finding, scenes
from tiers import seeds

import vitreg
from vitreg.diagnosis.kinds import Context
from vitreg.diagnosis.kinds.base import AttentionRows, shares_of_patches
from vitreg.diagnosis.kinds.sinks import SINK, SinkFinding, Sinks
from vitreg.diagnosis.statistics import spread_patches
from vitreg.fixes import TestTimeRegisters, TokenSplitting
from vitreg.hooks.attention import SdpaCall
from vitreg.phantoms.sinks_without_norm import plant_sinks
from vitreg.search.register_neurons import find_register_neurons

KIND = "attention sinks"


@pytest.mark.parametrize("seed", seeds(3))
@pytest.mark.parametrize("name", LARGER_GRID)
def test_planted_sinks_are_found_where_they_are(name, seed):
    vit = LARGER_GRID[name].backbone(seed)
    photos = scenes(vit, 32, seed, flat=2)
    assert not finding(vit, photos, KIND).present
    phantom = plant_sinks(vit, photos, 0, rate=0.025, seed=seed)
    found = finding(phantom.vit, photos, KIND)
    assert found.present
    assert found.layer > 0
    truth = phantom.marked(photos).double().mean(0)
    positions = torch.tensor(found.positions)
    # Where many share a photo, not each draws ten times its share.
    assert float((positions - truth).clamp(min=0).sum()) <= 0.1 * float(positions.sum())
    assert float(positions.sum()) > 0.1 * float(truth.sum())
    assert found.attention > 4 * found.even
    assert "though they are no outliers by norm" in str(found)


def test_figures_are_those_of_the_full_attention():
    vit = LARGER_GRID["timm dinov2 registers"].backbone(1)
    photos = scenes(vit, 32, 1, flat=2)
    vit = plant_sinks(vit, photos, 0, rate=0.025, seed=1).vit
    found = finding(vit, photos, KIND)
    with torch.no_grad(), vitreg.trace(vit, attention="full", layers=[found.layer]) as t:
        vit(photos)
    rows, layout = t.attention[0], t.layout
    by_cls = rows[:, :, 0, layout.patch_slice]
    by_cls = (by_cls / by_cls.sum(-1, keepdim=True)).mean(1)
    asked = [layout.patch_slice.start + patch for patch in (10, 30, 50, 70)]
    by_patches = rows[:, :, asked].mean(1)
    to_patches = by_patches[..., layout.patch_slice]
    third = (to_patches / to_patches.sum(-1, keepdim=True)).sort(1, descending=True).values[:, 2]
    sinks = (torch.minimum(by_cls, third) * layout.patches) >= SINK
    assert found.per_image == pytest.approx(float(sinks.sum(1).double().mean()))
    assert found.images_with == pytest.approx(float(sinks.any(1).double().mean()))
    assert found.attention == pytest.approx(float((by_cls * sinks).sum(1).mean()), rel=1e-4)
    assert found.even == pytest.approx(found.per_image / layout.patches)
    registers = by_patches[..., layout.register_slice].sum(-1).mean()
    assert found.to_registers[found.layer] == pytest.approx(float(registers), rel=1e-4)
    assert found.to_prefix[found.layer] == pytest.approx(float(by_patches[..., 0].mean()), rel=1e-4)


def attended(
    queries: slice | list[int], patch: int, photos: int = 10, of: int = 10, norm: float = 1.0
) -> SinkFinding:
    """The finding where in some of the photos these patch queries (and CLS) attend to one patch alone."""
    vit = LARGER_GRID["timm vit"].backbone()
    meter, layout = Sinks(vit, vit.layout), vit.layout
    q, k = torch.zeros(of, 1, layout.tokens, 8), torch.zeros(of, 1, layout.tokens, 8)
    q[:photos, :, 0, 0] = 1
    q[:photos, :, layout.patch_slice][:, :, queries] = torch.eye(8)[0]
    k[:, :, layout.patch_slice.start + patch, 0] = 20
    call = SdpaCall(q, k, k)
    by_cls = shares_of_patches(call.rows(torch.tensor([0]))[:, :, 0], layout.patch_slice)
    rows = AttentionRows(by_cls, call.rows(spread_patches(layout)), layout.patch_slice)
    norms = torch.ones(of, layout.tokens)
    norms[:, layout.patch_slice.start + patch] = norm
    meter.start()
    meter.attention(0, rows)
    meter.block(0, torch.zeros(of, layout.tokens, 32), norms)
    meter.attention(1, rows)
    return meter.finding(Context(images=of, thresholds=(4.0, None, None)))


def test_a_sink_has_all_queries():
    found = attended(slice(None), patch=7)
    assert (found.present, found.layer, found.images_with, found.at_fixed) == (True, 1, 1.0, 1.0)
    assert torch.tensor(found.positions).nonzero().tolist() == [[0, 7]]
    assert "100% of them are at fixed places" in str(found)


@pytest.mark.parametrize("queries", [[], [10], [10, 30], [*range(9), *range(11, 29)]])
def test_cls_with_a_few_patches_makes_no_sink(queries):
    """What CLS looks at, or a patch its own neighbours, is content."""
    found = attended(queries, patch=7)
    assert (found.present, found.per_image) == (False, 0.0)


@pytest.mark.parametrize(
    ("photos", "of", "present"), [(2, 2, False), (3, 3, True), (3, 20, False), (4, 20, True)]
)
def test_sinks_are_in_many_images(photos, of, present):
    found = attended(slice(None), 7, photos, of)
    assert found.present == present
    assert found.images_with == photos / of


def test_patches_that_enter_as_outliers_are_no_sinks_of_ordinary_norm():
    found = attended(slice(None), 7, norm=5.0)
    assert (found.present, found.per_image, found.high_norm_per_image) == (False, 0.0, 1.0)
    assert "High-norm outliers draw as much there: 1.0 per image" in str(found)
    assert attended(slice(None), 7, norm=3.0).present


def test_planted_high_norms_are_told_from_them():
    vit = LARGER_GRID["timm vit"].backbone()
    photos = scenes(vit, 32, 0, flat=2)
    diagnosis = vitreg.diagnose(vitreg.plant(vit, photos, 0).vit, [photos])
    found = next(found for found in diagnosis.kinds if found.kind == KIND)
    assert diagnosis.has_artifacts
    assert not found.present
    assert found.high_norm_per_image > 0.2


def test_registers_of_a_fix_count_as_registers():
    vit = CATALOG["timm vit"].backbone()
    photos = crops(vit, 96, 0)
    phantom = vitreg.plant(vit, photos, 1)
    neurons = find_register_neurons(phantom.vit, [photos], vitreg.diagnose(phantom.vit, [photos]))
    assert not any(finding(phantom.vit, photos, KIND).to_registers)
    for fix in (TestTimeRegisters(neurons), TokenSplitting.calibrate(phantom.vit, [photos], neurons)):
        with fix.applied_to(phantom.vit), torch.no_grad():
            found = finding(phantom.vit, photos, KIND)
            with vitreg.trace(phantom.vit, attention=[2, 7, 12, 17], layers=[2]) as t:
                phantom.vit(photos)
        shares = t.attention[0].mean((0, 1, 2))
        assert found.to_registers[2] == pytest.approx(float(shares[t.inner.register_slice].sum()), rel=1e-4)
        assert found.to_prefix[2] == pytest.approx(float(shares[t.inner.prefix_slice].sum()), rel=1e-4)
        assert found.to_registers[2] > 0


def test_what_cannot_be_planted_is_refused():
    vit = CATALOG["timm dinov3"].backbone()
    with pytest.raises(vitreg.UnsupportedModelError, match="rotated or normalised"):
        plant_sinks(vit, scenes(vit, 32, 0), 0)


def test_without_prefix_the_patches_are_asked():
    vit = CATALOG["timm siglip"].backbone()
    found = finding(vit, images(vit, 4), KIND)
    assert (found.asked, sum(found.to_prefix)) == ("patches'", 0.0)
