"""The whole cure on phantoms: which neurons, which fix and why, and what is said and saved about it."""

import json

import pytest
import torch
from catalog import CATALOG, images
from test_phantom import crops

import vitreg
from vitreg import choosing
from vitreg import cure as curing
from vitreg.cure import find_cure
from vitreg.fixes import AttentionBias, ShiftAverage, TestTimeRegisters, TokenSplitting
from vitreg.neurons import find_register_neurons

Planted = tuple[vitreg.Phantom, torch.Tensor, vitreg.Diagnosis]


@pytest.fixture(scope="module")
def planted() -> Planted:
    vit = CATALOG["timm vit"].backbone()
    photos = crops(vit, 96, 0)
    phantom = vitreg.plant(vit, photos, 1)
    return phantom, photos, vitreg.diagnose(phantom.vit, [photos])


def cure_of(planted: Planted, **options) -> vitreg.Cure:
    phantom, photos, report = planted
    return find_cure(phantom.vit, [photos], report=report, **options)


def neurons_of(cure: vitreg.Cure) -> set[tuple[int, int]]:
    return {(neuron.layer, neuron.index) for neuron in cure.fix.neurons.chosen}


def truth(*phantoms: vitreg.Phantom) -> set[tuple[int, int]]:
    return {(phantom.layer, index) for phantom in phantoms for index in phantom.neurons}


# -- the fix ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["timm vit", "timm dinov3", "hf clip", "torchvision vit"])
def test_a_phantom_is_cured(name):
    vit = CATALOG[name].backbone()
    photos = crops(vit, 96, 0)
    phantom = vitreg.plant(vit, photos, 1)
    weights = {key: value.clone() for key, value in phantom.vit.model.state_dict().items()}
    stages: list[str] = []
    cure = find_cure(phantom.vit, list(photos.split(32)), progress=stages.append)
    assert neurons_of(cure) == truth(phantom)
    assert cure.verdict.verdict == "helps"
    assert cure.verdict["outliers"].after.value < 0.05 * cure.verdict["outliers"].before.value
    assert cure.report.onset_layer == 1
    assert stages[:4] == [
        "diagnosing the model as it is",
        "finding what makes the outliers",
        "finding register neurons",
        "building the fix",
    ]
    assert (cure.origin.kind, cure.origin.layers) == ("neurons", (1,))
    assert not vitreg.applied(phantom.vit.model)
    assert all(torch.equal(weights[key], value) for key, value in phantom.vit.model.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("registers", TestTimeRegisters), ("splitting", TokenSplitting), ("bias", AttentionBias)],
)
def test_each_kind_as_asked_for(planted, kind, expected):
    cure = cure_of(planted, kind=kind)
    assert type(cure.fix) is expected
    assert cure.choice == f"type {kind!r}, as asked for"
    assert getattr(cure.fix, "peak", "signed") == "signed"
    assert neurons_of(cure) == truth(planted[0])
    assert cure.verdict.verdict == "helps"
    assert all(text in str(cure) for text in (str(cure.fix.neurons), cure.choice, cure.verdict.reason))


def test_shift_average_edits_no_neurons_and_looks_for_none(planted):
    stages: list[str] = []
    cure = cure_of(planted, kind="shift-average", progress=stages.append)
    assert type(cure.fix) is ShiftAverage
    assert "finding register neurons" not in stages
    assert "register neurons" not in str(cure)
    assert cure.to_json()["neurons"] == {}


def test_how_neurons_are_found_is_passed_on(planted):
    cure = cure_of(planted, kind="registers", method="paper", top_k=2)
    assert (cure.fix.neurons.method, cure.fix.neurons.top_k) == ("paper", 2)


# -- which kind ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "expected", "says"),
    [
        (
            0.5,
            TestTimeRegisters,
            "the paper's test-time register, for the model hardly notices: cosine of CLS",
        ),
        (1.1, TokenSplitting, "token splitting, for test-time registers change what the model says"),
    ],
)
def test_auto_takes_a_register_where_predictions_stay(planted, monkeypatch, wanted, expected, says):
    monkeypatch.setattr(choosing, "UNCHANGED", dict.fromkeys(choosing.UNCHANGED, wanted))
    cure = cure_of(planted)
    assert type(cure.fix) is expected
    assert cure.choice.startswith(says)
    assert "on 96 images" in cure.choice


