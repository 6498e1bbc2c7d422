"""The diagnosis on real pretrained models and real photos: one with artifacts, one without."""

import numpy as np
import pytest
import torch

import vitreg


@pytest.fixture(scope="module")
def vit_ti(shared) -> vitreg.Backbone:
    return vitreg.load(str(shared / "models/vit_tiny_patch16_224.augreg_in21k_ft_in1k"))


@pytest.fixture(scope="module")
def found(shared, vit_ti) -> vitreg.Diagnosis:
    return vitreg.diagnose(vit_ti, vitreg.read_images(shared / "data/imagenet-sample-1000", vit_ti))


def test_vit_ti_has_artifacts_from_block_7_on(found):
    assert (found.verdict, found.images, found.onset_layer) == ("artifacts", 1000, 7)
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


@pytest.mark.parametrize(("size", "every"), [(224, 1), (448, 5)])
def test_deit_ti_has_none(shared, size, every):
    deit = vitreg.load(str(shared / "models/deit_tiny_patch16_224"), size=size)
    paths = sorted((shared / "data/imagenet-sample-1000").iterdir())[::every]
    clean = vitreg.diagnose(deit, vitreg.read_images(paths, deit))
    assert (clean.verdict, clean.outlier_fraction, clean.onset_layer) == ("no artifacts", 0, None)
    assert all(layer.outlier_fraction == 0 for layer in clean.layers)
    lazy = clean.statistics.counts[11][vitreg.statistics.EDGES[:-1] > 2 * clean.layers[11].median_norm].sum()
    if size == 224:  # a threshold of twice the median would have found artifacts
        assert float(lazy / clean.statistics.counts[11].sum()) > 0.01


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224.augreg_in21k_ft_in1k", "deit_tiny_patch16_224"])
def test_a_handful_of_photos_is_enough(shared, name):
    vit = vitreg.load(str(shared / "models" / name))
    few = vitreg.read_images(shared / "data/imagenet-sample-1000", vit, limit=4)
    assert vitreg.diagnose(vit, few).has_artifacts == name.startswith("vit")


def test_a_phantom_beside_real_artifacts(shared):
    """Planted into a real model without artifacts, they are found where they were planted."""
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
