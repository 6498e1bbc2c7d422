"""The whole cure on phantoms: which neurons, which fix and why, and what is said and saved about it."""

import inspect
import json
from dataclasses import dataclass, replace

import pytest
import torch
from catalog import CATALOG, images
from phantoms import crops

import vitreg
from vitreg.diagnosis.kinds import Finding
from vitreg.diagnosis.outliers import OutlierRule
from vitreg.fixes import (
    AttentionBias,
    Fix,
    Inpainting,
    PositionRepair,
    Projection,
    ShiftAverage,
    TestTimeRegisters,
    TokenSplitting,
    projection,
)
from vitreg.phantoms import (
    OriginPhantom,
    plant_attention_outliers,
    plant_patch_outliers,
    plant_position_outliers,
)
from vitreg.reports.report import write
from vitreg.search import choosing
from vitreg.search import fix_search as curing
from vitreg.search.choosing import TriedFix
from vitreg.search.fix_search import find_fix
from vitreg.search.register_neurons import find_register_neurons

pytestmark = pytest.mark.slow

Planted = tuple[vitreg.Phantom, torch.Tensor, vitreg.Diagnosis]


@pytest.fixture(scope="module")
def planted() -> Planted:
    vit = CATALOG["timm vit"].backbone()
    photos = crops(vit, 96, 0)
    phantom = vitreg.plant(vit, photos, 1)
    return phantom, photos, vitreg.diagnose(phantom.vit, [photos])


def cure_of(planted: Planted, **options) -> vitreg.FixSearch:
    phantom, photos, report = planted
    return find_fix(phantom.vit, [photos], report=report, **options)


def neurons_of(cure: vitreg.FixSearch) -> set[tuple[int, int]]:
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
    cure = find_fix(phantom.vit, list(photos.split(32)), progress=stages.append)
    assert neurons_of(cure) == truth(phantom)
    assert cure.verdict.verdict == "helps"
    assert cure.verdict["outliers"].after.value < 0.05 * cure.verdict["outliers"].before.value
    assert cure.report.onset_layer == 1
    assert stages[0].startswith("about ")
    assert stages[1:] == [
        "1/6 diagnosing the model as it is",
        "2/6 finding what makes the outliers",
        "3/6 finding register neurons",
        "4/6 building the fix",
        "5/6 diagnosing the model with the fix",
        "6/6 measuring both, and the controls",
    ]
    assert (cure.origin.kind, cure.origin.layers) == ("neurons", (1,))
    assert not vitreg.applied(phantom.vit.model)
    assert all(torch.equal(weights[key], value) for key, value in phantom.vit.model.state_dict().items())


def test_a_kind_that_is_none_is_refused_before_any_work(planted):
    """It used to give a ShiftAverage, "as asked for"."""
    with pytest.raises(vitreg.FixError, match=r"no type 'median' of fix\. Expected one of auto, registers"):
        inspect.unwrap(find_fix)(planted[0].vit, [], kind="median")  # type checks would refuse it here


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
    assert all(text in cure.full() for text in (str(cure.fix.neurons), cure.choice, cure.verdict.reason))


def test_shift_average_edits_no_neurons_and_looks_for_none(planted):
    stages: list[str] = []
    cure = cure_of(planted, kind="shift-average", progress=stages.append)
    assert type(cure.fix) is ShiftAverage
    assert not [stage for stage in stages if "finding register neurons" in stage]
    assert stages[1] == "1/3 building the fix"
    assert "register neurons" not in cure.full()
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
            "the paper's test-time register, because the model's outputs hardly change: cosine of CLS",
        ),
        (1.1, TokenSplitting, "token splitting, because test-time registers change what the model says"),
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
    monkeypatch.setattr(choosing, "UNCHANGED", {"cls": 1.1})  # so that all is tried, and told

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            return phantom.vit.model.forward_features(photos[:40])[:, 0], phantom.vit(photos[:40])

    cure = cure_of(planted)
    cls, logits = run()
    with TestTimeRegisters(cure.fix.neurons.best(4)).applied_to(phantom.vit):
        fixed_cls, fixed = run()
    likeness = float(torch.cosine_similarity(cls, fixed_cls, dim=-1).mean())
    sure = logits.softmax(1)
    lost = float((sure.amax(1) - sure.gather(1, fixed.argmax(1)[:, None])[:, 0]).mean())
    assert f"the paper's test-time register: cosine of CLS {likeness:.4f}, cosine of normal" in cure.choice
    assert f"expected loss of top-1 {lost:.2%}, on 40 images; calibrated test-time registers" in cure.choice


