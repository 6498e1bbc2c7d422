"""Features combined over shifted views: against the views made by hand, on every supported model."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier

import pytest
import torch
from catalog import CATALOG, images, timm_entry
from looking import footprint, same, tensors

import vitreg
from vitreg.errors import FixError
from vitreg.fixes import applied
from vitreg.fixes.attention_bias import AttentionBias
from vitreg.fixes.neurons import RegisterNeurons
from vitreg.fixes.registers import TestTimeRegisters
from vitreg.fixes.shift_average import ShiftAverage, _Seen

SOME = ["timm vit", "timm dinov3", "timm hybrid", "hf dinov2 backbone", "hf clip", "open_clip vit"]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
FIX = ShiftAverage(views=3)


def residuals(vit: vitreg.Backbone, batch: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), vitreg.trace(vit, norms=False, residuals=True) as t:
        vit(batch)
    return t.residuals


def by_hand(vit: vitreg.Backbone, batch: torch.Tensor, fix: ShiftAverage) -> torch.Tensor:
    """(v, b, p, d): the image's patches after the last block, and those of each view, gathered one by one."""
    layout, (height, width) = vit.layout, vit.anatomy.patch_size
    rows, columns = layout.grid
    found = [residuals(vit, batch)[-1][:, layout.patch_slice]]
    for down, right, flipped in fix.shifts():
        view = batch.roll((down * height, right * width), (2, 3))
        seen = residuals(vit, view.flip(3) if flipped else view)[-1]
        mine = []
        for row in range(rows):
            for column in range(columns):
                r, c = (row + down) % rows, (column + right) % columns
                mine.append(seen[:, layout.patch(r, columns - 1 - c if flipped else c)])
        found.append(torch.stack(mine, 1))
    return torch.stack(found)


@pytest.fixture(params=SOME)
def vit(request: pytest.FixtureRequest) -> vitreg.Backbone:
    return CATALOG[request.param].backbone()


@pytest.mark.parametrize("name", [name for name in CATALOG if name != "hf siglip2"])
def test_patches_are_the_median_over_views_and_nothing_else_changes(name):
    vit = CATALOG[name].backbone()
    batch, layout = images(vit, 2), vit.layout
    before, output, left = residuals(vit, batch), vit(batch), footprint(vit.model)
    with FIX.applied_to(vit):
        fixed, found = residuals(vit, batch), vit(batch)
        alone = residuals(vit, batch[1:])
    expected = torch.quantile(by_hand(vit, batch, FIX), 0.5, dim=0)
    torch.testing.assert_close(fixed[-1][:, layout.patch_slice], expected, **CLOSE)
    special = slice(0, layout.patch_slice.start)
    torch.testing.assert_close(fixed[-1][:, special], before[-1][:, special], **CLOSE)
    torch.testing.assert_close(fixed[:-1], before[:-1], **CLOSE)
    torch.testing.assert_close(alone, fixed[:, 1:], **CLOSE)
    assert type(found) is type(output)
    assert [x.shape for x in tensors(found)] == [x.shape for x in tensors(output)]
    assert same(residuals(vit, batch), before)
    assert footprint(vit.model) == left


@pytest.mark.parametrize(
    "change", [{"reduce": "mean"}, {"flip": False}, {"reach": 1, "views": 4}, {"seed": 1}]
)
def test_options(change):
    vit = CATALOG["timm vit"].backbone()
    batch, fix = images(vit, 2), replace(FIX, **change)
    views = by_hand(vit, batch, fix)
    expected = views.mean(0) if fix.reduce == "mean" else torch.quantile(views, 0.5, dim=0)
    with fix.applied_to(vit):
        found = residuals(vit, batch)[-1][:, vit.layout.patch_slice]
    with FIX.applied_to(vit):
        usual = residuals(vit, batch)[-1][:, vit.layout.patch_slice]
    torch.testing.assert_close(found, expected, **CLOSE)
    assert not torch.allclose(found, usual, **CLOSE)


def test_shifts_are_all_different_and_the_seed_orders_them():
    every = ShiftAverage(views=24, reach=2).shifts()
    assert len({shift[:2] for shift in every}) == 24
    assert (0, 0) not in {shift[:2] for shift in every}
    assert sum(flipped for *_, flipped in every) == 12
    assert ShiftAverage(seed=1).shifts() != ShiftAverage().shifts() == ShiftAverage().shifts()
    for views in (0, 25):
        with pytest.raises(ValueError, match="expected 1 to 24"):
            ShiftAverage(views=views)