def test_what_is_said_of_predictions_is_what_a_plain_run_shows(planted, monkeypatch):
    phantom, photos, _ = planted
    monkeypatch.setattr(choosing, "CHOOSING_IMAGES", 40)
    monkeypatch.setattr(choosing, "UNCHANGED", {"agreement": 1.1})  # so that all is tried, and told
    cure = cure_of(planted)
    with torch.no_grad():
        before = phantom.vit(photos[:40]).argmax(1)
        with TestTimeRegisters(cure.fix.neurons.best(4)).applied_to(phantom.vit):
            kept = float((phantom.vit(photos[:40]).argmax(1) == before).float().mean())
    assert f"the paper's test-time register: equal predictions {kept:.4f}, on 40 images" in cure.choice


def test_auto_without_a_head_goes_by_features():
    vit = CATALOG["hf clip"].backbone()
    photos = crops(vit, 48, 0)
    phantom = vitreg.plant(vit, photos, 1)
    assert "cosine of CLS " in find_cure(phantom.vit, [photos]).choice


def test_auto_stays_with_registers_where_splitting_is_refused(planted, monkeypatch):
    def refuse(*args: object, **kwargs: object) -> None:
        raise vitreg.UnsupportedModelError("block 1 normalises what its MLP writes.")

    monkeypatch.setattr(choosing, "UNCHANGED", {"patches": 1.1})
    monkeypatch.setattr(TokenSplitting, "edits", refuse)
    cure = cure_of(planted)
    assert type(cure.fix) is TestTimeRegisters
    assert cure.choice.startswith("calibrated test-time registers, though the model notices")
    assert "block 1 normalises" in cure.choice


def test_gated_neurons_that_fire_negative_move_by_their_absolute_peak():
    """Signs of the gated half and of what is written, turned: the same function, by negative activations."""
    vit = CATALOG["timm dinov2 swiglu"].backbone()
    photos = crops(vit, 96, 0)
    phantom = vitreg.plant(vit, photos, 1)
    neurons = torch.tensor(phantom.neurons)
    mlp = phantom.vit.model.blocks[1].mlp
    # One half reads, the other is held at 1: at -1 the activation turns its sign.
    held = neurons if not bool(mlp.fc1.weight[neurons].any()) else neurons + mlp.fc2.in_features
    with torch.no_grad():
        expected = phantom.vit(photos)
        mlp.fc1.bias[held] *= -1
        mlp.fc2.weight[:, neurons] *= -1
        torch.testing.assert_close(phantom.vit(photos), expected, rtol=1e-4, atol=1e-4)
    cure = find_cure(phantom.vit, [photos], kind="registers")
    assert neurons_of(cure) == truth(phantom)
    assert all(neuron.at_outliers < -0.5 for neuron in cure.fix.neurons.chosen)
    assert cure.fix.peak == "absolute"
    assert cure.verdict["outliers"].after.value == 0
    split = find_cure(phantom.vit, [photos], kind="splitting")
    assert all(neuron.threshold < 0 for neuron in split.fix.neurons.chosen)
    assert split.verdict["outliers"].after.value < 0.05 * phantom.rate


# -- several populations ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def twice() -> tuple[Planted, vitreg.Phantom, vitreg.Phantom]:
    """Outliers from block 0 and others from block 2, with other neurons, places and write directions."""
    vit = CATALOG["timm vit"].backbone()
    photos = crops(vit, 96, 0)
    first = vitreg.plant(vit, photos, 0, seed=0)
    second = vitreg.plant(first.vit, photos, 2, rate=0.03, seed=1)
    return (second, photos, vitreg.diagnose(second.vit, [photos])), first, second


def test_one_round_leaves_the_second_population(twice):
    planted, first, _ = twice
    cure = cure_of(planted, kind="registers")
    assert neurons_of(cure) == truth(first)
    assert cure.verdict.after.has_artifacts
    assert cure.verdict.after.onset_layer == 2


@pytest.mark.parametrize("kind", ["registers", "splitting", "bias"])
def test_recursive_finds_both_populations(twice, kind):
    planted, first, second = twice
    stages: list[str] = []
    cure = cure_of(planted, kind=kind, recursive=True, progress=stages.append)
    assert neurons_of(cure) == truth(first, second)
    assert not cure.verdict.after.has_artifacts
    assert cure.verdict["outliers_worst_layer"].after.value < 0.001
    assert [stage for stage in stages if "again" in stage] == [f"looking again, round {i}" for i in (2, 3)]


