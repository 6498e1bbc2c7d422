"""The evaluations on real pretrained models and real photos."""

import pytest

import vitreg
from vitreg.evals import evaluate
from vitreg.evals.classification import ClassificationConfig


@pytest.mark.parametrize(
    ("name", "top1"),
    [("vit_tiny_patch16_224.augreg_in21k_ft_in1k", 0.823), ("deit_tiny_patch16_224", 0.793)],
)
def test_top_1_on_the_1000_photos(shared, name, top1):
    vit = vitreg.load(str(shared / "models" / name))
    found = evaluate("classification", vit, shared / "data/imagenet-sample-1000")
    assert found.n == 1000
    assert found.metrics["top-1"].value == pytest.approx(top1, abs=0.002)


def test_splitting_changes_no_prediction(shared):
    vit = vitreg.load(str(shared / "models/vit_tiny_patch16_224.augreg_in21k_ft_in1k"))
    photos = vitreg.read_images(shared / "data/imagenet-sample-1000", vit, limit=32)
    report = vitreg.diagnose(vit, photos)
    neurons = vitreg.find_register_neurons(vit, photos, report)
    config = ClassificationConfig(limit=200)
    before = evaluate("classification", vit, shared / "data/imagenette", config)
    with vitreg.TokenSplitting.calibrate(vit, photos, neurons).applied_to(vit):
        after = evaluate("classification", vit, shared / "data/imagenette", config)
    assert after.fix == "splitting (5 neurons)"
    change = after.metrics["top-1"].less(before.metrics["top-1"])
    assert (change.value, change.low, change.high) == (0, 0, 0)
