"""The conclusions of a diagnosis, on models whose artifacts are made by hand."""

import json
from dataclasses import replace

import pytest
import torch
from catalog import CATALOG, images
from checkpoints import tiny_timm

import vitreg
from vitreg.diagnosis.result import describe_positions


def spiked(tokens: list[int], layer: int = 1, size: float = 500.0, name: str = "timm vit") -> vitreg.Backbone:
    vit = CATALOG[name].backbone()
    vit.model.blocks[layer].register_forward_hook(lambda module, args, x: spike(x, tokens, size))
    return vit


def spike(x: torch.Tensor, tokens: list[int], size: float) -> torch.Tensor:
    x = x.clone()
    x[:, tokens, 3] += size
    return x


def test_place_count_layer_and_dimension_of_a_spike():
    vit = spiked([1 + 7])  # patch 7 of a 4x5 grid: row 1, column 2
    report = vitreg.diagnose(vit, [images(vit, 16)])
    assert (report.verdict, report.onset_layer, report.outliers_per_image) == ("artifacts", 1, 1.0)
    frequency = torch.tensor(report.position_frequency)
    assert frequency[1, 2] == 1
    assert frequency.sum() == 1
    assert report.excess_dimensions[0]["dimension"] == 3
    assert report.excess_dimensions[0]["share"] > 0.95
    assert report.outliers(vit, images(vit, 2)).nonzero().tolist() == [[0, 1, 2], [1, 1, 2]]
    assert "100% of them at fixed places (row, column): (1, 2)" in report.full()


def test_spikes_on_cls_and_registers_are_no_outlier_patches():
    vit = spiked([0, 1, 2, 3, 4], name="timm dinov2 registers")
    report = vitreg.diagnose(vit, [images(vit, 8)])
    assert report.verdict == "no artifacts"
    assert report.layers[1].cls_norm > 100 > report.layers[0].cls_norm
    assert report.layers[1].register_norm > 100 > report.layers[0].register_norm


def test_outliers_that_the_last_block_hides_are_found_where_they_are():
    """As in DINOv2-B: a high-norm token in the middle, nothing at the final layer."""
    vit = spiked([1 + 7], layer=0)
    vit.model.blocks[1].register_forward_hook(lambda module, args, x: spike(x, [1 + 7], -500.0))
    report = vitreg.diagnose(vit, [images(vit, 16)])
    assert (report.onset_layer, report.detect_layer) == (0, 0)
    assert [layer.outlier_fraction > 0 for layer in report.layers] == [True, False, False]


def test_attention_share_is_that_of_tokens_entering_as_outliers():
    vit = spiked([1 + 7, 1 + 12])
    batch = images(vit, 8)
    report = vitreg.diagnose(vit, [batch])
    with torch.no_grad(), vitreg.trace(vit, attention="cls") as t:
        vit(batch)
    patches = t.attention[2, :, :, 0, t.layout.patch_slice]
    share = (patches[..., [7, 12]].sum(-1) / patches.sum(-1)).mean()
    assert report.attention_to_outliers == pytest.approx(float(share), rel=1e-4)
    assert report.attention_queries == "cls"


def test_attention_and_values_count_what_enters_a_block_not_what_leaves_it():
    vit = spiked([1 + 7])
    vit.model.blocks[2].register_forward_hook(lambda module, args, x: spike(x, [1 + 7], -500.0))
    batch = images(vit, 8)
    last = vitreg.diagnose(vit, [batch]).layers[2]
    with torch.no_grad(), vitreg.trace(vit, attention="cls", qkv=True) as t:
        vit(batch)
    patches = t.layout.patch_slice
    share = t.attention[2, :, :, 0, patches]
    values = t.v[2][:, :, patches].norm(dim=(1, 3))
    elsewhere = torch.arange(20) != 7
    assert last.outlier_fraction == 0
    expected = float((share[..., 7] / share.sum(-1)).mean())
    assert last.attention_to_outliers == pytest.approx(expected, rel=1e-4)
    expected = float(values[:, 7].mean() / values[:, elsewhere].mean())
    assert last.value_norm_ratio == pytest.approx(expected, rel=1e-4)


