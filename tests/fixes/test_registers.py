"""Every option of test-time registers does what it says, and planted artifacts go away."""

from contextlib import contextmanager

import pytest
import torch
from catalog import CATALOG, built, images
from looking import activations, close, different, removing, residuals
from phantoms import crops
from slow_registers import reference
from torch import Tensor

import vitreg
from vitreg.diagnosis.diagnosing import diagnose
from vitreg.fixes import TestTimeRegisters
from vitreg.fixes.neurons import RegisterNeuron, RegisterNeurons
from vitreg.search.register_neurons import find_register_neurons

NAME = "timm dinov2 registers"  # CLS and 4 trained registers in front of the patches
VIT = built(NAME)
START = VIT.layout.patch_slice.start
BATCH = images(VIT, 3)


def edited(fix: TestTimeRegisters, layer: int = 0, vit: vitreg.Backbone = VIT) -> tuple[Tensor, Tensor]:
    """Activations (b, n, f) before and after the edit, in one block of the fixed model."""
    with fix.applied_to(vit):
        return activations(vit, layer, images(vit, 3))


def without_effect(vit: vitreg.Backbone = VIT) -> Tensor:
    """Activations (b, n, f) in block 0 of a model with one register and no neurons."""
    return edited(TestTimeRegisters({}), vit=vit)[0]


def entering(fix: TestTimeRegisters, vit: vitreg.Backbone = VIT, layer: int = 0) -> Tensor:
    """The stream (b, n, d) inside a block, registers included: what its first norm receives."""
    seen: list[Tensor] = []
    block = vit.anatomy.block_modules(vit.model)[layer]
    norm = next(module for module in block.modules() if "Norm" in type(module).__name__)
    hook = norm.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    with removing([hook]), fix.applied_to(vit), torch.no_grad():
        vit(images(vit, 3))
    return seen[-1]


# -- how many, and which gets what -----------------------------------------------------------------


@pytest.mark.parametrize("count", range(5))
def test_each_register_gets_the_peak_of_every_neuron(count):
    before, after = edited(TestTimeRegisters({0: [3, 7]}, registers=count))
    assert before.shape[1] == VIT.layout.tokens + count
    for neuron in (3, 7):
        assert torch.equal(
            after[:, START : START + count, neuron],
            before[..., neuron].amax(1, keepdim=True).expand(3, count),
        )
        assert not after[:, :START, neuron].any()
        assert not after[:, START + count :, neuron].any()


def test_neurons_are_dealt_out_through_all_layers():
    fix = TestTimeRegisters({0: [3, 7, 9], 1: [5, 2]}, registers=2, share="split")
    for layer, owners in ((0, {3: 0, 7: 1, 9: 0}), (1, {5: 1, 2: 0})):
        before, after = edited(fix, layer)
        for neuron, owner in owners.items():
            assert torch.equal(after[:, START + owner, neuron], before[..., neuron].amax(1))
            assert not after[:, START + 1 - owner, neuron].any()


# -- what they hold when they enter ----------------------------------------------------------------


def test_registers_are_zero_at_first():
    stream = entering(TestTimeRegisters({0: [3]}, registers=2))
    assert not stream[:, START : START + 2].any()


def test_registers_may_start_as_the_mean_patch():
    stream = entering(TestTimeRegisters({0: [3]}, registers=2, initial="mean"))
    expected = stream[:, START + 2 :].mean(1)
    assert torch.equal(stream[:, START], expected)
    assert torch.equal(stream[:, START + 1], expected)


def test_registers_may_start_at_random():
    """Of the patches' own scale, each another, and the same in every run."""
    fix = TestTimeRegisters({0: [3]}, registers=4, initial="random")
    stream = entering(fix)
    registers, patches = stream[:, START : START + 4], stream[:, START + 4 :]
    for register, image in zip(registers, patches, strict=True):
        assert float(register.std() / image.std()) == pytest.approx(1, abs=0.2)
        assert len({tuple(row.tolist()) for row in register}) == 4
    assert torch.equal(entering(fix), stream)


