"""From which activation on a neuron marks a token: for known activations, and for those of phantoms."""

import math
from dataclasses import replace

import pytest
import torch
from catalog import CATALOG, images
from phantoms import crops

import vitreg
from vitreg.fixes.calibration import IMAGES, MARK, SMALLEST, _levelled, calibrate_thresholds
from vitreg.fixes.neurons import RegisterNeuron, RegisterNeurons
from vitreg.fixes.splitting import _Marker
from vitreg.search.register_neurons import find_register_neurons

NEURON = RegisterNeuron(1, 3)


@pytest.fixture(scope="module")
def photos() -> torch.Tensor:
    return crops(CATALOG["timm vit"].backbone(), 64, 0)


@pytest.fixture(scope="module")
def phantom(photos) -> vitreg.Phantom:
    return vitreg.plant(CATALOG["timm vit"].backbone(), photos, 1)


@pytest.fixture(scope="module")
def found(phantom, photos) -> RegisterNeurons:
    return find_register_neurons(phantom.vit, [photos], vitreg.diagnose(phantom.vit, [photos]))


def activations(vit: vitreg.Backbone, batch: torch.Tensor, neuron: RegisterNeuron) -> torch.Tensor:
    with torch.no_grad(), vitreg.trace(vit, neurons=True, layers=[neuron.layer]) as t:
        vit(batch)
    return t.neurons[0][:, t.layout.patch_slice, neuron.index]


# -- one neuron, activations made up ---------------------------------------------------------------


def outliers_among(b: int, p: int, every: int) -> torch.Tensor:
    return (torch.arange(b * p) % every == 0).unflatten(0, (b, p))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_threshold_lies_between_normal_tokens_and_outliers_of_either_sign(sign):
    outliers = outliers_among(10, 100, every=50)
    values = sign * torch.where(outliers, 20.0 + torch.arange(1000).unflatten(0, (10, 100)) / 100, 0.5)
    neuron, apart = _levelled(NEURON, values, outliers)
    assert apart
    lowest = 20.5  # the second of 20 outliers, the lowest twentieth
    assert neuron.threshold == pytest.approx(sign * (0.5 + MARK * (lowest - 0.5)))
    assert torch.equal(values / neuron.threshold >= 1, outliers)
    assert (neuron.layer, neuron.index) == (NEURON.layer, NEURON.index)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_splitting_forks_what_lies_beyond_a_threshold_of_either_sign(sign):
    outliers = outliers_among(2, 50, every=25)
    values = sign * torch.where(outliers, 9.0, 0.4)
    values[0, 1] = -sign * 100  # far on the other side: not marked
    neuron, _ = _levelled(NEURON, values, outliers)
    tensors = RegisterNeurons((neuron,)).tensors(1)
    activation = torch.zeros(2, 50, 8)
    activation[..., NEURON.index] = values
    marker = _Marker(tensors, None, 0, 5)
    kept = marker(activation)
    forked = torch.zeros(2, 50, dtype=torch.bool).scatter(1, marker.fork.position, marker.fork.valid)
    assert torch.equal(forked, outliers)
    assert torch.equal(kept[..., NEURON.index], values.masked_fill(outliers, 0))


def test_a_neuron_that_serves_some_outliers_marks_by_their_high_activations():
    outliers = outliers_among(10, 100, every=10)
    served = outliers & outliers_among(10, 100, every=40)  # 25 of 100
    values = torch.where(served, 30.0, 0.2)
    neuron, apart = _levelled(NEURON, values, outliers)
    assert not apart
    assert neuron.threshold == pytest.approx(0.2 + MARK * 29.8)
    assert torch.equal(values / neuron.threshold >= 1, served)


def test_one_odd_normal_token_in_a_thousand_does_not_move_the_threshold():
    outliers = outliers_among(40, 100, every=50)
    values = torch.where(outliers, 20.0, 0.5)
    values[3, 7] = 500.0
    assert not outliers[3, 7]
    assert _levelled(NEURON, values, outliers)[0].threshold == pytest.approx(0.5 + MARK * 19.5)


def test_a_neuron_without_activation_marks_nothing():
    outliers = outliers_among(10, 100, every=50)
    neuron, apart = _levelled(NEURON, torch.zeros(10, 100), outliers)
    assert (neuron.threshold, apart) == (SMALLEST, False)


# -- neurons of a phantom --------------------------------------------------------------------------


def test_planted_neurons_mark_planted_patches(phantom, photos, found):
    marked, most = calibrate_thresholds(phantom.vit, [photos], found)
    truth = phantom.marked(photos).flatten(1)
    beyond = torch.zeros_like(truth)
    for neuron in marked.chosen:
        one = activations(phantom.vit, photos, neuron) / neuron.threshold >= 1
        assert float((one & ~truth).sum() / (~truth).sum()) < 0.005
        beyond |= one
    assert float((beyond & truth).sum() / truth.sum()) > 0.95
    assert most == pytest.approx(float(beyond.float().mean(1).max()))
    assert marked.by_layer == found.by_layer
    assert marked == replace(found, chosen=marked.chosen)  # all other evidence stays


