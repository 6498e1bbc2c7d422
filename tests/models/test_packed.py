"""Models that pack the images of a batch into one row: read, fixed, and refused where none can be told.

The references are ordinary hooks on the models' own layers, and blocks that are called by hand.
"""

import copy
import pickle
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from catalog import images
from looking import close, different, removing, same, tensors
from packed_models import PACKED, WIDTH, packed, run_rows
from phantoms import crops
from softmaxes import Softmaxes
from torch import Tensor, nn

import vitreg
from vitreg.errors import UnsupportedModelError
from vitreg.fixes import AttentionBias, TestTimeRegisters
from vitreg.hooks.rows import current
from vitreg.hooks.torch_internals import forget_output_hooks
from vitreg.models.probe import first_tensor

NEURONS = {0: [3, 7], 1: [11, 5]}
FIX = TestTimeRegisters(NEURONS, registers=2)
EVERYTHING: dict[str, Any] = {"residuals": True, "neurons": True, "attention": "full", "qkv": True}
RECORDED = ("norms", "residuals", "neurons", "attention", "q", "k", "v")


@pytest.fixture(params=PACKED)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def vit(name: str) -> vitreg.Backbone:
    return packed(name)


def by_image(row: Tensor, count: int, places: Tensor) -> Tensor:
    """(b, p, c) of a row (b*p, c) or (1, b*p, c)."""
    return row.reshape(count, len(places), row.shape[-1])[:, places]


def own_rows(name: str, vit: vitreg.Backbone, batch: Tensor) -> list[Tensor]:
    """(b, h, p, p) of each block, from its own softmax over images, windows or the whole row."""
    tower, places = PACKED[name], PACKED[name].places(vit.layout.grid)
    model = copy.deepcopy(vit.model)
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")
    for block in vit.anatomy.block_modules(model):
        if name == "our rows":
            block.attn.forward = partial(one_by_one, block.attn)
    parts: list[list[Tensor]] = []
    blocks = vit.anatomy.block_modules(model)
    with Softmaxes() as softmaxes, torch.no_grad():
        hooks = [b.register_forward_pre_hook(lambda *_: softmaxes.results.clear()) for b in blocks]
        hooks += [b.register_forward_hook(lambda *_: parts.append(list(softmaxes.results))) for b in blocks]
        with removing(hooks):
            vit.with_model(model, "step by step")(batch)
    assert [len(maps) > len(batch) for maps in parts] == [
        len(tower.lengths(vit.layout.grid, layer)) > 1 and name != "our tiles" for layer in range(len(parts))
    ]
    return [blocks_of_row(maps, len(batch), places) for maps in parts]


def one_by_one(attention: nn.Module, x: Tensor, bounds: Tensor) -> Tensor:
    q, k, v = attention.qkv(x).unflatten(-1, (3, 4, -1)).unbind(1)
    each = zip(*(y.transpose(0, 1).split(bounds.diff().tolist(), 1) for y in (q, k, v)), strict=True)
    return attention.proj(torch.cat([attention.step_by_step(*part) for part in each]).flatten(1))


def blocks_of_row(maps: list[Tensor], count: int, places: Tensor) -> Tensor:
    """Maps (..., h, w, w) that lie along the diagonal of a row, as (b, h, p, p)."""
    maps = [x.reshape(-1, *x.shape[-2:]) for x in maps]
    row = torch.stack([torch.block_diag(*heads) for heads in zip(*maps, strict=True)])
    n = len(places)
    each = [row[:, i * n : (i + 1) * n, i * n : (i + 1) * n] for i in range(count)]
    assert torch.allclose(sum(x.sum() for x in each), row.sum())  # nothing between images
    return torch.stack(each)[:, :, places][..., places]


# -- reading --------------------------------------------------------------------------------------


def test_the_parts_are_found(name: str, vit: vitreg.Backbone) -> None:
    a, layout = vit.anatomy, vit.layout
    assert (layout.prefix, layout.registers, layout.grid) == (0, 0, (6, 10))
    assert (a.depth, a.width, a.heads, a.neurons) == (3, WIDTH, 4, PACKED[name].neurons)
    assert a.patch_size == (8, 8)
    assert a.no_registers == ""