@pytest.mark.parametrize("reduce", ["mean", "median"])
def test_with_every_shift_of_the_grid_features_move_with_the_content(reduce):
    """On 3x3 patches, 8 views and the image are all shifts there are: positions no longer matter at all."""
    vit = timm_entry("vit_small_patch16_224", size=(24, 24)).backbone()
    image = images(vit, 1)
    fix = ShiftAverage(reach=1, reduce=reduce, flip=False)

    def grid(batch: torch.Tensor) -> torch.Tensor:
        return residuals(vit, batch)[-1][:, 1:].unflatten(1, (3, 3))

    with fix.applied_to(vit):
        torch.testing.assert_close(
            grid(image.roll((8, 16), (2, 3))), grid(image).roll((1, 2), (1, 2)), **CLOSE
        )
    assert not torch.allclose(grid(image.roll((8, 16), (2, 3))), grid(image).roll((1, 2), (1, 2)), atol=0.1)


def test_other_ways_to_run_the_model_see_the_combined_patches():
    vit = CATALOG["timm vit"].backbone()
    batch = images(vit, 2)
    last = residuals(vit, batch)[-1]
    with FIX.applied_to(vit), torch.no_grad():
        expected = residuals(vit, batch)[-1]
        assert same(vit.model.forward_features(batch), vit.model.norm(expected))
        *_, seen = vit.model.forward_intermediates(
            batch, norm=False, output_fmt="NLC", intermediates_only=True
        )
        assert same(seen, expected[:, 1:])
    assert not torch.allclose(expected[:, 1:], last[:, 1:], **CLOSE)
    hf = CATALOG["hf dinov2"].backbone()
    plain = hf.model(images(hf), output_hidden_states=True).hidden_states
    with FIX.applied_to(hf):
        states = hf.model(images(hf), output_hidden_states=True).hidden_states
    assert len(states) == len(plain) == hf.anatomy.depth + 1
    assert all(map(torch.equal, states[:-1], plain[:-1]))
    assert torch.equal(states[-1][:, :1], plain[-1][:, :1])
    assert not torch.equal(states[-1], plain[-1])


def test_watchers_and_hooks_see_the_image_alone(vit):
    batch = images(vit, 2)
    calls = []
    block = vit.anatomy.block_modules(vit.model)[0]
    early = block.register_forward_hook(lambda module, args, output: calls.append("early"))
    with FIX.applied_to(vit):
        calls.clear()
        late = block.register_forward_hook(lambda module, args, output: calls.append("late"))
        vit(batch)
        assert calls == ["early", "late"]
        late.remove()
        assert vitreg.diagnose(vit, [batch]).images == 2
    early.remove()


@pytest.mark.parametrize("name", ["timm vit", "timm dinov3", "hf clip", "open_clip vit"])
def test_copies_run_their_own_weights_and_pickles_give_the_same_answer(name):
    vit = CATALOG[name].backbone()
    batch, patches = images(vit, 2), vit.layout.patch_slice
    with FIX.applied_to(vit):
        expected = residuals(vit, batch)
        twin = vit.with_model(pickle.loads(pickle.dumps(vit.model)), "pickled")
        assert same(residuals(twin, batch), expected)
        copied = vit.with_model(copy.deepcopy(vit.model), "copied")
        with torch.no_grad():
            for weight in copied.model.parameters():
                weight.mul_(1.1)
        changed = residuals(copied, batch)
        assert same(residuals(vit, batch), expected)
    applied(copied.model)[0].undo()
    by_its_own = torch.quantile(by_hand(copied, batch, FIX), 0.5, dim=0)
    torch.testing.assert_close(changed[-1][:, patches], by_its_own, rtol=1e-4, atol=1e-4)


def test_weights_and_dtype_changed_after_applying_reach_the_views():
    vit = CATALOG["timm dinov3"].backbone()  # with rotary tables in its buffers
    batch = images(vit, 2)
    with FIX.applied_to(vit):
        vit.model.double()
        fixed = residuals(vit, batch)[-1][:, vit.layout.patch_slice]
        assert fixed.dtype == torch.float64
    torch.testing.assert_close(fixed, torch.quantile(by_hand(vit, batch, FIX), 0.5, dim=0))