def test_images_without_outliers_do_not_blur_the_excess_dimensions():
    vit = CATALOG["timm vit"].backbone()

    def spike_a_quarter(module, args, x):
        x = x.clone()
        x[:4, 8, 3] += 200.0
        return x

    vit.model.blocks[1].register_forward_hook(spike_a_quarter)
    report = vitreg.diagnose(vit, [images(vit, 16)])
    assert report.outliers_per_image == pytest.approx(1 / 4)
    assert report.excess_dimensions[0]["dimension"] == 3
    assert report.excess_dimensions[0]["share"] > 0.95


def test_without_cls_some_patches_are_asked():
    vit = CATALOG["timm siglip"].backbone()
    report = vitreg.diagnose(vit, [images(vit, 4)])
    assert report.attention_queries == "patches"
    assert report.prefix_tokens == 0
    assert report.layers[0].cls_norm is None


def test_json_round_trip_and_examples():
    vit = spiked([1 + 7])
    report = vitreg.diagnose(vit, [images(vit, 5), images(vit, 5)], examples=7)
    assert json.loads(json.dumps(report.to_json()))["verdict"] == "artifacts"
    assert len(report.examples) == 7
    assert report.examples[0].norms.shape == (3, 4, 5)
    assert report.examples[0].norms[1, 1, 2] == pytest.approx(500, rel=0.1)


def test_no_images_and_mixed_sizes():
    vit = CATALOG["timm naflexvit"].backbone()
    with pytest.raises(vitreg.ImageError, match="no images to diagnose"):
        vitreg.diagnose(vit, [])
    with pytest.raises(vitreg.ImageError, match="one size at a time"):
        vitreg.diagnose(vit, [torch.rand(2, 3, 32, 40), torch.rand(2, 3, 40, 40)])


def test_the_size_named_is_that_of_the_images():
    vit = vitreg.wrap(tiny_timm(dynamic_img_size=True))
    report = vitreg.diagnose(vit, [torch.rand(2, 3, 40, 48)])
    assert (vit.image_size, report.image_size, report.grid) == ((32, 32), (40, 48), (5, 6))


def test_overflow_names_the_block_and_the_way_out():
    vit = spiked([1], size=torch.inf)
    with pytest.raises(vitreg.NonFiniteError, match=r"after block 1 .* --dtype float32"):
        vitreg.diagnose(vit, [images(vit, 2)])


def test_places_in_words():
    assert describe_positions([[0.0, 0.2], [0.1, 0.0]], images=8).startswith(
        "no fixed places (most often row 0, column 1: 20%"
    )
    assert "(1, 0)" in describe_positions([[0.0, 0.2], [0.9, 0.0]], images=8)


def test_emergence_over_checkpoints():
    reports = []
    for step, size in ((1000, 0.0), (2000, 0.0), (3000, 500.0)):
        vit = spiked([1 + 7], size=size)
        found = vitreg.diagnose(vit, [images(vit, 8)])
        reports.append(replace(found, model=f"runs/a/step-{step}"))
    emerging = vitreg.Emergence(reports)
    assert emerging.labels == ["step-1000", "step-2000", "step-3000"]
    rows = emerging.full().splitlines()
    assert ["no artifacts" in row for row in rows[1:4]] == [True, True, False]
    assert "block 1" in rows[3]
    locality = [f"{report.kind('locality').kept[-1]:.2f}" for report in reports]
    assert [row.split()[-1] for row in rows[1:4]] == locality
    assert [entry["label"] for entry in emerging.to_json()["models"]] == emerging.labels
    with pytest.raises(ValueError, match="no diagnoses to compare"):
        vitreg.Emergence([])