@pytest.mark.parametrize("size", [(48, 80), (80, 32)])
def test_norms_and_neurons_are_those_of_hooks(name: str, vit: vitreg.Backbone, size: tuple[int, int]) -> None:
    """By image and in row-major order, at the size of the probe and at another."""
    batch = torch.rand(3, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    places = PACKED[name].places((size[0] // 8, size[1] // 8))
    left: list[Tensor] = []
    entered: list[Tensor] = []
    blocks, downs = vit.anatomy.block_modules(vit.model), vit.anatomy.down_projections(vit.model)
    hooks = [b.register_forward_hook(lambda m, a, y: left.append(first_tensor(y).clone())) for b in blocks]
    hooks += [d.register_forward_pre_hook(lambda m, a: entered.append(a[0].clone())) for d in downs]
    with removing(hooks), torch.no_grad(), vitreg.trace(vit, **EVERYTHING) as t:
        vit(batch)
    residuals = torch.stack([by_image(x, 3, places) for x in left])
    assert torch.equal(t.residuals, residuals)
    assert torch.equal(t.norms, residuals.norm(dim=-1))
    assert torch.equal(t.neurons, torch.stack([by_image(x, 3, places) for x in entered]))


def test_attention_rows_are_those_of_the_models_own_softmax(name: str, vit: vitreg.Backbone) -> None:
    batch = images(vit, 3)
    with (
        torch.no_grad(),
        vitreg.trace(vit, attention="full") as t,
        vitreg.trace(vit, attention=[7, 30]) as few,
    ):
        vit(batch)
    expected = torch.stack(own_rows(name, vit, batch))
    close(t.attention, expected)
    close(few.attention, expected[..., [7, 30], :])
    for layer, rows in enumerate(t.attention):
        together = PACKED[name].together(vit.layout.grid, layer)
        assert bool((rows[..., ~together] == 0).all())
        assert bool((rows[..., together] > 0).all())


def test_a_patch_of_the_image_is_the_patch_of_the_map(name: str, vit: vitreg.Backbone) -> None:
    both = images(vit, 1).repeat(2, 1, 1, 1)
    both[1, :, 8:16, 56:64] *= -1  # row 1, column 7
    entering: list[Tensor] = []
    block = vit.anatomy.block_modules(vit.model)[0]
    hook = block.register_forward_pre_hook(
        lambda m, args, kwargs: entering.append(vit.anatomy.stream.of_call(args, kwargs)), with_kwargs=True
    )
    with removing([hook]), torch.no_grad():
        vit(both)
    moved = (entering[0][0] - entering[0][1]).norm(dim=-1)
    assert int(moved.argmax()) == 1 * 10 + 7
    assert int((moved > 1e-5).sum()) == 1


@pytest.mark.parametrize("fix", [None, FIX, TestTimeRegisters(NEURONS, registers=0)])
def test_images_do_not_depend_on_their_batch_mates(vit: vitreg.Backbone, fix: Any) -> None:
    batch = images(vit, 3)
    handle = fix.apply(vit) if fix else None
    try:
        with torch.no_grad(), vitreg.trace(vit, **EVERYTHING) as together:
            vit(batch)
        for i in range(3):
            with torch.no_grad(), vitreg.trace(vit, **EVERYTHING) as alone:
                vit(batch[i : i + 1])
            for recorded in RECORDED:
                close(getattr(alone, recorded)[:, 0], getattr(together, recorded)[:, i])
    finally:
        if handle:
            handle.undo()


def test_the_output_is_bit_identical_while_it_is_traced(vit: vitreg.Backbone) -> None:
    untraced = vit(images(vit))
    with vitreg.trace(vit, **EVERYTHING):
        assert same(vit(images(vit)), untraced)


# -- fixes ----------------------------------------------------------------------------------------


class _Done(Exception):  # noqa: N818 - no error
    pass


def by_hand(name: str, vit: vitreg.Backbone, batch: Tensor, fix: TestTimeRegisters) -> Tensor:
    """(l, b, p, d): each image by itself, through blocks that are called with registers in front of it."""
    return torch.cat([_one_by_hand(name, vit, image[None], fix) for image in batch], 1)


def _one_by_hand(name: str, vit: vitreg.Backbone, image: Tensor, fix: TestTimeRegisters) -> Tensor:
    calls: list[tuple[Any, Any]] = []
    blocks, downs = vit.anatomy.block_modules(vit.model), vit.anatomy.down_projections(vit.model)
    hooks = [
        b.register_forward_pre_hook(lambda m, a, k: calls.append((a, k)), with_kwargs=True) for b in blocks
    ]
    with removing(hooks), torch.no_grad():
        vit(image)
    hooks = [d.register_forward_pre_hook(partial(_moved, fix, i)) for i, d in enumerate(downs)]
    r, grid = fix.registers, vit.layout.grid
    stream: Tensor = calls[0][0][0] if calls[0][0] else calls[0][1]["hidden_states"]
    stream = torch.cat([stream.new_zeros(*stream.shape[:-2], r, WIDTH), stream], -2)
    left = []
    with removing(hooks), torch.no_grad():
        for layer, (block, (args, kwargs)) in enumerate(zip(blocks, calls, strict=True)):
            lengths = PACKED[name].lengths(grid, layer)
            lengths = [lengths[0] + r] if len(lengths) == 1 else [r, *lengths] if r else lengths
            beside = [_with_registers(x, r, lengths) for x in args[1:]]
            named = {
                key: _with_registers(x, r, lengths) for key, x in kwargs.items() if key != "hidden_states"
            }
            stream = first_tensor(block(stream, *beside, **named))
            left.append(by_image(stream[..., r:, :], 1, PACKED[name].places(grid)))
    return torch.stack(left)


def _with_registers(value: Any, r: int, lengths: list[int]) -> Any:
    """Of bounds, rotary tables and masks for one image, those for the image with registers in front."""
    if isinstance(value, tuple):
        return tuple(
            torch.cat([torch.full((r, x.shape[1]), float(i == 0)), x]) for i, x in enumerate(value)
        )  # cosines and sines
    if not isinstance(value, Tensor):
        return value
    if value.dim() == 1:
        return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=value.dtype)
    part = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    see = part[:, None] == part
    if value.dtype == torch.bool:
        return see
    return torch.zeros(1, 1, len(part), len(part)).masked_fill(~see, torch.finfo(value.dtype).min)


def _moved(fix: TestTimeRegisters, layer: int, down: nn.Module, args: Any) -> Any:
    activation = args[0].clone()
    tokens = activation.reshape(-1, activation.shape[-1])
    for neuron in fix.neurons.by_layer.get(layer, []):
        peak = max(float(x) for x in tokens[:, neuron])
        for t in range(len(tokens)):
            tokens[t, neuron] = peak if t < fix.registers else 0.0
    return (activation,)


@pytest.mark.parametrize("registers", [0, 1, 2])
def test_registers_are_those_of_the_reference(name: str, vit: vitreg.Backbone, registers: int) -> None:
    fix, batch = TestTimeRegisters(NEURONS, registers=registers), images(vit, 3)
    with torch.no_grad():
        with vitreg.trace(vit, residuals=True) as plain:
            vit(batch)
        before = plain.residuals
        with fix.applied_to(vit), vitreg.trace(vit, residuals=True) as t:
            vit(batch)
    close(t.residuals, by_hand(name, vit, batch, fix))
    assert different(t.residuals, before)


def test_undo_is_bit_exact(vit: vitreg.Backbone) -> None:
    plain, keys = vit(images(vit)), list(vit.model.state_dict())
    handle = FIX.apply(vit)
    fixed = vit(images(vit))
    assert [x.shape for x in tensors(fixed)] == [x.shape for x in tensors(plain)]
    assert different(fixed, plain)
    assert list(vit.model.state_dict()) == keys
    handle.undo()
    assert same(vit(images(vit)), plain)


def test_two_fixes_stack(name: str, vit: vitreg.Backbone) -> None:
    """Registers of one stand behind those of the other."""
    batch, inert = images(vit, 2), TestTimeRegisters({}, registers=1)
    both = TestTimeRegisters(NEURONS, registers=2, initial="zero")
    with torch.no_grad(), inert.applied_to(vit), both.applied_to(vit), vitreg.trace(vit, residuals=True) as t:
        vit(batch)
        assert t.residuals.shape == (3, 2, 60, WIDTH)
        together = t.residuals
        vit(batch[:1])
        close(t.residuals, together[:, :1])


def test_the_model_as_others_call_it_is_fixed_too(name: str, tmp_path: Path) -> None:
    """A saved fix on the bare tower, run as its language model runs it."""
    vit = PACKED[name].backbone()
    with FIX.applied_to(vit):
        expected = vit(images(vit))
    FIX.save(tmp_path / "fix", vit=vit)
    if name == "our rows":
        pytest.skip("a bare model does not say how it is run")
    bare = PACKED[name].module()
    handle = vitreg.load_fix(tmp_path / "fix").apply(bare)
    assert same(_run_as_others(name, bare, images(vit)), expected)
    handle.undo()


def _run_as_others(name: str, model: nn.Module, batch: Tensor) -> Any:
    if name in ("pixtral", "our tiles"):
        return model(batch)
    if name == "our rows":
        return run_rows(model, batch)
    b, _, h, w = batch.shape
    cells = batch.reshape(b, 3, h // 16, 2, 8, w // 16, 2, 8).permute(0, 2, 5, 3, 6, 1, 4, 7)
    two = cells.unsqueeze(6).repeat(1, 1, 1, 1, 1, 1, 2, 1, 1)
    return model(two.reshape(-1, 3 * 2 * 64), grid_thw=torch.tensor([[1, h // 8, w // 8]] * b))


def test_attention_that_the_model_returns_keeps_its_shape() -> None:
    vit = PACKED["pixtral"].backbone()
    vit.model.set_attn_implementation("eager")
    plain = vit.model(images(vit, 3), output_attentions=True).attentions
    with FIX.applied_to(vit):
        fixed = vit.model(images(vit, 3), output_attentions=True).attentions
    assert [x.shape for x in fixed] == [x.shape for x in plain] == [(1, 4, 180, 180)] * 3
    apart = torch.block_diag(*[torch.ones(60, 60)] * 3) == 0
    assert bool((fixed[2][..., apart] == 0).all())
    assert bool((fixed[2].sum(-1) < 1).all())  # the rest goes to the registers


def test_copies_and_pickles_are_models_of_their_own(name: str) -> None:
    vit = PACKED[name].backbone()
    plain = vit(images(vit))
    with FIX.applied_to(vit):
        fixed = vit(images(vit))
        twin = copy.deepcopy(vit.model)
        kept = pickle.loads(pickle.dumps(vit.model))
    assert same(vit(images(vit)), plain)
    for other in (twin, kept):
        assert same(_run_as_others(name, other, images(vit)), fixed)
    clean = vit.with_model(PACKED[name].module(), "another")
    assert same(clean(images(vit)), plain)
    with vitreg.trace(clean, **EVERYTHING) as t:
        clean(images(vit))
    assert t.norms.shape == (3, 2, 60)


def test_no_pass_is_known_beyond_its_end() -> None:
    """Not after one that fails, nor in a copy that shows its outputs to nobody."""
    vit = PACKED["pixtral"].backbone()
    twin = copy.deepcopy(vit.model)
    forget_output_hooks(twin)
    twin(images(vit))
    assert current() is None
    failing = vit.anatomy.block_modules(vit.model)[1].register_forward_hook(lambda *_: 1 / 0)
    with removing([failing]), pytest.raises(ZeroDivisionError):
        vit(images(vit))
    assert current() is None


def test_an_attention_bias_is_one_more_key_for_every_image(vit: vitreg.Backbone) -> None:
    batch = images(vit, 3)
    fix = AttentionBias.calibrate(vit, [batch], vitreg.RegisterNeurons.of(NEURONS))
    with fix.applied_to(vit), torch.no_grad():
        with vitreg.trace(vit, residuals=True) as together:
            vit(batch)
        with vitreg.trace(vit, residuals=True) as alone:
            vit(batch[2:])
    close(alone.residuals[:, 0], together.residuals[:, 2])


@pytest.mark.parametrize("name", ["pixtral", "our tiles"])
def test_views_of_shifted_images_are_passes_within_a_pass(name: str) -> None:
    vit, batch = PACKED[name].backbone(), images(packed(name), 2)
    with vitreg.ShiftAverage().applied_to(vit), torch.no_grad():
        with vitreg.trace(vit, residuals=True) as together:
            vit(batch)
        with vitreg.trace(vit, residuals=True) as alone:
            vit(batch[1:])
    close(alone.residuals[:, 0], together.residuals[:, 1])
    with vitreg.trace(vit, residuals=True) as plain:
        vit(batch)
    assert different(plain.residuals[2], together.residuals[2])


# -- planted artifacts ----------------------------------------------------------------------------


def with_biases(vit: vitreg.Backbone) -> vitreg.Backbone:
    """Planting needs a bias of 0 in the place of none."""
    for block in vit.anatomy.block_modules(vit.model):
        for module in block.modules():
            if isinstance(module, nn.Linear) and module.bias is None:
                module.bias = nn.Parameter(torch.zeros(module.out_features))
    return vit


BY_DAY = ("qwen2.5-vl", "glm-4v")
EVERY = [x if x in BY_DAY else pytest.param(x, marks=pytest.mark.nightly) for x in PACKED]


@pytest.mark.parametrize("name", EVERY)
def test_planted_artifacts_are_found_and_removed(name: str) -> None:
    vit = with_biases(PACKED[name].backbone())
    photos = crops(vit, 48, 0)
    phantom = vitreg.plant(vit, photos, 1, rate=0.03, norm=15)
    report = vitreg.diagnose(phantom.vit, [photos])
    assert report.has_artifacts
    assert report.onset_layer == 1
    assert torch.equal(report.outliers(phantom.vit, photos), phantom.marked(photos))
    neurons = vitreg.find_register_neurons(phantom.vit, [photos], report)
    assert neurons.by_layer.keys() == {1}
    assert set(neurons.by_layer[1]) == set(phantom.neurons)
    with TestTimeRegisters(neurons).applied_to(phantom.vit):
        assert not vitreg.diagnose(phantom.vit, [photos]).has_artifacts


@pytest.mark.slow
def test_a_fix_is_found_and_verified() -> None:
    vit = PACKED["qwen2.5-vl"].backbone()
    photos = crops(vit, 24, 0)
    phantom = vitreg.plant(vit, photos, 1, rate=0.03, norm=15)
    cure = vitreg.find_fix(phantom.vit, [photos])
    assert isinstance(cure.fix, TestTimeRegisters)
    assert cure.fix.neurons.by_layer.keys() == {1}
    assert set(cure.fix.neurons.by_layer[1]) <= set(phantom.neurons)  # no more than are needed
    assert cure.verdict["outliers"].before.value > 0.02
    assert cure.verdict["outliers"].after.value == 0


# -- what cannot be told --------------------------------------------------------------------------


GRIDS = {
    "of several sizes": ([[1, 4, 6], [1, 6, 4]], "images of 2 patch grids in one batch"),
    "video": ([[2, 4, 6]], "several frames for one image: video is not supported"),
}


@pytest.mark.parametrize("what", GRIDS)
@pytest.mark.parametrize("way", ["trace", "fix"])
def test_rows_that_are_no_batch_of_images_are_refused(what: str, way: str) -> None:
    """Only while somebody watches or a fix is applied: the model itself takes them as ever."""
    (grids, reason), tower = GRIDS[what], PACKED["qwen2.5-vl"]
    vit, plain = tower.backbone(), tower.module()
    patches = torch.rand(48, 3 * 2 * 64)
    given = {"hidden_states": patches, "grid_thw": torch.tensor(grids)}
    assert same(vit.model(**given), plain(**given))
    watching = vitreg.trace(vit) if way == "trace" else FIX.applied_to(vit)
    with watching, pytest.raises(UnsupportedModelError, match=reason):
        vit.model(**given)
    assert same(vit.model(**given), plain(**given))


def test_padded_images_are_refused() -> None:
    vit = PACKED["pixtral"].backbone()
    sizes = torch.tensor([[32, 40], [48, 80]])
    with vitreg.trace(vit), pytest.raises(UnsupportedModelError, match="found images"):
        vit.model(images(vit), image_sizes=sizes)
    with vitreg.trace(vit), pytest.raises(UnsupportedModelError, match="a row of 80 tokens"):
        vit.model(images(vit), image_sizes=[(32, 40), (48, 80)])


def test_the_doctor_says_how_the_images_lie() -> None:
    page = " ".join(vitreg.doctor(PACKED["qwen2-vl"].backbone()).full().split())
    assert "(b*n, d): a block is given it as argument 'hidden_states'" in page
    assert "packs its images into one row of tokens, in which copies have no place" in page


def test_token_splitting_is_refused() -> None:
    vit = PACKED["qwen2-vl"].backbone()
    neuron = replace(vitreg.RegisterNeurons.of({0: [3]}).chosen[0], threshold=1.0)
    with pytest.raises(UnsupportedModelError, match="packs its images into one row"):
        vitreg.TokenSplitting(vitreg.RegisterNeurons((neuron,))).apply(vit)