def test_threads_get_answers_of_their_own(monkeypatch):
    """Even where each has run a view when the other takes what it left."""
    vit = CATALOG["timm vit"].backbone()
    batches = [images(vit, 1, seed=seed) for seed in range(2)]
    barrier, take = Barrier(2, timeout=60), _Seen.take

    def run(batch: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return vit.model.forward_features(batch)

    def together(seen: _Seen) -> torch.Tensor:
        barrier.wait()
        return take(seen)

    with FIX.applied_to(vit):
        expected = list(map(run, batches))
        monkeypatch.setattr(_Seen, "take", together)
        with ThreadPoolExecutor(2) as pool:
            assert all(map(torch.equal, pool.map(run, batches), expected))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm vit", "open_clip vit"])
def test_compiled_before_and_after(name):
    vit = CATALOG[name].backbone()
    batch = images(vit, 2)
    early = torch.compile(vit.model, fullgraph=True, backend="eager")
    with torch.no_grad():
        plain = dense(early(batch))
        with FIX.applied_to(vit):
            eager = dense(vit.model(batch))
            for compiled in (early, torch.compile(vit.model, fullgraph=True, backend="eager")):
                torch.testing.assert_close(dense(compiled(batch)), eager, **CLOSE)
        torch.testing.assert_close(dense(early(batch)), plain, **CLOSE)


def dense(output):
    return tensors(output)[0]


def test_a_backward_pass_with_gradient_checkpointing():
    vit = CATALOG["timm siglip"].backbone()
    batch = images(vit, 2)

    def gradients() -> list[torch.Tensor]:
        vit.model.zero_grad()
        vit(batch).square().sum().backward()
        return [weight.grad.clone() for weight in vit.model.parameters() if weight.grad is not None]

    unfixed = gradients()
    with FIX.applied_to(vit):
        expected = gradients()
        vit.model.set_grad_checkpointing()
        found = gradients()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    assert not all(map(torch.equal, expected, unfixed))


def test_no_state_is_left_after_an_exception():
    vit = CATALOG["timm vit"].backbone()
    batch = images(vit, 2)
    with FIX.applied_to(vit):
        expected = residuals(vit, batch)

        def fail(module, args):
            raise RuntimeError("in the middle")

        hook = vit.model.blocks[1].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            vit(images(vit, 3, seed=1))
        hook.remove()
        assert same(residuals(vit, batch), expected)


@pytest.mark.parametrize("first", ["registers", "bias"])
def test_on_top_of_another_fix_the_views_have_it_too(first):
    vit = CATALOG["timm vit"].backbone()
    batch, neurons = images(vit, 2), RegisterNeurons.of({0: [1, 5], 1: [3]})
    other = (
        TestTimeRegisters(neurons) if first == "registers" else AttentionBias.calibrate(vit, [batch], neurons)
    )
    with other.applied_to(vit):
        expected = torch.quantile(by_hand(vit, batch, FIX), 0.5, dim=0)
        with FIX.applied_to(vit):
            found = residuals(vit, batch)[-1][:, vit.layout.patch_slice]
    torch.testing.assert_close(found, expected, **CLOSE)


def test_what_is_refused():
    patches = CATALOG["hf siglip2"].backbone()
    with pytest.raises(vitreg.UnsupportedModelError, match="given patches"):
        FIX.apply(patches)
    vit = CATALOG["timm vit"].backbone()
    handle = FIX.apply(vit)
    with pytest.raises(FixError, match="already applied"):
        FIX.apply(vit)
    replica = vit.model.patch_embed.proj._replicate_for_data_parallel()
    with pytest.raises(vitreg.UnsupportedModelError, match="DataParallel"):
        replica(images(vit))
    handle.undo()
    with pytest.raises(FixError, match="undone before"):
        handle.undo()


# -- the real model --------------------------------------------------------------------------------


def test_vit_ti_by_median_and_by_mean(shared):
    """The median removes the corner artifacts at no cost to predictions; the mean smears them."""
    vit = vitreg.load(str(shared / "models/vit_tiny_patch16_224.augreg_in21k_ft_in1k"))
    photos = next(iter(vitreg.read_images(shared / "data/imagenet-sample-1000", vit, limit=8))).pixels
    outliers, scores = {}, {}
    for name, fix in (
        ("none", TestTimeRegisters(RegisterNeurons.of({}), registers=0)),
        ("median", ShiftAverage()),
        ("mean", ShiftAverage(reduce="mean")),
    ):
        with torch.no_grad(), fix.applied_to(vit), vitreg.trace(vit, layers=[11]) as t:
            scores[name] = vit(photos)
        outliers[name] = int((t.norms[0][:, 1:] > 60).sum())
    assert outliers["median"] == 0
    assert outliers["mean"] > 2 * outliers["none"] >= 4 * 2 * len(photos) * 0.9
    assert torch.equal(scores["median"], scores["none"])
