"""What holds for a model with a fix on it that edits no neuron: the contract of fixes, on a few models."""

import copy
import json
import pickle
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from catalog import CATALOG, built, images
from looking import close, different, residuals, same, tensors
from other_ways_to_run import anatomy_of, checkpointed, compiled, gradients, training, twin
from phantoms import crops

import vitreg
from vitreg.errors import FixError, FixWarning
from vitreg.fixes import Fix, Inpainting, PositionRepair, Projection, TestTimeRegisters, load_fix
from vitreg.fixes.neurons import RegisterNeurons
from vitreg.fixes.saving import _CLASSES
from vitreg.verification.controls import controls_of

# Their outputs say something of patches; with a norm behind the positions, and sizes of their own.
FEW = ["timm siglip", "timm so150m", "hf clip", "hf siglip2"]


def positions(vit: vitreg.Backbone) -> Fix:
    return PositionRepair.calibrate(vit, patches=[3, 7])


def inpainting(vit: vitreg.Backbone) -> Fix:
    norms = residuals(vit, images(vit, 4))[1][:, vit.layout.patch_slice].norm(dim=-1)
    some, neurons = torch.eye(vit.anatomy.width)[:20], positions(vit).neurons
    return Inpainting(neurons, some, layer=1, threshold=float(norms.median()))


def projection(vit: vitreg.Backbone) -> Fix:
    return Projection.calibrate(vit, [images(vit, 4)], massive=False, positions=5)


@pytest.fixture(params=[positions, inpainting, projection])
def make(request: pytest.FixtureRequest) -> Callable[[vitreg.Backbone], Fix]:
    return request.param


@pytest.fixture(params=FEW)
def vit(request: pytest.FixtureRequest) -> vitreg.Backbone:
    return built(request.param)


@torch.no_grad()
def test_one_image_is_as_a_batch_and_undo_is_exact(vit, make):
    batch, before = images(vit, 3), anatomy_of(vit.model)
    plain, weights = vit(batch), copy.deepcopy(vit.model.state_dict())
    handle = make(vit).apply(vit)
    fixed, inside = vit(batch), residuals(vit, batch)
    close(residuals(vit, batch[1:2])[:, 0], inside[:, 1])
    state = vit.model.state_dict()
    assert list(state) == list(weights)
    assert all(torch.equal(state[name], value) for name, value in weights.items())
    assert different(fixed, plain)
    with pytest.raises(FixError, match="already applied"):
        handle.fix.apply(vit)
    handle.undo()
    assert anatomy_of(vit.model) == before
    assert same(vit(batch), plain)
    with pytest.raises(FixError, match="undone before"):
        handle.undo()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm siglip", "hf clip"])
def test_it_compiles_and_notices_the_undo(name, make):
    vit = built(name)
    with torch.no_grad(), make(vit).applied_to(vit):
        fixed = vit(images(vit))
    with torch.no_grad():
        plain = vit(images(vit))
    with compiled(vit, backend="eager") as run:
        close(run(images(vit)), plain)
        with make(vit).applied_to(vit):
            close(run(images(vit)), fixed)
        close(run(images(vit)), plain)


def test_it_comes_back_from_a_file(vit, make, tmp_path: Path):
    fix = make(vit)
    loaded = load_fix(fix.save(tmp_path / "fix", vit=vit))
    assert loaded == fix
    assert hash(loaded) == hash(fix)
    assert loaded.neurons.fingerprint == fix.neurons.fingerprint
    assert json.loads((tmp_path / "fix/fix.json").read_text())["type"] == fix.type
    with torch.no_grad():
        with fix.applied_to(vit):
            expected = vit(images(vit))
        with loaded.applied_to(vit):
            assert same(vit(images(vit)), expected)
    with pytest.raises(FixError, match="the fix was made for 3 blocks of width"):
        loaded.apply(built("timm so150m" if vit.anatomy.width == 32 else "timm siglip"))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@torch.no_grad()
def test_copies_are_fixed_and_independent(make, copied):
    vit = built("timm siglip")
    plain, fix = vit(images(vit)), make(vit)
    with fix.applied_to(vit):
        fixed, other = vit(images(vit)), vit.with_model(copied(vit.model), "copy")
    baked = vit.with_model(fix.bake(vit.model), "baked")
    assert same(vit(images(vit)), plain)
    for each in (other, baked):
        assert same(each(images(vit)), fixed)
        vitreg.applied(each.model)[0].undo()
        assert same(each(images(vit)), plain)


