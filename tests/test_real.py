"""The diagnosis on the real models: one with artifacts, one without."""

import pytest
import torch

import vitreg

pytestmark = pytest.mark.filterwarnings("ignore")


def test_real_vit_ti(shared):
    vit = vitreg.load(str(shared / "models/vit_tiny_patch16_224.augreg_in21k_ft_in1k"))
    report = vitreg.diagnose(vit, vitreg.read_images(shared / "data/imagenet-sample-1000", vit, limit=64))
    assert report.verdict == "artifacts"
    assert report.onset_layer == 7