def test_auto_without_a_head_goes_by_features():
    vit = CATALOG["hf clip"].backbone()
    photos = crops(vit, 48, 0)
    phantom = vitreg.plant(vit, photos, 1)
    assert "cosine of CLS " in find_fix(phantom.vit, [photos]).choice


def test_auto_stays_with_registers_where_splitting_is_refused(planted, monkeypatch):
    def refuse(*args: object, **kwargs: object) -> None:
        raise vitreg.UnsupportedModelError("block 1 normalises what its MLP writes.")

    monkeypatch.setattr(choosing, "UNCHANGED", {"patches": 1.1})
    monkeypatch.setattr(TokenSplitting, "edits", refuse)
    cure = cure_of(planted)
    assert type(cure.fix) is TestTimeRegisters
    assert cure.choice.startswith("calibrated test-time registers, though the model's outputs change")
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
    cure = find_fix(phantom.vit, [photos], kind="registers")
    assert neurons_of(cure) == truth(phantom)
    assert all(neuron.at_outliers < -0.5 for neuron in cure.fix.neurons.chosen)
    assert cure.fix.peak == "absolute"
    assert cure.verdict["outliers"].after.value == 0
    split = find_fix(phantom.vit, [photos], kind="splitting")
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


@pytest.fixture(scope="module")
def early(twice) -> Planted:
    """The same, with a diagnosis that looks where there are only the first."""
    phantom, photos, report = twice[0]
    rule = OutlierRule(0, report.layers[0].threshold)
    return (
        phantom,
        photos,
        replace(report, detect_layer=0, threshold=rule.threshold, rule=rule),
    )


def test_one_round_leaves_the_second_population(twice, early):
    _, first, _ = twice
    cure = cure_of(early, kind="registers")
    assert neurons_of(cure) == truth(first)
    assert cure.verdict.after.has_artifacts
    assert cure.verdict.after.onset_layer == 2


def test_one_round_finds_both_where_the_diagnosis_looks_behind_them(twice):
    planted, first, second = twice
    cure = cure_of(planted)
    assert neurons_of(cure) == truth(first, second)
    assert (cure.origin.kind, cure.origin.layers) == ("neurons", (0, 2))
    assert not cure.verdict.after.has_artifacts


@pytest.mark.parametrize("kind", ["registers", "splitting", "bias"])
def test_recursive_finds_both_populations(twice, early, kind):
    _, first, second = twice
    stages: list[str] = []
    cure = cure_of(early, kind=kind, recursive=True, progress=stages.append)
    assert neurons_of(cure) == truth(first, second)
    assert not cure.verdict.after.has_artifacts
    assert cure.verdict["outliers_worst_layer"].after.value < 0.001
    assert [stage for stage in stages if "again" in stage] == [
        f"1/4 finding register neurons: looking again, round {i}" for i in (2, 3)
    ]


def test_splitting_marks_the_second_population_alone(twice, early):
    """Its neurons lie behind the layer where the first was told apart; their thresholds are measured too."""
    planted, first, second = twice
    _, photos, _ = planted
    fix = cure_of(early, kind="splitting", recursive=True).fix
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


# -- outliers that no neurons make -----------------------------------------------------------------

POSITION = (2, 3)


def planted_by(kind: str, name: str, seed: int) -> tuple[OriginPhantom, torch.Tensor]:
    vit = CATALOG[name].backbone(seed)
    photos = crops(vit, 96, seed)
    if kind == "attention output":
        return plant_attention_outliers(vit, photos, 1, seed=seed), photos
    if kind == "patch embedding":
        return plant_patch_outliers(vit, photos, seed=seed), photos
    return plant_position_outliers(vit, [POSITION], seed=seed), photos


def is_repaired_or_refused(cure: vitreg.FixSearch, kind: str, fix: type[Fix]) -> bool:
    """Whether a cure is of the type that fits the origin, and helps; else it must say what it tried."""
    assert cure.origin.kind == kind
    if cure.fix is None:
        assert cure.verdict.verdict == "no fix"
        assert cure.choice.startswith(f"no fix, because the {kind}")
        assert "cosine of normal patches" in cure.choice
        assert "in-painting of whole patches: " in cure.choice
        return False
    assert type(cure.fix) is fix
    assert cure.verdict.verdict == "helps", cure.verdict.reason
    assert not cure.verdict.after.has_artifacts
    assert f"because the {kind}" in cure.choice
    return True


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("attention output", name) for name in ("timm deit3", "hf clip", "torchvision vit")),
        *(("patch embedding", name) for name in ("timm siglip", "hf siglip2", "torchvision vit")),
    ],
)
def test_outliers_from_attention_or_the_patch_embedding_are_in_painted(kind, name):
    phantom, photos = planted_by(kind, name, 0)
    assert is_repaired_or_refused(find_fix(phantom.vit, [photos]), kind, Inpainting)


