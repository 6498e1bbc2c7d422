"""The claims about dense tasks with known truth: artifacts planted in a real model's weights, and fixed."""

import pytest

import vitreg
from vitreg.evals import Result, discovery, segmentation
from vitreg.evals.discovery import DiscoveryConfig
from vitreg.evals.segmentation import SegmentationConfig


@pytest.fixture(scope="module")
def models(shared):
    """The real ViT-Ti, and a phantom of it with the fix for what was planted."""
    vit = vitreg.load(str(shared / "models/vit_tiny_patch16_224.augreg_in21k_ft_in1k"))
    paths = sorted((shared / "data/imagenet-sample-1000").iterdir())[::20]
    photos = [batch.pixels for batch in vitreg.read_images(paths, vit, batch_size=25)]
    phantom = vitreg.plant(vit, photos, 5, rate=0.05, norm=30).vit
    neurons = vitreg.find_register_neurons(phantom, photos, vitreg.diagnose(phantom, photos))
    return vit, phantom, vitreg.TestTimeRegisters(neurons)


def in_three_states(models, evaluate) -> tuple[Result, Result, Result]:
    """Unplanted, planted, planted and fixed."""
    vit, phantom, fix = models
    before, planted = evaluate(vit), evaluate(phantom)
    with fix.applied_to(phantom):
        return before, planted, evaluate(phantom)


def falls_and_returns(states: tuple[Result, Result, Result], metric: str) -> None:
    before, planted, fixed = (result.metrics[metric] for result in states)
    fall, back = planted.less(before), before.estimate()
    assert fall.high < 0, fall
    assert back.low <= fixed.value <= back.high
    assert fixed.value > planted.value


@pytest.mark.nightly
def test_discovery_falls_and_returns(models, shared):
    config = DiscoveryConfig(method="tokencut", centre=True)
    found = in_three_states(
        models, lambda vit: discovery.evaluate(vit, shared / "data/VOCdevkit/VOC2012", config)
    )
    falls_and_returns(found, "TokenCut CorLoc")


@pytest.mark.nightly
def test_segmentation_falls_and_returns(models, shared):
    config = SegmentationConfig(ignore=11, limit=80)
    found = in_three_states(models, lambda vit: segmentation.evaluate(vit, shared / "data/camvid", config))
    falls_and_returns(found, "pixel accuracy")