@pytest.mark.parametrize("name", ["timm clip", "hf clip", "open_clip vit"])
def test_registers_may_start_as_what_the_norm_before_the_blocks_makes_of_zero(name):
    vit = built(name)
    norm = {
        "timm clip": lambda model: model.norm_pre,
        "hf clip": lambda model: model.pre_layrnorm,
        "open_clip vit": lambda model: model.ln_pre,
    }[name](vit.model)
    stream = entering(TestTimeRegisters({0: [3]}, initial="prenorm"), vit)
    assert norm.bias.any()
    assert torch.equal(stream[:, 1], norm.bias.detach().expand(3, -1))


def test_registers_start_at_zero_where_no_norm_comes_before_the_blocks():
    stream = entering(TestTimeRegisters({0: [3]}, initial="prenorm"))
    assert not stream[:, START].any()


def test_the_norm_is_found_in_a_model_that_was_compiled_in_place():
    vit = CATALOG["timm clip"].backbone()
    expected = vit.model.norm_pre.bias.detach()
    vit.model.compile(backend="eager")
    with torch.no_grad():
        vit(images(vit, 1))  # what is compiled now runs past hooks that are added later
    edit = TestTimeRegisters({0: [3]}, initial="prenorm").edits(vit)[0]
    assert torch.equal(edit.value[0], expected)


# -- where they enter ------------------------------------------------------------------------------


def test_registers_enter_before_the_block_that_is_asked_for():
    fix = TestTimeRegisters({1: [3]}, registers=2, entry=1)
    tokens = VIT.layout.tokens
    assert [entering(fix, layer=layer).shape[1] for layer in range(3)] == [tokens, tokens + 2, tokens + 2]
    assert not entering(fix, layer=1)[:, START : START + 2].any()
    assert entering(fix, layer=2)[:, START : START + 2].any()
    with fix.applied_to(VIT):
        found = residuals(VIT, BATCH)
    plain = residuals(VIT, BATCH)
    assert torch.equal(found[0], plain[0])
    assert different(found[1], plain[1])


# -- what is moved ---------------------------------------------------------------------------------


def test_the_peak_may_be_the_largest_absolute_activation():
    vit = built("timm dinov2 swiglu")  # whose activations may be far below zero
    values = without_effect(vit)
    lowest, highest = values.amin(1), values.amax(1)
    neuron = int((lowest.abs() > highest).all(0).nonzero()[0])
    for peak, expected in (("signed", highest), ("absolute", lowest)):
        _, after = edited(TestTimeRegisters({0: [neuron]}, peak=peak), vit=vit)
        assert torch.equal(after[:, 1, neuron], expected[:, neuron])


def test_the_peak_may_be_taken_over_patches_only():
    values = without_effect()
    everywhere, patches = values.amax(1), values[:, START + 1 :].amax(1)
    neuron = int((everywhere > patches).all(0).nonzero()[0])
    for over, expected in (("tokens", everywhere), ("patches", patches)):
        _, after = edited(TestTimeRegisters({0: [neuron]}, peak_over=over))
        assert torch.equal(after[:, START, neuron], expected[:, neuron])


def test_registers_of_a_fix_that_was_applied_later_are_no_patches():
    later = TestTimeRegisters({}, registers=2, initial="random")
    with TestTimeRegisters({}, registers=1).applied_to(VIT), later.applied_to(VIT):
        values, _ = activations(VIT, 0, BATCH)
    added, patches = values[:, START + 1 : START + 3].amax(1), values[:, START + 3 :].amax(1)
    neuron = int((added > patches).any(0).nonzero()[0])
    with TestTimeRegisters({0: [neuron]}, peak_over="patches").applied_to(VIT), later.applied_to(VIT):
        _, after = activations(VIT, 0, BATCH)
    assert torch.equal(after[:, START, neuron], patches[:, neuron])


