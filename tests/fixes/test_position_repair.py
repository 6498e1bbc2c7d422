"""Outlying position embeddings: found by what the table does, and repaired as if the table were."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from catalog import CATALOG, images
from looking import removing, same, tensors
from phantoms import crops, massive_vector
from torch import Tensor, nn

import vitreg
from vitreg.errors import FixError, UnsupportedModelError
from vitreg.fixes import PositionRepair
from vitreg.fixes.position_repair import outlying_rows, repaired_rows
from vitreg.models.positions import added_positions, position_parameter

# Where each keeps its table, and how many of its rows are those of a prefix. A norm follows CLIP's and PE's,
# and one comes before AIMv2's.
TABLES = {
    "timm vit": ("pos_embed", 1),
    "timm siglip": ("pos_embed", 0),
    "timm eva02": ("pos_embed", 1),
    "timm clip": ("pos_embed", 1),
    "timm pe core": ("pos_embed", 1),
    "timm hybrid": ("pos_embed", 1),
    "hf aimv2": ("embeddings.position_embedding.weight", 0),
    "open_clip vit": ("positional_embedding", 1),
    "torchvision vit": ("encoder.pos_embedding", 1),
}
WITHOUT = ["timm dinov3", "timm beit", "timm relpos", "timm rope mixed", "hf dinov3", "hf data2vec"]
SEEDS = range(3)


def rows_of(vit: vitreg.Backbone, name: str) -> Tensor:
    """The table's rows for patches, a view of the model's own."""
    path, prefix = TABLES[name]
    weight = vit.model.get_parameter(path).data
    return weight.view(-1, weight.shape[-1])[prefix:]


@contextmanager
def planted(rows: Tensor, kind: str, count: int, seed: int) -> Iterator[Tensor]:
    """Some rows 15 times as long, or with a vector of that length added; gives their numbers."""
    generator = torch.Generator().manual_seed(seed)
    before, length = rows.clone(), rows.norm(dim=1).median()
    chosen = torch.randperm(len(rows), generator=generator)[:count].sort().values
    if kind == "scaled":
        rows[chosen] *= 15
    else:
        rows[chosen] += 15 * length * massive_vector(rows.shape[1], generator)
    try:
        yield chosen
    finally:
        rows.copy_(before)


def patches(vit: vitreg.Backbone, batch: Tensor) -> Tensor:
    """After the last block."""
    last = [vit.anatomy.depth - 1]
    with torch.no_grad(), vitreg.trace(vit, norms=False, residuals=True, layers=last) as t:
        vit(batch)
    return t.residuals[0][:, vit.layout.patch_slice]


@pytest.mark.parametrize("name", TABLES)
def test_the_table_is_found_by_what_it_does(name):
    vit = CATALOG[name].backbone()
    torch.testing.assert_close(added_positions(vit).table, rows_of(vit, name), atol=1e-5, rtol=1e-5)


def test_a_table_that_is_added_in_place_is_found_too():
    vit = CATALOG["timm naflexvit"].backbone()
    assert added_positions(vit).table.shape == (20, 32)


@pytest.mark.parametrize("name", TABLES)
def test_the_weights_that_hold_it_are_found_and_which_rows_are_read(name):
    vit = CATALOG[name].backbone()
    path, prefix = TABLES[name]
    weights = vit.model.get_parameter(path)
    weights.requires_grad_(False)
    table, reads = position_parameter(vit, [0, 7])
    assert table is weights
    assert not weights.requires_grad
    expected = torch.zeros(2, weights.numel() // weights.shape[-1])
    expected[[0, 1], [prefix, prefix + 7]] = 1
    torch.testing.assert_close(reads, expected, atol=1e-4, rtol=1e-4)


def test_positions_that_are_computed_are_held_by_no_weights():
    vit = CATALOG["timm siglip"].backbone()
    table = vit.model.pos_embed.detach()
    del vit.model.pos_embed
    vit.model.pos_embed = table
    assert added_positions(vit).table.shape == (20, 32)
    with pytest.raises(UnsupportedModelError, match="computes the positions"):
        position_parameter(vit, [0])


@pytest.mark.parametrize("name", WITHOUT)
def test_a_model_without_a_table_is_refused_with_the_reason(name):
    with pytest.raises(UnsupportedModelError, match="adds no table of positions"):
        PositionRepair.calibrate(CATALOG[name].backbone())


def test_no_row_stands_out_in_an_unplanted_table():
    for name in TABLES:
        for seed in SEEDS:
            with pytest.raises(FixError, match=r"no position stands out: the longest embedding is 1\.\dx"):
                PositionRepair.calibrate(CATALOG[name].backbone(seed))


@pytest.mark.parametrize("kind", ["scaled", "massive"])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", TABLES)
def test_the_unplanted_models_features_come_back(name, seed, kind):
    vit = CATALOG[name].backbone(seed)
    photos = crops(vit, 16, seed)
    clean = patches(vit, photos)
    with planted(rows_of(vit, name), kind, 1, seed) as chosen:
        broken = patches(vit, photos)
        fix = PositionRepair.calibrate(vit)
        with fix.applied_to(vit):
            fixed = patches(vit, photos)
    likeness, without = (F.cosine_similarity(x, clean, dim=-1) for x in (fixed, broken))
    others = [i for i in range(vit.layout.patches) if i not in chosen]
    assert list(fix.patches) == chosen.tolist()
    assert likeness[:, chosen].mean() >= 0.95 > without[:, chosen].mean()
    assert likeness[:, others].median() >= 0.999
    assert likeness[:, others].mean() > without[:, others].mean()


@pytest.mark.parametrize("name", TABLES)
def test_it_is_a_repaired_table(name):
    """Every output is that of the model whose table holds the repaired rows."""
    vit = CATALOG[name].backbone()
    batch = images(vit, 3)
    with planted(rows_of(vit, name), "massive", 2, 0) as chosen, torch.no_grad():
        broken = vit(batch)
        fix = PositionRepair.calibrate(vit)
        with fix.applied_to(vit):
            found, alone = tensors(vit(batch)), tensors(vit(batch[1:2]))
            state = copy.deepcopy(vit.model.state_dict())
        assert same(vit(batch), broken)
        assert all(map(torch.equal, state.values(), vit.model.state_dict().values()))
        rows_of(vit, name)[chosen] = fix.after
        expected = tensors(vit(batch))
    for each, one, other in zip(found, alone, expected, strict=True):
        torch.testing.assert_close(each, other, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one, other[1:2], rtol=1e-4, atol=1e-4)
    assert any(not torch.allclose(x, y, atol=1e-2) for x, y in zip(found, tensors(broken), strict=True))


def test_hidden_states_before_the_blocks_are_repaired_too():
    vit = CATALOG["hf dinov2 registers"].backbone()
    fix = PositionRepair.calibrate(vit, patches=[7])
    with torch.no_grad():
        plain = vit.model(images(vit), output_hidden_states=True).hidden_states[0]
        with fix.applied_to(vit):
            fixed = vit.model(images(vit), output_hidden_states=True).hidden_states[0]
    change = (fixed - plain).abs().amax((0, 2)).nonzero().flatten()
    assert change.tolist() == [vit.layout.patch_slice.start + 7]
    torch.testing.assert_close(
        (fixed - plain)[0, vit.layout.patch_slice.start + 7], (fix.after - fix.before)[0]
    )


# -- which rows, and what of them ------------------------------------------------------------------


def smooth_table(grid: tuple[int, int], width: int, seed: int = 0) -> Tensor:
    """Rows that change little from one place to the next, as trained ones do."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, width, 4, 4, generator=generator)
    fine = 0.1 * torch.randn(width, *grid, generator=generator)
    return (F.interpolate(coarse, grid, mode="bicubic")[0] + fine).flatten(1).T.contiguous()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("smooth", [True, False])
