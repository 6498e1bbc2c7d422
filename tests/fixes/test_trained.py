"""What a training run made of a model, as a fix: put on, seen by everything, and taken off bit for bit."""

import contextlib
import copy
import dataclasses
import json
import re
from typing import Any

import pytest
import torch
from catalog import CATALOG, built, images
from looking import close, different, footprint, residuals, same
from other_ways_to_run import compiled, pickled, twin
from torch import Tensor, nn

import vitreg
from vitreg.errors import FixError, FixWarning
from vitreg.evals.outlier_masks import unfixed_diagnosis
from vitreg.evals.result import fixes_on
from vitreg.features.config import Config
from vitreg.features.keys import model_key
from vitreg.fixes import TestTimeRegisters, TrainedRegisters, applied, load_fix
from vitreg.fixes.added_registers import add_registers
from vitreg.fixes.base import without_fixes
from vitreg.fixes.hub import model_card
from vitreg.fixes.neurons import RegisterNeurons
from vitreg.hooks.block_edit import without_edits
from vitreg.models.fingerprint import Fingerprint
from vitreg.verification.controls import controls_of

# Plain, another library's, rotary, with a positional bias, nn.MultiheadAttention.
FEW = ["timm vit", "hf dinov2", "timm dinov3", "timm beit", "open_clip vit"]


@pytest.fixture(params=FEW)
def vit(request: pytest.FixtureRequest) -> vitreg.Backbone:
    """A model that is built once: tests leave it as they found it."""
    return built(request.param)


def trained(vit: vitreg.Backbone, n: int = 2) -> vitreg.Backbone:
    """The model after a training, as one may think of it: its last block and patch embedding are others."""
    after = twin(vit)
    if n:
        add_registers(after, n, initial=torch.randn(n, vit.anatomy.width))
    parts = [after.anatomy.block_modules(after.model)[-1]]
    parts.append(after.model.get_submodule(vit.anatomy.patch_embedding))
    with torch.no_grad():
        for parameter in (p for part in parts for p in part.parameters()):
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return after


def made(vit: vitreg.Backbone, n: int = 2) -> TrainedRegisters:
    return TrainedRegisters.between(vit, trained(vit, n))


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


# -- the model after its training ------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 4])
@torch.no_grad()
def test_the_fix_makes_the_trained_model_of_the_one_before(vit, n):
    after = trained(vit, n)
    fix = TrainedRegisters.between(vit, after)
    plain, expected = residuals(vit, images(vit)), residuals(after, images(vit))
    assert different(expected, plain)
    before, own = footprint(vit.model), weights_of(vit.model)
    with fix.applied_to(vit):
        assert same(residuals(vit, images(vit)), expected)
        assert same(vit(images(vit)), after(images(vit)))
        assert vit.model.state_dict().keys() == own.keys()
        assert [x.shape for x in vit.model.state_dict().values()] == [x.shape for x in own.values()]
        handle = applied(vit.model)[0]
        assert handle.carried.shape == (2, n, vit.anatomy.width) if n else handle.carried is None
    assert same(residuals(vit, images(vit)), plain)
    assert footprint(vit.model) == before
    assert all(torch.equal(value, own[name]) for name, value in vit.model.state_dict().items())


def test_it_holds_what_differs_and_nothing_else(vit):
    after = trained(vit)
    fix = TrainedRegisters.between(vit.model, after.model)
    own, new = vit.model.state_dict(), after.model.state_dict()
    assert torch.equal(fix.tokens, new.pop("added_registers"))
    assert fix.weights.keys() == {name for name in own if not torch.equal(own[name], new[name])}
    assert 0 < len(fix.weights) < len(own) / 2
    assert all(torch.equal(value, new[name]) for name, value in fix.weights.items())
    assert fix.neurons.fingerprint == Fingerprint.of(vit)
    after.model.state_dict()[next(iter(fix.weights))].zero_()
    assert next(iter(fix.weights.values())).any()  # a model that goes on training does not change it


def test_buffers_are_kept_too():
    vit = twin(built("timm vit"))
    vit.model.register_buffer("steps", torch.tensor(3))
    after = trained(vit)
    after.model.steps += 4
    fix = TrainedRegisters.between(vit, after)
    assert int(fix.weights["steps"]) == 7
    with fix.applied_to(vit):
        assert int(vit.model.steps) == 7
    assert int(vit.model.steps) == 3


