"""Trainable registers in a model one already has: a parameter like any other, and nothing else changes."""

import copy
import io
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from catalog import CATALOG, built, images, timm_model
from looking import close, different, footprint, residuals, same
from other_ways_to_run import checkpointed, compiled, gradients, saved_and_loaded, training, twin
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

import vitreg
from vitreg.errors import FixError
from vitreg.fixes import TestTimeRegisters, TokenSplitting
from vitreg.fixes.added_registers import NAME, add_registers, has_added_registers, remove_registers
from vitreg.fixes.neurons import RegisterNeuron, RegisterNeurons

# Plain, distilled, another library's, rotary, with a positional bias, nn.MultiheadAttention.
MARKS = RegisterNeuron(1, 3, threshold=0.1)
FEW = ["timm vit", "timm deit distilled", "hf dinov2", "timm dinov3", "timm beit", "open_clip vit"]


@pytest.fixture(params=FEW)
def vit(request: pytest.FixtureRequest) -> vitreg.Backbone:
    """A model of the test's own."""
    return twin(built(request.param))


def wide(vit: vitreg.Backbone, n: int = 2) -> Tensor:
    return torch.randn(n, vit.anatomy.width)


def with_registers(name: str = "timm vit", n: int = 2) -> tuple[vitreg.Backbone, nn.Parameter]:
    vit = twin(built(name))
    return vit, add_registers(vit, n, initial=wide(vit, n))


# -- what they are ---------------------------------------------------------------------------------


def test_they_are_a_parameter_of_the_model(vit):
    before = [name for name, _ in vit.model.named_parameters()]
    parameter = add_registers(vit.model, 3)
    assert isinstance(parameter, nn.Parameter)
    assert parameter.shape == (3, vit.anatomy.width)
    assert [name for name, _ in vit.model.named_parameters() if name not in before] == [NAME]
    assert dict(vit.model.named_parameters())[NAME] is parameter
    assert vit.model.state_dict()[NAME].data_ptr() == parameter.data_ptr()


def test_they_start_small_or_as_given():
    vit = built("timm vit")
    assert float(add_registers(twin(vit), 64).detach().std()) == pytest.approx(0.02, rel=0.1)
    assert float(add_registers(twin(vit), 64, initial=0.5).detach().std()) == pytest.approx(0.5, rel=0.1)
    given = wide(vit)
    parameter = add_registers(twin(vit), 2, initial=given)
    assert torch.equal(parameter, given)
    assert parameter.data_ptr() != given.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_they_have_the_type_of_the_models_weights(dtype):
    vit = twin(built("timm vit"))
    vit.model.to(dtype)
    assert add_registers(vit.model, 2).dtype == dtype


# -- what they do ----------------------------------------------------------------------------------


def test_they_are_timms_own_registers():
    """The same outputs and gradients as a model that was built with `reg_tokens`, given the same weights."""
    own = CATALOG["timm dinov2 registers"].module()
    model = timm_model("vit_small_patch14_dinov2", no_embed_class=True)().eval()
    weights = own.state_dict()
    registers = weights.pop("reg_token")[0]
    model.load_state_dict(weights)
    parameter = add_registers(model, 4, initial=registers)
    batch = torch.rand(3, 3, 32, 40)
    kept = [0, *range(5, 25)]
    close(model.forward_features(batch), own.forward_features(batch)[:, kept], 1e-6)
    close(
        model.forward_intermediates(batch, return_prefix_tokens=False)[1],
        own.forward_intermediates(batch, return_prefix_tokens=False)[1],
        1e-6,
    )
    for each in (model, own):
        each(batch).square().sum().backward()
    close(parameter.grad, own.reg_token.grad[0], 1e-5)
    assert float(parameter.grad.norm()) > 1e-3


def test_they_enter_as_test_time_registers_do(vit):
    given = wide(vit)
    fix = TestTimeRegisters({}, 2, initial="given", tensors={"initial": given})
    with fix.applied_to(vit):
        expected = residuals(vit, images(vit))
    add_registers(vit, 2, initial=given)
    assert same(residuals(vit, images(vit)), expected)


def test_gradients_reach_them_through_all_blocks(vit):
    """Against finite differences, in float64."""
    vit.model.double()
    parameter = add_registers(vit, 2, initial=wide(vit))
    batch, along = images(vit).double(), torch.randn_like(parameter)

    def loss() -> Tensor:
        return residuals_with_gradients(vit, batch).square().mean()

    loss().backward()
    with torch.no_grad():
        start = parameter.clone()
        above, below = [(parameter.copy_(start + step * along), loss())[1] for step in (1e-6, -1e-6)]
    slope = float(above - below) / 2e-6
    assert float((parameter.grad * along).sum()) == pytest.approx(slope, rel=1e-4)


def residuals_with_gradients(vit: vitreg.Backbone, batch: Tensor) -> Tensor:
    """(b, n, d) after the last block."""
    seen: list[Tensor] = []
    last = vit.anatomy.block_modules(vit.model)[-1]
    hook = last.register_forward_hook(
        lambda module, args, output: seen.append(output if isinstance(output, Tensor) else output[0])
    )
    vit(batch)
    hook.remove()
    return seen[0]