@pytest.mark.parametrize("scale", [0.0, 0.5, -2.0])
def test_what_is_moved_may_be_scaled(scale):
    before, after = edited(TestTimeRegisters({0: [3]}, scale=scale))
    assert torch.equal(after[:, START, 3], before[..., 3].amax(1) * scale)


# -- what stays behind -----------------------------------------------------------------------------


def known(values: Tensor, *neurons: int) -> RegisterNeurons:
    """These neurons, as if a search had found outliers at half of their peak."""
    return RegisterNeurons(
        tuple(
            RegisterNeuron(0, i, at_outliers=float(values[..., i].max()) / 2, elsewhere=0.01 * (i + 1))
            for i in neurons
        )
    )


def test_the_mean_of_normal_tokens_may_stay_behind():
    values = without_effect()
    _, after = edited(TestTimeRegisters(known(values, 3, 7), left="mean"))
    for neuron in (3, 7):
        others = torch.cat([after[:, :START, neuron], after[:, START + 1 :, neuron]], 1)
        assert torch.equal(others, torch.full_like(others, 0.01 * (neuron + 1)))
        assert torch.equal(after[:, START, neuron], values[..., neuron].amax(1))


def test_what_is_not_an_outliers_may_stay_where_it_is():
    values, neurons = without_effect(), known(without_effect(), 3, 7)
    _, after = edited(TestTimeRegisters(neurons, left="own"))
    moved = 0
    for neuron in neurons.chosen:
        for image, token in torch.cartesian_prod(torch.arange(3), torch.arange(values.shape[1])).tolist():
            if token == START:
                continue
            own = float(values[image, token, neuron.index])
            far = abs(own - neuron.elsewhere) >= abs(neuron.at_outliers - neuron.elsewhere) / 2
            moved += far
            expected = neuron.elsewhere if far else own
            assert float(after[image, token, neuron.index]) == pytest.approx(expected, abs=1e-7)
    assert 0 < moved < 6 * (values.shape[1] - 1)


def test_the_prefix_may_keep_its_activations():
    before, after = edited(TestTimeRegisters({0: [3, 7]}, keep_prefix=True))
    assert torch.equal(after[:, :START], before[:, :START])
    assert torch.equal(after[:, START, [3, 7]], before[..., [3, 7]].amax(1))
    assert not after[:, START + 1 :, [3, 7]].any()


# -- masks that come with the images ---------------------------------------------------------------


def test_registers_ignore_what_padding_masks_hide():
    """SigLIP 2 packs images of any shape, padded; an image's result does not depend on its padding."""
    vit = built("hf siglip2")
    patches = torch.rand(2, 8, 192) * 2 - 1
    shapes = torch.tensor([[2, 4], [2, 4]])

    def run(padding: int) -> Tensor:
        pixels = torch.cat([patches, torch.rand(2, padding, 192)], 1)
        mask = torch.cat([torch.ones(2, 8), torch.zeros(2, padding)], 1).long()
        with torch.no_grad():
            output = vit.model(pixel_values=pixels, pixel_attention_mask=mask, spatial_shapes=shapes)
        return output.last_hidden_state[:, :8]

    plain = run(5)
    with TestTimeRegisters({}, registers=2).applied_to(vit):
        close(run(5), run(0))
        one = run(5)
        assert different(one, plain)
        with TestTimeRegisters({}, registers=1, entry=1).applied_to(vit):
            close(run(5), run(0))
            assert different(run(0), one)


def test_biases_are_resampled_for_a_larger_image_as_ever():
    """Their table grows from 7x7 to 9x9 cells: by as much as there are registers."""
    vit = vitreg.wrap(built("hf beit").model, image_size=40)
    fix = TestTimeRegisters({0: [3], 1: [5]}, registers=2)
    with fix.applied_to(vit):
        found = residuals(vit, images(vit, 3))
    close(found, reference(vit, fix))


# -- what is handed out ----------------------------------------------------------------------------