# -- copies, types, compiled models ------------------------------------------------------------------


@torch.no_grad()
def test_a_baked_copy_leaves_the_model_as_it_is(vit):
    after, plain = trained(vit), weights_of(vit.model)
    baked = TrainedRegisters.between(vit, after).bake(vit.model)
    assert same(vit.with_model(baked, "baked")(images(vit)), after(images(vit)))
    assert all(torch.equal(value, plain[name]) for name, value in vit.model.state_dict().items())


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@torch.no_grad()
def test_a_copy_is_fixed_and_independent(copied):
    vit = CATALOG["timm vit"].backbone()
    plain = vit(images(vit))
    with made(vit).applied_to(vit):
        fixed = vit(images(vit))
        other = vit.with_model(copied(vit.model), "copy")
        applied(other.model)[0].undo()
        assert same(other(images(vit)), plain)
        assert same(vit(images(vit)), fixed)
    with applied_again(vit, other):
        assert same(vit(images(vit)), plain)


def applied_again(vit: vitreg.Backbone, other: vitreg.Backbone) -> Any:
    return made(vit).applied_to(other)


@torch.no_grad()
def test_weights_of_another_type(vit):
    half, fix = twin(vit), made(vit)
    half.model.bfloat16()
    plain = weights_of(half.model)
    with fix.applied_to(vit):
        exact = residuals(vit, images(vit))
    with fix.applied_to(half):
        assert {x.dtype for x in half.model.parameters()} == {torch.bfloat16}
        close(residuals(half, images(vit)).float(), exact, 0.05)
    assert all(torch.equal(value, plain[name]) for name, value in half.model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm vit", "hf dinov2"])
def test_a_compiled_model_sees_it_come_and_go(name):
    vit = built(name)
    fix = made(vit)
    with compiled(vit, backend="eager") as run:
        plain = vit(images(vit))
        close(run(images(vit)), plain)
        with fix.applied_to(vit):
            fixed = vit(images(vit))
            close(run(images(vit)), fixed)
            assert different(fixed, plain)
        close(run(images(vit)), plain)


# -- order -------------------------------------------------------------------------------------------


@torch.no_grad()
def test_other_fixes_stack_on_it(vit):
    after = trained(vit)
    fix, other = TrainedRegisters.between(vit, after), TestTimeRegisters({1: [3]})
    plain = vit(images(vit))
    with other.applied_to(after):
        expected = after(images(vit))
    with fix.applied_to(vit), other.applied_to(vit):
        assert same(vit(images(vit)), expected)
        with pytest.raises(FixError, match="reverse order: undo 'registers'"):
            applied(vit.model)[0].undo()
        assert same(vit(images(vit)), expected)  # a refused undo changes no weights
    assert same(vit(images(vit)), plain)


def test_it_is_applied_once(vit):
    fix = made(vit)
    again = copy.deepcopy(fix)
    with fix.applied_to(vit), pytest.raises(FixError, match="already applied"):
        again.apply(vit)
    assert fix == again
    assert fix != made(vit)
    assert fix != dataclasses.replace(fix, weights={})


# -- the model without its fixes ---------------------------------------------------------------------


@torch.no_grad()
def test_the_unfixed_model_has_its_own_weights(vit):
    fix, other = made(vit), TestTimeRegisters({1: [3]})
    plain, key = vit(images(vit)), model_key(vit)
    with fix.applied_to(vit), other.applied_to(vit):
        fixed, fixed_key, handles = vit(images(vit)), model_key(vit), applied(vit.model)
        with without_fixes(vit.model):
            assert same(vit(images(vit)), plain)
            assert model_key(vit) == key
        with contextlib.suppress(KeyboardInterrupt), without_fixes(vit.model):
            raise KeyboardInterrupt
        assert same(vit(images(vit)), fixed)
        assert applied(vit.model) == handles
        assert model_key(vit) == fixed_key != key
        with without_edits(vit.model):  # tells the anatomy only
            assert different(vit(images(vit)), plain)


@torch.no_grad()
def test_added_registers_are_part_of_the_unfixed_model(vit):
    vit = trained(vit)
    plain = vit(images(vit))
    with TestTimeRegisters({1: [3]}).applied_to(vit), without_fixes(vit.model):
        assert same(vit(images(vit)), plain)


def test_evaluations_know_it(shared):
    """Outliers are those of the model before its training; a result says what is on the model."""
    vit = vitreg.load(str(shared / "models/vit_tiny_patch16_224.augreg_in21k_ft_in1k"))
    paths = sorted((shared / "data/imagenette/val/n01440764").iterdir())[:8]
    plain = unfixed_diagnosis(vit, paths, Config())
    after = twin(vit)
    add_registers(after, 4)
    with torch.no_grad():
        after.model.blocks[7].mlp.fc2.weight[:, 417] = 0  # the neuron that makes the artifacts
    fix = TrainedRegisters.between(vit, after)
    assert list(fix.weights) == ["blocks.7.mlp.fc2.weight"]
    with fix.applied_to(vit):
        assert not vitreg.diagnose(vit, vitreg.read_images(paths, vit)).has_artifacts
        assert unfixed_diagnosis(vit, paths, Config()).outlier_fraction == plain.outlier_fraction > 0.01
        assert fixes_on(vit) == "trained (4 register tokens)"


# -- verified ----------------------------------------------------------------------------------------


def test_its_placebo_is_as_many_inert_tokens(vit):
    controls = controls_of(made(vit, 4), vit)
    assert controls.fixes == {"inert token": TestTimeRegisters(RegisterNeurons(()), registers=4)}
    assert controls.left_out == ("neuron controls: the fix edits no neurons",)


def test_a_verdict_of_the_real_vit(shared, tmp_path):
    """The weights that make its artifacts taken away: a fix that was saved, loaded and verified."""
    vit = vitreg.load(str(shared / "models/vit_tiny_patch16_224.augreg_in21k_ft_in1k"))
    after = twin(vit)
    add_registers(after, 4)
    with torch.no_grad():
        after.model.blocks[7].mlp.fc2.weight[:, 417] = 0
    folder = TrainedRegisters.between(vit, after).save(tmp_path / "fix")
    photos = vitreg.read_images(shared / "data/imagenette/val", vit, limit=24)
    verdict = vitreg.verify(vit, load_fix(folder), photos)
    assert verdict["outliers"].before.value > 0.01
    assert verdict["outliers"].after.value == 0
    assert [control.name for control in verdict.controls] == ["unfixed", "fix", "inert token"]
    assert "with fix of type 'trained'" in verdict.full()
    json.dumps(verdict.to_json())


# -- as a folder -------------------------------------------------------------------------------------


def test_it_comes_back_from_its_folder(vit, tmp_path):
    fix = made(vit)
    folder = fix.save(tmp_path / "fix", evidence={"before": 0.02})
    loaded = load_fix(folder)
    assert loaded == fix
    assert loaded.neurons.fingerprint == fix.neurons.fingerprint
    assert {x.dtype for x in loaded.weights.values()} == {torch.float32}
    with torch.no_grad(), fix.applied_to(vit):
        expected = vit(images(vit))
    with torch.no_grad(), loaded.applied_to(vit):
        assert same(vit(images(vit)), expected)
    document = json.loads((folder / "fix.json").read_text())
    assert (document["type"], document["config"]) == ("trained", {})
    card = model_card("me/fix", document)
    assert "adds trained register tokens" in card
    assert "Undone, it leaves the weights of the model as they were" in card


def test_the_order_of_weights_says_nothing(vit, tmp_path):
    fix = made(vit)
    turned = dataclasses.replace(fix, weights=dict(reversed(fix.weights.items())))
    assert len(fix.weights) > 1
    assert turned == fix
    assert hash(turned) == hash(fix)
    folder = fix.save(tmp_path / "fix")
    for _ in range(10):  # safetensors itself has another order each time
        assert list(load_fix(folder).weights) == sorted(fix.weights)


def test_saved_while_applied_it_is_still_that_of_the_model_before(vit, tmp_path):
    fix = made(vit)
    before = fix.neurons.fingerprint
    with fix.applied_to(vit):
        assert Fingerprint.of(vit) != before
        folder = fix.save(tmp_path / "fix", vit=vit)
    assert load_fix(folder).neurons.fingerprint == before


def test_tied_weights_can_be_saved(tmp_path):
    vit = twin(built("timm vit"))
    vit.model.blocks[1].mlp.fc1.weight = vit.model.blocks[0].mlp.fc1.weight
    after = twin(vit)
    with torch.no_grad():
        after.model.blocks[0].mlp.fc1.weight += 1
    fix = load_fix(TrainedRegisters.between(vit, after).save(tmp_path / "fix"))
    assert list(fix.weights) == ["blocks.0.mlp.fc1.weight", "blocks.1.mlp.fc1.weight"]
    with fix.applied_to(vit):
        assert torch.equal(vit.model.blocks[1].mlp.fc1.weight, after.model.blocks[0].mlp.fc1.weight)


def test_what_is_too_large_is_not_saved(tmp_path, monkeypatch):
    monkeypatch.setitem(vitreg.fixes.saving._MOST_BYTES, "fix.safetensors", 1000)
    with pytest.raises(FixError, match=r"bytes of tensors; expected at most 1,000\. .* a model of its own"):
        made(built("timm vit")).save(tmp_path / "fix")
    assert not (tmp_path / "fix").exists()


# -- what is refused ---------------------------------------------------------------------------------


def test_models_that_are_no_two_versions_of_one_are_refused():
    vit, other = built("timm vit"), built("hf dinov2")
    after = trained(vit)
    with pytest.raises(FixError, match=r"is a weight of only one of them\. Give the model before and after"):
        TrainedRegisters.between(vit, other)
    with pytest.raises(FixError, match="the two models do not differ"):
        TrainedRegisters.between(vit, twin(vit))
    with pytest.raises(FixError, match="`before` has added registers"):
        TrainedRegisters.between(after, after)
    with TestTimeRegisters({}, 1).applied_to(after), pytest.raises(FixError, match="'registers' is applied"):
        TrainedRegisters.between(vit, after)
    after.model.reset_classifier(7)
    shapes = re.escape("'head.weight' has shape (7, 32), but the model's is (5, 32)")
    with pytest.raises(FixError, match=shapes):
        TrainedRegisters.between(vit, after)


def test_a_model_that_it_does_not_fit_is_refused_and_left_alone():
    vit = built("timm vit")
    fix = made(vit)
    unknown = dataclasses.replace(fix, weights={f"encoder.{name}": x for name, x in fix.weights.items()})
    shape = dataclasses.replace(fix, weights={"pos_embed": torch.zeros(1, 5, 32)})
    wide = dataclasses.replace(fix, tokens=torch.zeros(2, 48))
    before = footprint(vit.model)
    for wrong, message in {
        unknown: r"'encoder\.\S+' and \d+ more, but this VisionTransformer has no .* \(VisionTransformer\)",
        shape: r"'pos_embed' has shape \(1, 5, 32\), but the model's is \(1, 21, 32\).*same architecture",
        wide: "initial values of width 48, but the model's is 32",
    }.items():
        with pytest.raises(FixError, match=message):
            wrong.apply(vit)
    assert footprint(vit.model) == before
    assert applied(vit.model) == []


def test_other_weights_are_warned_about_and_another_library_is_refused():
    fix = made(built("timm vit"))
    with pytest.warns(FixWarning, match="made for other weights"):
        handle = fix.apply(CATALOG["timm vit"].backbone(seed=1))
    handle.undo()
    with pytest.warns(FixWarning), pytest.raises(FixError, match="library that it was trained in"):
        fix.apply(built("hf vit classifier"))


def test_what_is_no_such_fix_is_refused(tmp_path):
    fix = made(built("timm vit"))
    with pytest.raises(
        ValueError, match=re.escape("0 neurons and registers of shape (32,): expected no neurons")
    ):
        TrainedRegisters(fix.neurons, torch.zeros(32), {})
    with pytest.raises(ValueError, match="found 1 neurons"):
        TrainedRegisters({0: [3]}, fix.tokens, {})
    broken = dataclasses.replace(fix, weights={"head.bias": torch.full((5,), float("nan"))})
    with pytest.raises(FixError, match=r"weights\.head\.bias of the fix holds NaN"):
        broken.save(tmp_path / "fix")