def test_feeders_are_those_of_the_ranking_that_keep_outliers_apart(phantom, photos, found):
    """A search that chose one of the planted neurons: the others are found again by what they do."""
    one = found.best(1)
    alone, _ = calibrate_thresholds(phantom.vit, [photos], one, feeders=False)
    assert alone.by_layer == one.by_layer
    fed, _ = calibrate_thresholds(phantom.vit, [photos], one)
    assert {neuron.index for neuron in fed.chosen} == set(phantom.neurons)
    assert fed.chosen[0].index == one.chosen[0].index
    assert all(neuron.threshold > SMALLEST for neuron in fed.chosen)


def test_what_does_not_keep_outliers_apart_does_not_count_as_marked(phantom, photos, found):
    _, most = calibrate_thresholds(phantom.vit, [photos], found)
    _, without = calibrate_thresholds(phantom.vit, [photos], replace(found, ranking=found.chosen))
    assert most == without < 1


def test_batches_make_no_difference(phantom, photos, found):
    whole, most = calibrate_thresholds(phantom.vit, [photos], found)
    parts, same = calibrate_thresholds(phantom.vit, list(photos.split(7)), found)
    assert same == most
    assert [(n.layer, n.index) for n in parts.chosen] == [(n.layer, n.index) for n in whole.chosen]
    for one, other in zip(parts.chosen, whole.chosen, strict=True):
        assert one.threshold == pytest.approx(other.threshold, rel=1e-4)


def test_at_most_64_images_are_looked_at(phantom, photos, found):
    seen: list[int] = []

    def endless():
        while True:
            yield photos[:24]

    hook = phantom.vit.model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    calibrate_thresholds(phantom.vit, endless(), found)
    hook.remove()
    assert seen == [32, 32]
    assert IMAGES == 64
    more = torch.cat([photos, crops(phantom.vit, 64, 9)])
    assert calibrate_thresholds(phantom.vit, [more], found) == calibrate_thresholds(
        phantom.vit, [photos], found
    )


def test_neurons_of_several_layers_and_prefix_tokens():
    """Patches are read behind CLS and registers, in each neuron's own layer."""
    vit = CATALOG["timm dinov2 registers"].backbone()
    photos = crops(vit, 64, 0)
    phantom = vitreg.plant(vit, photos, 1)
    report = vitreg.diagnose(phantom.vit, [photos])
    found = find_register_neurons(phantom.vit, [photos], report)
    early = RegisterNeuron(0, 2)
    marked, _ = calibrate_thresholds(phantom.vit, [photos], found.with_more([early]), feeders=False)
    truth = report.outliers(phantom.vit, photos).flatten(1)
    for neuron in marked.chosen:
        expected, _ = _levelled(neuron, activations(phantom.vit, photos, neuron), truth)
        assert neuron.threshold == pytest.approx(expected.threshold, rel=1e-4)


def test_the_model_is_left_as_it_was(phantom, photos, found):
    phantom.vit.model.train()
    before = [len(module._forward_hooks) for module in phantom.vit.model.modules()]
    calibrate_thresholds(phantom.vit, [photos], found)
    assert phantom.vit.model.training
    assert [len(module._forward_hooks) for module in phantom.vit.model.modules()] == before
    phantom.vit.model.eval()


# -- what cannot be measured -----------------------------------------------------------------------


def test_neurons_without_a_search_are_an_error(phantom, photos):
    given = RegisterNeurons.of({1: list(phantom.neurons)})
    assert math.isnan(given.chosen[0].threshold)
    for neurons in (given, replace(given, threshold=50.0), replace(given, detect_layer=1)):
        with pytest.raises(vitreg.FixError, match="without the norm that makes an outlier"):
            calibrate_thresholds(phantom.vit, [photos], neurons)
    marked, _ = calibrate_thresholds(phantom.vit, [photos], replace(given, threshold=50.0, detect_layer=1))
    assert not any(math.isnan(neuron.threshold) for neuron in marked.chosen)


def test_images_without_outliers_are_an_error(found, phantom):
    vit = CATALOG["timm vit"].backbone()
    with pytest.raises(vitreg.FixError, match="none of these images has an outlier"):
        calibrate_thresholds(vit, [images(vit, 4)], found)


def test_no_images_are_an_error(found, phantom):
    with pytest.raises(vitreg.ImageError, match="no images"):
        calibrate_thresholds(phantom.vit, [], found)