def test_what_is_kept_of_a_row_is_what_can_be_told_from_the_excess(smooth, seed):
    grid = (8, 10)
    generator = torch.Generator().manual_seed(seed)
    table = smooth_table(grid, 64, seed) if smooth else torch.randn(80, 64, generator=generator)
    clean = table.clone()
    for kind in ("scaled", "massive"):
        with planted(table, kind, 3, seed) as chosen:
            outlying = outlying_rows(table)
            assert outlying.nonzero().flatten().tolist() == chosen.tolist()
            repaired = repaired_rows(table, outlying, grid)
        error = (repaired - clean[chosen]).norm(dim=1) / clean[chosen].norm(dim=1)
        assert error.max() < 0.5
    dense = torch.zeros(80, dtype=torch.bool)
    dense[44] = True
    table[44] += 15 * table.norm(dim=1).median() * F.normalize(torch.randn(64, generator=generator), dim=0)
    if smooth:  # nothing of it can be told from a vector in all dimensions: the mean of the 4 around
        torch.testing.assert_close(repaired_rows(table, dense, grid)[0], clean[[34, 54, 43, 45]].mean(0))


def test_rows_of_the_callers_choice():
    vit = CATALOG["timm siglip"].backbone()
    fix = PositionRepair.calibrate(vit, patches=(7, 3, 7))
    assert fix.patches == (3, 7)
    for wrong in ([], [20], [-1], range(20)):
        with pytest.raises(ValueError, match="expected one or more of 0 to 19, but not all"):
            PositionRepair.calibrate(vit, patches=wrong)


# -- what it fits ----------------------------------------------------------------------------------