@pytest.mark.parametrize(
    ("name", "seed", "helps"),
    [
        ("timm naflexvit", 0, True),
        ("timm dinov2 registers", 1, True),
        ("torchvision vit", 0, True),
        ("timm siglip", 0, False),
    ],
)
def test_outlying_positions_are_repaired_where_the_model_says_the_same_without_them(name, seed, helps):
    phantom, photos = planted_by("position embedding", name, seed)
    cure = find_fix(phantom.vit, [photos])
    assert is_repaired_or_refused(cure, "position embedding", PositionRepair) == helps
    assert helps or "position repair: cosine of" in cure.choice


@pytest.mark.parametrize(
    "name", ["timm naflexvit", "timm dinov2 registers", "torchvision vit", "timm siglip"]
)
def test_repaired_positions_bring_the_unplanted_features_back(name):
    phantom, photos = planted_by("position embedding", name, 0)
    cure = find_fix(phantom.vit, [photos], kind="positions")
    assert cure.origin is None
    vit = CATALOG[name].backbone(0)
    clean, broken = last_patches(vit, photos), last_patches(phantom.vit, photos)
    with cure.fix.applied_to(phantom.vit):
        repaired = last_patches(phantom.vit, photos)
    marked = phantom.marked(photos).flatten(1)
    assert torch.cosine_similarity(repaired, clean, dim=-1)[marked].mean() >= 0.95
    assert torch.cosine_similarity(broken, clean, dim=-1)[marked].mean() < 0.5
    assert torch.cosine_similarity(repaired, clean, dim=-1)[~marked].mean() >= 0.99


@torch.no_grad()
def last_patches(vit: vitreg.Backbone, photos: torch.Tensor) -> torch.Tensor:
    with vitreg.trace(vit, norms=False, residuals=True, layers=[vit.anatomy.depth - 1]) as t:
        vit(photos)
    return t.residuals[0][:, t.layout.patch_slice]


@pytest.fixture(scope="module")
def by_attention() -> tuple[vitreg.Backbone, torch.Tensor, vitreg.Diagnosis]:
    phantom, photos = planted_by("attention output", "torchvision vit", 0)
    return phantom.vit, photos, vitreg.diagnose(phantom.vit, [photos])


def test_as_few_directions_as_suffice_are_in_painted(by_attention, monkeypatch):
    vit, photos, report = by_attention
    assert len(find_fix(vit, [photos], report=report).fix.directions) == 1
    plain = TriedFix.of
    short = lambda name, *rest: replace(plain(name, *rest), removes="1 direction" not in name)  # noqa: E731
    monkeypatch.setattr(TriedFix, "of", short)
    cure = find_fix(vit, [photos], report=report)
    assert len(cure.fix.directions) == 4
    assert "in-painting of patches along 1 direction: outliers stay, cosine" in cure.choice


def test_where_nothing_leaves_the_rest_no_fix_is_offered(by_attention, monkeypatch, tmp_path):
    vit, photos, report = by_attention
    monkeypatch.setattr(choosing, "UNCHANGED", {"patches": 1.1})
    cure = find_fix(vit, [photos], report=report)
    assert not is_repaired_or_refused(cure, "attention output", Inpainting)
    assert cure.full().endswith(f"\norigin: {cure.origin}\n{cure.choice}")
    with pytest.raises(
        vitreg.FixError, match=r"no fix to save \(no fix\): no fix, because the attention output"
    ):
        cure.save(tmp_path / "fix")
    found = json.loads(json.dumps(cure.to_json()))
    assert (found["verdict"], found["fix"], found["origin"]["kind"]) == ("no fix", None, "attention output")
    assert "Artifacts, and no fix for them" in write(cure, tmp_path / "r.html").read_text()


def test_neurons_compete_if_the_outliers_vanish_with_them(by_attention, planted, monkeypatch):
    """Those of another model stand for them: what the trial says of the two decides."""
    vit, photos, report = by_attention
    plain = TriedFix.of

    def rated(name, fix, *rest):
        trial = plain(name, fix, *rest)
        return replace(trial, removes=True, unchanged=True, helps=True, likeness=float("neurons" in name))

    monkeypatch.setattr(TriedFix, "of", rated)
    found = find_register_neurons(vit, [photos], report, top_k=2)
    for reached, expected in ((True, TestTimeRegisters), (False, Inpainting)):
        searched = replace(found, reached=reached)
        monkeypatch.setattr(curing, "find_register_neurons", lambda *a, found=searched, **k: found)
        assert type(find_fix(vit, [photos], report=report).fix) is expected