def test_registers_are_handed_out_without_the_memory_of_the_pass():
    handle = TestTimeRegisters({0: [3]}, registers=2).apply(VIT)
    assert handle.carried is None
    VIT(BATCH)
    registers = handle.carried
    handle.undo()
    assert registers.shape == (3, 2, VIT.anatomy.width)
    assert registers.any()
    assert not registers.requires_grad
    assert registers.untyped_storage().nbytes() == registers.numel() * registers.element_size()


# -- what is refused -------------------------------------------------------------------------------


@contextmanager
def refused(*words: str):
    with pytest.raises(ValueError, match=r"[Ee]xpected|needs") as caught:
        yield
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"registers": -1}, ["registers=-1", "0 or more"]),
        ({"entry": -1}, ["entry=-1", "0 or more"]),
        ({"entry": 2}, ["entry=2", "at most 1", "there or before"]),
        ({"scale": float("nan")}, ["scale=nan", "finite"]),
        ({"share": "shared"}, ["share='shared'", "copy, split"]),
        ({"initial": "one"}, ["initial='one'", "zero, mean, random, prenorm"]),
        ({"peak": "max"}, ["peak='max'", "signed, absolute"]),
        ({"peak_over": "all"}, ["peak_over='all'", "tokens, patches"]),
        ({"left": "nothing"}, ["left='nothing'", "zero, mean, own"]),
        ({"share": "split", "registers": 4}, ["found 3 neurons", "at most 3 registers", "share='copy'"]),
        ({"left": "mean"}, ["left='mean'", "without this evidence", "left='zero'"]),
        ({"left": "own"}, ["left='own'", "find_register_neurons"]),
    ],
)
def test_wrong_options_are_refused_with_what_to_do(options, words):
    with refused(*words):
        TestTimeRegisters({1: [3, 4], 2: [5]}, **options)


def test_the_mean_needs_less_evidence_than_the_rest():
    neurons = RegisterNeurons((RegisterNeuron(0, 3, elsewhere=0.1),))
    TestTimeRegisters(neurons, left="mean")
    with refused("left='own'"):
        TestTimeRegisters(neurons, left="own")


def test_what_needs_no_neurons_is_allowed():
    TestTimeRegisters({}, registers=4, share="split", entry=2, left="own")


# -- planted artifacts -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["timm vit", "hf dinov2", "timm dinov3", "timm beit", "open_clip vit"])
def test_planted_artifacts_are_found_and_cured(name):
    vit = built(name)
    photos = crops(vit, 96, 0)
    phantom = vitreg.plant(vit, photos, 1)
    report = diagnose(phantom.vit, [photos])
    neurons = find_register_neurons(phantom.vit, [photos], report)
    assert set(neurons.by_layer[1]) <= set(phantom.neurons)
    marked = phantom.marked(photos)

    def norms(of: vitreg.Backbone) -> Tensor:
        with torch.no_grad(), vitreg.trace(of) as t:
            of(photos)
        return t.layout.as_grid(t.norms[1][:, t.layout.patch_slice])

    with TestTimeRegisters({}, registers=3).applied_to(phantom.vit):  # which make no difference to the search
        again = find_register_neurons(phantom.vit, [photos], diagnose(phantom.vit, [photos]), top_k=4)
    assert set(again.by_layer[1]) == set(
        find_register_neurons(phantom.vit, [photos], report, top_k=4).by_layer[1]
    )
    sick, usual = norms(phantom.vit), norms(vit)
    with TestTimeRegisters({1: phantom.neurons}).applied_to(phantom.vit):
        cured = norms(phantom.vit)
        assert torch.equal(phantom.marked(photos), marked)  # the ground truth is that of the phantom
        assert diagnose(phantom.vit, [photos]).verdict == "no artifacts"
    assert sick[marked].median() > 10 * usual.median()
    assert cured.max() < 2 * usual.max()
    assert float(cured[marked].median() / usual[marked].median()) == pytest.approx(1, abs=0.3)