def test_splitting_marks_the_second_population_alone(twice):
    """Its neurons lie behind the layer where the first was told apart; their thresholds are measured too."""
    planted, first, second = twice
    _, photos, _ = planted
    fix = cure_of(planted, kind="splitting", recursive=True).fix
    with torch.no_grad(), vitreg.trace(second.vit, neurons=True) as t:
        second.vit(photos)
    for phantom in (first, second):
        marked = phantom.marked(photos).flatten(1)
        for neuron in fix.neurons.chosen:
            if neuron.layer == phantom.layer:
                beyond = t.neurons[neuron.layer][:, t.layout.patch_slice, neuron.index] >= neuron.threshold
                assert float((beyond & ~marked).sum() / (~marked).sum()) < 0.02
    room = max(float(x.marked(photos).flatten(1).float().mean(1).max()) for x in (first, second))
    assert room < fix.capacity < 1


def test_the_search_ends_where_it_finds_nothing_new(planted, monkeypatch):
    """A diagnosis that will not be satisfied, and a search that finds the same again: two rounds."""
    phantom, photos, report = planted
    found = find_register_neurons(phantom.vit, [photos], report)
    searches: list[int] = []

    def same(*args, **options):
        searches.append(1)
        return found

    monkeypatch.setattr(curing, "diagnose", lambda vit, images: report)
    monkeypatch.setattr(curing, "find_register_neurons", same)
    cure = cure_of(planted, kind="registers", recursive=True)
    assert len(searches) == 2
    assert cure.fix.neurons.top_k == 4
    assert not vitreg.applied(phantom.vit.model)


# -- no artifacts, saving, JSON ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def nothing() -> vitreg.Cure:
    vit = CATALOG["timm vit"].backbone()
    return find_cure(vit, [images(vit, 8)])


def test_a_model_without_artifacts_gets_no_fix(nothing, tmp_path):
    assert nothing.fix is None
    assert nothing.verdict.verdict == "no artifacts"
    assert str(nothing).startswith("VisionTransformer: no artifacts\n")
    with pytest.raises(vitreg.FixError, match="no artifacts"):
        nothing.save(tmp_path / "fix")
    assert not (tmp_path / "fix").exists()


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


KEYS = {
    "neurons", "scores", "method", "top_k", "onset_layer", "before", "after", "controls", "verdict", "reason",
    "choice", "fix",
}  # fmt: skip


@pytest.mark.parametrize("kind", ["registers", "splitting", "shift-average"])
def test_the_result_is_json(planted, kind):
    cure = cure_of(planted, kind=kind)
    found = json.loads(json.dumps(cure.to_json()), parse_constant=refuse_constant)
    assert found.keys() >= KEYS
    assert found["before"].keys() == found["after"].keys() == cure.report.to_json().keys()
    assert (found["onset_layer"], found["fix"], found["verdict"]) == (1, kind, cure.verdict.verdict)
    assert {control["name"] for control in found["controls"]} > {"unfixed", "fix"}
    if kind != "shift-average":
        assert sorted(found["neurons"]["1"]) == sorted(planted[0].neurons)
        assert (found["method"], found["top_k"]) == ("contrast", 4)
        scores = [entry["score"] for entry in found["scores"]]
        assert scores == sorted(scores, reverse=True)
        assert scores[3] > 2 * scores[4]
        assert found["search"][-1][1] <= 0.05


def test_the_result_without_artifacts_is_json(nothing):
    found = json.loads(json.dumps(nothing.to_json()), parse_constant=refuse_constant)
    assert found.keys() >= KEYS
    assert found["before"]["verdict"] == found["verdict"] == "no artifacts"
    assert all(found[key] is None for key in ("fix", "after", "onset_layer"))
    assert (found["neurons"], found["controls"]) == ({}, [])


def test_the_saved_fix_is_the_fix_with_its_evidence(planted, tmp_path):
    phantom, photos, report = planted
    cure = cure_of(planted, kind="splitting")
    folder = cure.save(tmp_path / "fix", vit=phantom.vit)
    loaded = vitreg.load_fix(folder)
    with torch.no_grad():
        with cure.fix.applied_to(phantom.vit):
            expected = phantom.vit.model.forward_features(photos)
        with loaded.applied_to(phantom.vit):
            assert torch.equal(phantom.vit.model.forward_features(photos), expected)
    evidence = json.loads((folder / "fix.json").read_text())["evidence"]
    assert (evidence["images"], evidence["threshold"]) == (96, report.threshold)
    assert evidence["outlier_fraction_before"] == report.outlier_fraction
    assert evidence["outlier_fraction_after"] == cure.verdict["outliers"].after.value
    assert (evidence["verdict"], evidence["choice"]) == ("helps", cure.choice)