def test_gradient_checkpointing_gives_the_same_gradients(vit):
    add_registers(vit, 2, initial=wide(vit))
    with training(vit):
        plain = gradients(vit)
        with checkpointed(vit):
            close(gradients(vit), plain)


@pytest.mark.parametrize("name", ["timm vit", "hf dinov2"])
def test_the_librarys_own_checkpointing(name):
    vit, parameter = with_registers(name)
    found = []
    for _ in range(2):
        vit.model.train()
        residuals_with_gradients(vit, images(vit)).square().mean().backward()
        found.append(parameter.grad.clone())
        vit.model.zero_grad()
        if hasattr(vit.model, "set_grad_checkpointing"):
            vit.model.set_grad_checkpointing()
        else:
            vit.model.activation_checkpointing_enable()
    close(found[1], found[0])
    assert found[0].any()


def test_training_in_bfloat16(vit):
    parameter = add_registers(vit, 2, initial=wide(vit))
    exact, found = [], []
    for grads, enabled in ((exact, False), (found, True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = residuals_with_gradients(vit, images(vit)).float().square().mean()
        loss.backward()
        grads.append(parameter.grad.clone())
        vit.model.zero_grad()
    assert found[0].dtype == torch.float32
    assert (found[0] - exact[0]).norm() < 0.2 * exact[0].norm()


def test_an_optimizer_trains_them():
    vit, parameter = with_registers()
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    losses = []
    for _ in range(8):
        loss = residuals_with_gradients(vit, images(vit)).square().mean()
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm vit", "hf dinov2"])
def test_they_can_be_compiled(name):
    vit, parameter = with_registers(name)
    with torch.no_grad():
        expected = vit(images(vit))
    with compiled(vit, backend="eager") as run:
        close(run(images(vit)), expected)
        parameter.zero_()
        assert different(run(images(vit)), expected)
        close(run(images(vit)), vit(images(vit)))
        remove_registers(vit)
        close(run(images(vit)), built(name)(images(vit)))


@pytest.mark.slow
def test_gradients_of_a_compiled_model():
    vit, parameter = with_registers()
    vit.model(images(vit)).square().mean().backward()
    expected, parameter.grad = parameter.grad, None
    with compiled(vit, backend="aot_eager") as run, torch.enable_grad():
        run(images(vit)).square().mean().backward()
    close(parameter.grad, expected)


# -- processes -------------------------------------------------------------------------------------


@pytest.fixture
def one_process():
    """A group of processes with one member."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_their_gradients_are_averaged_over_processes():
    vit, parameter = with_registers()
    model, averaged = DistributedDataParallel(vit.model), []

    def hook(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        averaged.extend(bucket.parameters())
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    model.register_comm_hook(None, hook)
    model(images(vit, 4)).square().mean().backward()
    assert any(each is parameter for each in averaged)
    found, parameter.grad = parameter.grad, None
    vit.model(images(vit, 4)).square().mean().backward()
    close(found, parameter.grad)


# -- copies and weights ----------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded])
def test_a_copy_has_registers_of_its_own(copied):
    vit, parameter = with_registers()
    other = vit.with_model(copied(vit.model), "copy")
    with torch.no_grad():
        expected = vit(images(vit))
        assert same(other(images(vit)), expected)
        parameter.zero_()
        assert same(other(images(vit)), expected)
        other.model.added_registers.copy_(parameter)
        assert same(other(images(vit)), vit(images(vit)))
    remove_registers(other)
    assert has_added_registers(vit.model)


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_loads_back(vit, assign):
    original = copy.deepcopy(vit.model)
    add_registers(vit, 2, initial=wide(vit))
    file = io.BytesIO()
    torch.save(vit.model.state_dict(), file)
    file.seek(0)
    other = vit.with_model(original, "again")
    for parameter in other.model.parameters():
        parameter.data.zero_()
    add_registers(other, 2)
    other(images(vit))
    assert (
        str(other.model.load_state_dict(torch.load(file), assign=assign)) == "<All keys matched successfully>"
    )
    with torch.no_grad():
        assert same(other(images(vit)), vit(images(vit)))


def test_registers_of_a_function_of_the_weights():
    vit, parameter = with_registers()
    with torch.no_grad():
        plain = vit(images(vit))
        changed = functional_call(vit.model, {NAME: parameter * 2}, images(vit))
        assert same(vit(images(vit)), plain)
        parameter.mul_(2)
        assert same(vit(images(vit)), changed)
        assert different(changed, plain)


# -- removing --------------------------------------------------------------------------------------


def test_removing_them_brings_back_the_model(vit):
    before, anatomy = footprint(vit.model), [type(module) for module in vit.model.modules()]
    with torch.no_grad():
        plain = vit(images(vit))
        given = wide(vit)
        add_registers(vit, 2, initial=given)
        assert different(residuals(vit, images(vit)), residuals(twin_without(vit), images(vit)))
        assert has_added_registers(vit.model)
        assert torch.equal(remove_registers(vit.model), given)
        assert same(vit(images(vit)), plain)
    assert footprint(vit.model) == before
    assert [type(module) for module in vit.model.modules()] == anatomy
    assert not has_added_registers(vit.model)
    add_registers(vit, 1)


def twin_without(vit: vitreg.Backbone) -> vitreg.Backbone:
    other = twin(vit)
    remove_registers(other)
    return other


# -- vitreg on such a model ------------------------------------------------------------------------


def test_such_a_model_is_wrapped_as_what_it_is(vit):
    """Also where there are as many of them as CLS tokens, with which they must not be confused."""
    for n in (1, 2):
        add_registers(vit, n)
        assert vitreg.wrap(vit.model, image_size=vit.image_size).anatomy == vit.anatomy
        remove_registers(vit)


@torch.no_grad()
def test_a_trace_sees_them_inside_the_blocks(vit):
    add_registers(vit, 2, initial=wide(vit))
    layout = vit.layout
    with (
        vitreg.trace(vit, attention="full") as whole,
        vitreg.trace(vit, attention="cls") as cls,
        vitreg.trace(vit, attention="registers") as registers,
    ):
        vit(images(vit))
    assert whole.norms.shape[2] == layout.tokens
    assert whole.inner == vitreg.TokenLayout(layout.prefix, layout.registers + 2, layout.grid)
    close(cls.attention, whole.attention[..., :1, :])
    close(registers.attention, whole.attention[..., whole.inner.register_slice, :])


def test_a_diagnosis_reads_the_patches(vit):
    add_registers(vit, 2, initial=wide(vit))
    batch = images(vit, 4)
    report = vitreg.diagnose(vit, [batch])
    norms = residuals(vit, batch)[:, :, vit.layout.patch_slice].norm(dim=-1)
    close(report.statistics.largest.float(), norms.amax((1, 2)))


def test_fixes_stack_on_them(vit):
    plain = twin(vit)
    given = wide(vit)
    first = TestTimeRegisters({}, 2, initial="given", tensors={"initial": given})
    add_registers(vit, 2, initial=given)
    alone = residuals(vit, images(vit))
    later = [TestTimeRegisters({1: [3]})]
    if not vit.anatomy.masked:
        later.append(TokenSplitting(RegisterNeurons((MARKS,)), capacity=0.5))
    for second in later:
        with first.applied_to(plain), second.applied_to(plain):
            expected = residuals(plain, images(vit))
        with second.applied_to(vit):
            found = residuals(vit, images(vit))
        assert same(found, expected)
        assert different(found, alone)
    assert same(residuals(vit, images(vit)), alone)


@torch.no_grad()
def test_artifacts_of_the_real_vit_are_seen_beside_registers(shared):
    vit = vitreg.load(str(shared / "models/vit_tiny_patch16_224.augreg_in21k_ft_in1k"))
    photos = vitreg.read_images(shared / "data/imagenette/val/n01440764", vit, limit=8)
    plain = vitreg.diagnose(vit, photos)
    add_registers(vit, 4)
    report = vitreg.diagnose(vit, photos)
    assert (report.verdict, report.onset_layer) == ("artifacts", plain.onset_layer)
    assert report.outlier_fraction == pytest.approx(plain.outlier_fraction, rel=0.1)
    batch = next(iter(photos)).pixels
    with vitreg.trace(vit, attention="registers", layers=[11]) as t:
        vit(batch)
    assert t.attention.shape == (1, len(batch), 3, 4, 201)
    remove_registers(vit)
    assert vitreg.diagnose(vit, photos).outlier_fraction == plain.outlier_fraction


# -- what is refused -------------------------------------------------------------------------------


def refused(kind: type[Exception], message: str) -> Any:
    return pytest.raises(kind, match=message)


def test_what_cannot_be_added_is_refused_with_what_to_do():
    vit = twin(built("timm vit"))
    before = footprint(vit.model)
    for n in (0, -1):
        with refused(ValueError, f"n={n}: expected 1 or more registers"):
            add_registers(vit, n)
    with refused(ValueError, re.escape("of shape (3, 32): expected (2, 32), (n, width)")):
        add_registers(vit, 2, initial=torch.zeros(3, 32))
    with (
        TestTimeRegisters({}, 1).applied_to(vit),
        refused(FixError, "'registers' is applied .* Undo it first"),
    ):
        add_registers(vit, 2)
    with refused(FixError, "no added registers in this VisionTransformer"):
        remove_registers(vit)
    vit.model.added_registers = nn.Parameter(torch.zeros(2, 32))
    with refused(FixError, "has a 'added_registers' of its own"):
        add_registers(vit, 2)
    del vit.model.added_registers
    assert footprint(vit.model) == before
    with refused(vitreg.UnsupportedModelError, "found no stack of transformer blocks"):
        add_registers(nn.Linear(3, 3), 2)


def test_what_is_there_is_not_added_or_removed_beneath_a_fix():
    vit, parameter = with_registers()
    with refused(FixError, "has added registers already: remove_registers"):
        add_registers(vit, 2)
    with TestTimeRegisters({}, 1).applied_to(vit), refused(FixError, "Undo it first"):
        remove_registers(vit)
    assert vit.model.added_registers is parameter