def test_images_that_show_no_outlier_first_leave_the_choice_to_the_neurons(planted, monkeypatch):
    monkeypatch.setattr(choosing, "UNCHANGED", {})  # so that the first is taken: others need outliers there
    monkeypatch.setattr(choosing, "EXPECTED_LOSS", 1.0)
    phantom, photos, report = planted
    clean = ~phantom.marked(photos).flatten(1).any(1)
    sorted_photos = torch.cat([photos[clean].repeat(2, 1, 1, 1)[:64], photos])
    assert not phantom.marked(sorted_photos[:64]).any()
    cure = find_fix(phantom.vit, [sorted_photos], report=report)
    assert cure.origin is None
    assert "What makes the outliers is not known: none of the first 64 images has one" in cure.choice


@pytest.mark.parametrize(("kind", "expected"), [("inpainting", Inpainting), ("projection", Projection)])
def test_kinds_without_neurons_as_asked_for(planted, kind, expected, monkeypatch):
    monkeypatch.setattr(curing, "find_origin", None)  # nor are they looked for
    monkeypatch.setattr(curing, "find_register_neurons", None)
    monkeypatch.setattr(projection, "FACTOR", 1.0)
    monkeypatch.setattr(projection, "SHARE", 0.0)
    cure = cure_of(planted, kind=kind)
    assert type(cure.fix) is expected
    assert cure.origin is None
    assert cure.choice.startswith(f"type {kind!r}, as asked for")
    assert (cure.verdict.verdict == "helps") == (kind == "inpainting")
    assert cure.full().endswith(f"What it does not cure: {expected.does_not_cure}")


# -- findings that are no norms ----------------------------------------------------------------------


@dataclass(frozen=True)
class Massive(Finding):
    kind = "massive dimensions"
    title = "Massive dimensions"

    def __str__(self) -> str:
        return "found."


class Pattern(Massive):
    kind, title = "position pattern", "Position-bound pattern"


class Sinks(Massive):
    kind, title = "attention sinks", "Attention sinks"


def test_findings_without_outliers_are_named_with_the_fix_for_dense_reading():
    vit = CATALOG["timm vit"].backbone()
    photos = images(vit, 8)
    clean = vitreg.diagnose(vit, [photos])
    pattern, sinks, absent = Pattern(True, 2, None), Sinks(True, 2, None), Massive(False, 2, None)
    cure = find_fix(vit, [photos], report=replace(clean, kinds=(absent, pattern, sinks)))
    assert (cure.fix, cure.verdict.verdict) == (None, "no artifacts")
    assert cure.choice == (
        "no patch's norm is to be fixed, but there is more: Position-bound pattern; Attention sinks. For"
        " dense reading, --type projection takes out: position pattern."
    )
    assert cure.full().endswith(cure.choice)
    other = find_fix(vit, [photos], report=replace(clean, kinds=(sinks,)))
    assert "projection" not in other.choice
    nothing = find_fix(vit, [photos], report=replace(clean, kinds=(absent,)))
    assert nothing.choice == "there is nothing to fix."
    made = find_fix(vit, [photos], report=replace(clean, kinds=(pattern,)), kind="projection")
    assert (type(made.fix), len(made.fix.basis)) == (Projection, 8)


# -- no artifacts, saving, JSON ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def nothing() -> vitreg.FixSearch:
    vit = CATALOG["timm vit"].backbone()
    return find_fix(vit, [images(vit, 8)])


def test_a_model_without_artifacts_gets_no_fix(nothing, tmp_path):
    assert nothing.fix is None
    assert nothing.verdict.verdict == "no artifacts"
    assert str(nothing).startswith("No artifacts, nothing to fix: VisionTransformer\n")
    with pytest.raises(vitreg.FixError, match="no artifacts"):
        nothing.save(tmp_path / "fix")
    assert not (tmp_path / "fix").exists()


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


KEYS = {
    "neurons", "scores", "method", "top_k", "onset_layer", "before", "after", "controls", "verdict", "reason",
    "choice", "fix", "origin",
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
    assert all(found[key] is None for key in ("fix", "after", "onset_layer", "origin"))
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
    assert evidence["origin"] is None


def test_the_origin_is_told_and_saved(planted, tmp_path):
    cure = cure_of(planted)
    assert f"\norigin: {cure.origin}\n{cure.choice}\n" in cure.full()
    assert "the MLP of block 1 makes them" in str(cure.origin)
    assert cure.to_json()["origin"] == cure.origin.to_json()
    evidence = json.loads((cure.save(tmp_path / "fix") / "fix.json").read_text())["evidence"]
    assert evidence["origin"] == str(cure.origin)
