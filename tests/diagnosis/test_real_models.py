"""The diagnosis on real models and photos: hard artifacts, soft ones, and none."""

from pathlib import Path

import numpy as np
import pytest
import torch

import vitreg


@pytest.fixture(scope="module")
def vit_ti(shared) -> vitreg.Backbone:
    return vitreg.load(str(shared / "models/vit_tiny_patch16_224.augreg_in21k_ft_in1k"))


@pytest.fixture(scope="module")
def found(shared, vit_ti) -> vitreg.Diagnosis:
    paths = sorted((shared / "data/imagenet-sample-1000").iterdir())[::4]
    return vitreg.diagnose(vit_ti, vitreg.read_images(paths, vit_ti))


def test_vit_ti_has_artifacts_from_block_7_on(found):
    assert (found.verdict, found.images, found.onset_layer) == ("artifacts", 250, 7)
    assert found.outlier_fraction == pytest.approx(0.0198, abs=0.0005)
    assert all((layer.outlier_fraction > 0) == (layer.layer >= 7) for layer in found.layers)


def test_vit_ti_has_them_in_the_corners(found):
    frequency = np.array(found.position_frequency)
    corners = np.zeros((14, 14), dtype=bool)
    corners[[0, 0, 13, 13], [0, 13, 0, 13]] = True
    assert frequency[corners].min() > 0.9
    assert frequency[~corners].max() < 0.05


def test_vit_ti_attends_to_them(found):
    assert 0.30 <= found.attention_to_outliers <= 0.32


def test_vit_ti_writes_the_excess_into_one_dimension(found):
    assert found.excess_dimensions[0]["dimension"] == 41
    assert found.excess_dimensions[0]["share"] > 0.9


def test_masks_and_curves_agree_with_a_plain_forward_pass(shared, vit_ti, found):
    """The figures, computed again from norms that an ordinary hook collects."""
    photos = next(
        iter(vitreg.read_images(shared / "data/imagenet-sample-1000", vit_ti, batch_size=50, limit=50))
    )
    stream: list[torch.Tensor] = []
    hook = vit_ti.model.blocks[7].register_forward_hook(lambda module, args, output: stream.append(output))
    with torch.no_grad():
        vit_ti.model(photos.pixels)
    hook.remove()
    norms = stream[0].norm(dim=-1)[:, 1:].unflatten(1, (14, 14))
    assert torch.equal(found.outliers(vit_ti, photos.pixels), norms >= found.threshold)
    assert 30 < found.threshold < 400  # between the populations: 12 and 500


@pytest.fixture(scope="module")
def deit(shared) -> vitreg.Backbone:
    return vitreg.load(str(shared / "models/deit_tiny_patch16_224"))


@pytest.fixture(scope="module")
def soft(shared, deit) -> vitreg.Diagnosis:
    paths = sorted((shared / "data/imagenet-sample-1000").iterdir())[::4]
    return vitreg.diagnose(deit, vitreg.read_images(paths, deit))


def test_deit_ti_has_soft_artifacts(soft):
    assert (soft.verdict, soft.strength) == ("artifacts", "severe")
    assert 7 <= soft.onset_layer <= 9
    assert 0.03 <= soft.outlier_fraction <= 0.05
    assert 1.5 <= soft.threshold / soft.layers[soft.detect_layer].median_norm <= 1.8
    assert 0.31 <= soft.attention_to_outliers <= 0.38
    assert soft.excess_dimensions[0]["dimension"] == 21
    assert soft.layers[soft.detect_layer].evidence.direction > 0.8


def test_deit_ti_has_them_on_flat_patches_at_no_fixed_position(soft):
    assert soft.neighbour_similarity["outlier"] > 0.8 > 0.65 > soft.neighbour_similarity["normal"]
    assert np.array(soft.position_frequency).max() < 0.25


def test_deit_ti_at_448_pixels(shared):
    """Fewer, later, and so soft that fewer photos (50) do not show them."""
    deit = vitreg.load(str(shared / "models/deit_tiny_patch16_224"), size=448)
    paths = sorted((shared / "data/imagenet-sample-1000").iterdir())[::10]
    found = vitreg.diagnose(deit, vitreg.read_images(paths, deit))
    assert (found.verdict, found.strength) == ("artifacts", "moderate")
    assert found.onset_layer in (10, 11)
    assert 0.015 <= found.outlier_fraction <= 0.04


def cut(shared: Path, name: str, blocks: int) -> vitreg.Backbone:
    """A real model's first blocks, before its artifacts begin."""
    vit = vitreg.load(str(shared / "models" / name))
    vit.model.blocks = vit.model.blocks[:blocks]
    return vitreg.wrap(vit.model, vit.preprocess, image_size=vit.image_size)


@pytest.mark.parametrize(
    ("name", "blocks"), [("vit_tiny_patch16_224.augreg_in21k_ft_in1k", 5), ("deit_tiny_patch16_224", 6)]
)
@pytest.mark.parametrize("photos", [4, 32, 250])
def test_the_first_blocks_are_clean(shared, name, blocks, photos):
    vit = cut(shared, name, blocks)
    paths = sorted((shared / "data/imagenet-sample-1000").iterdir())[:: 1000 // photos]
    clean = vitreg.diagnose(vit, vitreg.read_images(paths, vit))
    assert (clean.verdict, clean.outlier_fraction, clean.onset_layer) == ("no artifacts", 0, None)
    assert all(layer.outlier_fraction == 0 for layer in clean.layers)


def test_a_handful_of_photos_is_enough(shared, vit_ti):
    few = vitreg.read_images(shared / "data/imagenet-sample-1000", vit_ti, limit=4)
    assert vitreg.diagnose(vit_ti, few).has_artifacts


def test_a_phantom_beside_real_artifacts(shared):
    """Planted into a real model below its own, they are found where they were planted."""
    deit = vitreg.load(str(shared / "models/deit_tiny_patch16_224"))
    photos = [
        batch.pixels for batch in vitreg.read_images(shared / "data/imagenet-sample-1000", deit, limit=64)
    ]
    phantom = vitreg.plant(deit, photos, 5)
    report = vitreg.diagnose(phantom.vit, photos)
    truth = torch.cat([phantom.marked(batch) for batch in photos])
    mask = torch.cat([report.outliers(phantom.vit, batch) for batch in photos])
    assert report.onset_layer == 5
    assert 2 * int((truth & mask).sum()) >= 0.99 * (int(truth.sum()) + int(mask.sum()))