@pytest.mark.parametrize("name", ["timm siglip", "hf clip"])
def test_gradients_with_and_without_checkpointing(name, make):
    vit = built(name)
    with training(vit):
        plain = gradients(vit)
        with make(vit).applied_to(vit):
            fixed = gradients(vit)
            with checkpointed(vit):
                again = gradients(vit)
    assert len(fixed) == len(plain)
    assert different(fixed, plain)
    close(again, fixed)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm siglip", "hf dinov2 registers"])
@torch.no_grad()
def test_it_is_exported_with_the_model_for_any_number_of_images(name, make):
    vit = twin(built(name))
    other = images(vit, 3, seed=1)
    plain = tensors(vit(other))[0]
    make(vit).apply(vit)
    sizes = ({0: torch.export.Dim("images", min=1, max=64)},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the libraries
        program = torch.export.export(vit.model, (images(vit, 2),), dynamic_shapes=sizes, strict=False)
    found = program.module()(other)
    expected = tensors(vit(other))[0]
    torch.testing.assert_close(tensors(found)[0], expected, rtol=1e-4, atol=1e-4)
    assert (expected - plain).abs().max() > 1e-3


@torch.no_grad()
def test_it_stacks_with_registers_in_either_order(make):
    vit = built("timm siglip")
    registers, fix = TestTimeRegisters({0: [3], 1: [5]}, registers=2), make(vit)
    plain = vit(images(vit))
    with registers.applied_to(vit), fix.applied_to(vit):
        one = vit(images(vit))
    with fix.applied_to(vit), registers.applied_to(vit):
        close(vit(images(vit)), one)
    with registers.applied_to(vit):
        assert different(vit(images(vit)), one)
    assert same(vit(images(vit)), plain)


def test_neurons_are_refused_and_other_weights_warned_of(make):
    vit = built("timm siglip")
    fix = make(vit)
    with pytest.raises(ValueError, match="no neurons"):
        type(fix)(**vars(fix) | {"neurons": RegisterNeurons.of({0: [1]})})
    other = twin(vit)
    with torch.no_grad():
        for linear in other.anatomy.down_projections(other.model):
            linear.weight.neg_()
    with pytest.warns(FixWarning, match="other weights"), fix.applied_to(other):
        pass


def test_every_fix_that_can_be_saved_says_what_it_does_not_cure():
    for module, name in _CLASSES.values():
        kind = getattr(import_module(module), name)
        assert kind.does_not_cure.endswith(".")
        assert kind.does_not_cure[0].islower()  # it follows "does not cure "


# -- placebos --------------------------------------------------------------------------------------


@torch.no_grad()
def test_its_placebo_does_as_much_where_nothing_is_wrong(make):
    vit = built("timm siglip")
    fix = make(vit)
    controls = controls_of(fix, vit, seed=1)
    placebo = controls.fixes["placebo"]
    assert list(controls.fixes) == ["inert token", "placebo"]
    assert fix.placebo(vit, 1) == placebo != fix.placebo(vit, 2)
    plain = residuals(vit, images(vit, 3))
    with fix.applied_to(vit):
        fixed = residuals(vit, images(vit, 3))
    with placebo.applied_to(vit):
        found = residuals(vit, images(vit, 3))
    layer = {"positions": 0, "inpainting": 1, "projection": 2}[fix.type]
    changed, own = ((x[layer] - plain[layer]).norm(dim=-1) > 1e-2 for x in (found, fixed))
    if fix.type == "positions":
        assert not set(placebo.patches) & set(fix.patches)
        assert len(placebo.patches) == len(fix.patches)
    elif fix.type == "inpainting":
        assert not (changed & own).any()
        assert (
            changed.sum(1).tolist()
            == torch.minimum(own.sum(1), (~own[:, vit.layout.patch_slice]).sum(1)).tolist()
        )
    else:
        assert placebo.basis.shape == fix.basis.shape
        assert changed.all()


def test_a_fix_is_compared_with_its_placebo():
    """In-painting removes outliers (all but those of photos that are nothing else), its placebo none."""
    vit = CATALOG["timm siglip"].backbone()
    photos = [crops(vit, 96, 0)]
    phantom = vitreg.plant(vit, photos, 1, rate=0.05).vit
    fix = Inpainting.calibrate(phantom, photos)
    controls = {control.name: control for control in vitreg.verify(phantom, fix, photos).controls}
    assert (
        controls["placebo"].measures["outliers"].value > 0.9 * controls["unfixed"].measures["outliers"].value
    )
    assert controls["placebo"].outliers_more.low > 0
    assert controls["fix"].measures["outliers"].value < 0.5 * controls["unfixed"].measures["outliers"].value