def test_another_size_is_refused_with_the_reason_and_a_fix_of_that_size_works():
    own = CATALOG["hf dinov2"].backbone()
    larger = vitreg.wrap(own.model, image_size=(48, 40))
    fix, other = (PositionRepair.calibrate(vit, patches=[4]) for vit in (own, larger))
    assert (fix.grid, other.grid) == ((4, 5), (6, 5))
    assert PositionRepair.calibrate(own, [images(larger)], patches=[4]) == other
    with pytest.raises(FixError, match="grid of 4x5 patches, and found 6x5"):
        fix.apply(larger)
    with torch.no_grad():
        plain = larger(images(larger))
        with other.applied_to(larger):
            assert not same(larger(images(larger)), plain)
            with pytest.raises(FixError, match="grid of 6x5 patches, and found patch embeddings of shape"):
                own(images(own))


def test_other_weights_and_a_second_repair_are_refused():
    vit, other = CATALOG["timm vit"].backbone(), CATALOG["timm vit"].backbone()
    rows_of(vit, "timm vit")[5] *= 15
    fix = PositionRepair.calibrate(vit)
    with pytest.raises(FixError, match="not those that it was made for"):
        fix.apply(other)
    with fix.applied_to(vit), pytest.raises(FixError, match="repaired already"):
        PositionRepair.calibrate(vit)
    with pytest.raises(ValueError, match="one row before and after"):
        PositionRepair(fix.neurons, (4, 5), (5, 6), fix.before, fix.after)


def test_half_precision_adds_the_same_correction():
    vit = CATALOG["timm siglip"].backbone()
    rows_of(vit, "timm siglip")[5] *= 15
    exact = PositionRepair.calibrate(vit)
    with exact.applied_to(vit):
        expected = patches(vit, images(vit))
    vit.model.bfloat16()
    fix = PositionRepair.calibrate(vit)
    assert fix.patches == exact.patches
    for each in (fix, exact):
        with each.applied_to(vit):
            likeness = F.cosine_similarity(patches(vit, images(vit).bfloat16()).float(), expected, dim=-1)
        assert likeness.mean() > 0.99


class Mixed(nn.Module):
    """A ViT whose patches are normalised without a module, before and after positions are added."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.patch_embed, self.blocks, self.pos_embed = vit.patch_embed.proj, vit.blocks, vit.pos_embed

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(self.patch_embed(x).flatten(2).mT, (32,)) + self.pos_embed
        return self.blocks(F.layer_norm(x, (32,)))


def test_positions_that_are_mixed_with_the_patches_are_refused():
    vit = vitreg.wrap(Mixed(CATALOG["timm siglip"].module()), image_size=(32, 40))
    with pytest.raises(UnsupportedModelError, match="mixed with the patches"):
        added_positions(vit)


@pytest.mark.parametrize("kind", ["scaled", "massive"])
@pytest.mark.parametrize("model", ["vit_tiny_patch16_224.augreg_in21k_ft_in1k", "deit_tiny_patch16_224"])
def test_a_real_models_features_come_back(shared, model, kind):
    vit = vitreg.load(str(shared / "models" / model))
    photos = next(iter(vitreg.read_images(shared / "data/imagenet-sample-1000", vit, limit=4))).pixels
    clean = patches(vit, photos)
    assert not outlying_rows(added_positions(vit).table).any()
    with planted(vit.model.pos_embed.data[0, 1:], kind, 4, 0) as chosen:
        broken = patches(vit, photos)
        fix = PositionRepair.calibrate(vit)
        with fix.applied_to(vit):
            likeness = F.cosine_similarity(patches(vit, photos), clean, dim=-1)
    assert list(fix.patches) == chosen.tolist()
    assert F.cosine_similarity(broken, clean, dim=-1)[:, chosen].mean() < 0.5
    assert likeness[:, chosen].mean() >= 0.95
    assert likeness.median() >= 0.999


@torch.no_grad()
def test_a_pass_that_failed_leaves_nothing_for_the_next():
    """Also where somebody holds what its modules gave."""
    vit = CATALOG["timm clip"].backbone()  # a norm lies between the positions and block 0
    batch, held = images(vit, 2), []

    def fail(module, args):
        raise RuntimeError("in the middle")

    with PositionRepair.calibrate(vit, patches=[7]).applied_to(vit):
        expected = patches(vit, batch)
        hooks = [
            module.register_forward_hook(lambda module, args, output: held.append(output))
            for module in vit.model.modules()
        ]
        failing = vit.model.blocks[0].register_forward_pre_hook(fail)
        with removing([*hooks, failing]), pytest.raises(RuntimeError, match="in the middle"):
            vit(images(vit, 3, seed=1))
        assert same(patches(vit, batch), expected)
    assert held
