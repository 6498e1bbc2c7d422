"""Outlier patches filled in from their neighbours: against a slow reference, and how much comes back."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from catalog import CATALOG, images
from phantoms import crops, massive_vector
from torch import Tensor

import vitreg
from vitreg.errors import FixError
from vitreg.fixes import Inpainting, TestTimeRegisters, TokenSplitting
from vitreg.fixes.inpainting import common_directions
from vitreg.fixes.neighbours import grid_distances, nearest_clean
from vitreg.fixes.neurons import RegisterNeuron, RegisterNeurons
from vitreg.hooks.block_edit import BlockEdit, install, uninstall

SOME = ["timm vit", "timm dinov3", "timm beit", "hf dinov2 registers", "open_clip vit", "torchvision vit"]
SEEDS = range(3)


def residuals(vit: vitreg.Backbone, batch: Tensor) -> Tensor:
    with torch.no_grad(), vitreg.trace(vit, norms=False, residuals=True) as t:
        vit(batch)
    return t.residuals


def by_hand(patches: Tensor, outlier: Tensor, grid: tuple[int, int]) -> Tensor:
    """(b, p, d): patch by patch, ring by ring."""
    filled = patches.clone()
    for image, patch in outlier.nonzero().tolist():
        row, column = divmod(patch, grid[1])
        for reach in range(1, sum(grid)):
            ring = [
                r * grid[1] + c
                for r in range(grid[0])
                for c in range(grid[1])
                if abs(r - row) + abs(c - column) == reach and not outlier[image, r * grid[1] + c]
            ]
            if ring:
                filled[image, patch] = patches[image, ring].mean(0)
                break
    return filled


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95, 1.0])
def test_rings_grow_until_there_is_a_clean_patch(share):
    grid = (4, 5)
    patches, outlier = torch.randn(6, 20, 3), torch.rand(6, 20) < share
    outlier[0, :19], outlier[0, 19] = True, share == 1
    filled = torch.where(outlier[..., None], nearest_clean(patches, outlier, grid_distances(grid)), patches)
    torch.testing.assert_close(filled, by_hand(patches, outlier, grid))
    infinite = patches.masked_fill(outlier[..., None], torch.inf)
    again = nearest_clean(infinite, outlier, grid_distances(grid))
    assert share == 1 or again[0].isfinite().all()


@pytest.mark.parametrize("name", SOME)
def test_outliers_are_replaced_after_their_block_and_nothing_else_is(name):
    vit = CATALOG[name].backbone()
    batch, layout = images(vit, 3), vit.layout
    plain = residuals(vit, batch)
    norms = plain[1][:, layout.patch_slice].norm(dim=-1)
    fix = Inpainting(layer=1, threshold=float(norms.quantile(0.7)))
    outlier = norms >= fix.threshold
    with fix.applied_to(vit):
        fixed = residuals(vit, batch)
    expected = plain[1].clone()
    expected[:, layout.patch_slice] = by_hand(plain[1][:, layout.patch_slice], outlier, layout.grid)
    torch.testing.assert_close(fixed[1], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(fixed[1][:, layout.patch_slice][~outlier], plain[1][:, layout.patch_slice][~outlier])
    assert torch.equal(fixed[0], plain[0])
    assert not torch.allclose(fixed[2], plain[2], atol=1e-2)  # later blocks read what was filled in


def test_behind_registers_the_patches_are_still_the_patches():
    vit = CATALOG["timm vit"].backbone()
    batch, layout = images(vit, 3), vit.layout
    with TestTimeRegisters({1: [3, 5]}, registers=2).applied_to(vit):
        plain = residuals(vit, batch)[1][:, layout.patch_slice]
        norms = plain.norm(dim=-1)
        fix = Inpainting(layer=1, threshold=float(norms.quantile(0.7)))
        with fix.applied_to(vit):
            fixed = residuals(vit, batch)[1][:, layout.patch_slice]
    torch.testing.assert_close(fixed, by_hand(plain, norms >= fix.threshold, layout.grid))


# -- phantoms --------------------------------------------------------------------------------------


class Plant(BlockEdit):
    """15 times the median norm along a vector at some patches, which keep what they held or lose it."""

    def __init__(self, vit: vitreg.Backbone, outlier: Tensor, kept: bool) -> None:
        self.place, self.outlier, self.kept = vit.layout.patch_slice, outlier, kept
        self.write = massive_vector(vit.anatomy.width, torch.Generator().manual_seed(0))

    def run(self, block: Any, inner: Any, x: Tensor, args: Any, kwargs: Any) -> Tensor:
        y = inner(x, args, kwargs).clone()
        patches = y[:, self.place]
        excess = 15 * patches.norm(dim=-1).median() * self.write
        patches[self.outlier] = patches[self.outlier] * self.kept + excess
        return y


@contextmanager
def planted(vit: vitreg.Backbone, layer: int, outlier: Tensor, kept: bool) -> Iterator[None]:
    """Within the fixes that are applied already, which see what a block with outliers would give them."""
    block, plant = vit.anatomy.block_modules(vit.model)[layer], Plant(vit, outlier, kept)
    install(block, plant)
    yield
    uninstall(block, plant)


class Likeness(NamedTuple):
    """Mean cosines with the unplanted model's patches after the last block."""

    planted: float
    others: float
    without: float  # of planted ones, without the fix


def likeness(
    vit: vitreg.Backbone, batch: Tensor, layer: int, outlier: Tensor, kept: bool, directions: int
) -> Likeness:
    def last() -> Tensor:
        return residuals(vit, batch)[-1][:, vit.layout.patch_slice]

    clean = last()
    with planted(vit, layer, outlier, kept):
        broken = last()
        norms = residuals(vit, batch)[layer][:, vit.layout.patch_slice].norm(dim=-1)
        threshold = float(norms[outlier].min() + norms[~outlier].max()) / 2
        basis = common_directions(vit, [batch], layer, threshold, directions)
    fix = Inpainting(layer=layer, threshold=threshold, directions=basis)
    with fix.applied_to(vit), planted(vit, layer, outlier, kept):
        fixed = last()
    found, before = (F.cosine_similarity(x, clean, dim=-1) for x in (fixed, broken))
    return Likeness(*(float(x.mean()) for x in (found[outlier], found[~outlier], before[outlier])))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", SOME)
def test_how_much_of_the_unplanted_models_features_comes_back(name, seed):
    """All, where patches kept what they held and only the outliers' direction is filled in; else a guess."""
    vit = CATALOG[name].backbone(seed)
    photos = crops(vit, 24, seed)
    chance = torch.rand(24, vit.layout.patches, generator=torch.Generator().manual_seed(seed))
    outlier = chance < 0.05
    along_direction = likeness(vit, photos, 1, outlier, kept=True, directions=1)
    assert along_direction.planted >= 0.95 > 0.3 > along_direction.without
    assert along_direction.others >= 0.999
    whole, lost = (likeness(vit, photos, 1, outlier, kept=kept, directions=0) for kept in (True, False))
    assert whole.planted == pytest.approx(lost.planted, abs=1e-3)  # what they held plays no part
    assert lost.planted > 0.6 > 0.3 > lost.without
    assert lost.others >= 0.997
    # Where nothing was kept, there is nothing to keep: whole patches do better.
    assert likeness(vit, photos, 1, outlier, kept=False, directions=1).planted < lost.planted + 0.05


def test_a_real_models_neighbours_are_no_substitute(shared):
    """They give back 0.7 of the DeiT-Ti's features, too; filling in the direction alone, what was kept."""
    vit = vitreg.load(str(shared / "models/deit_tiny_patch16_224"))
    photos = next(iter(vitreg.read_images(shared / "data/imagenet-sample-1000", vit, limit=8))).pixels
    outlier = torch.rand(8, 196) < 0.02
    guessed = likeness(vit, photos, 4, outlier, kept=False, directions=0)
    kept = likeness(vit, photos, 4, outlier, kept=True, directions=1)
    assert 0.6 < guessed.planted < 0.8
    assert guessed.without < 0.2
    assert kept.planted >= 0.95
    assert min(guessed.others, kept.others) >= 0.998


# -- calibration -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["timm vit", "timm siglip", "hf dinov2"])
def test_calibrated_by_a_diagnosis_it_leaves_no_outlier(name):
    vit = CATALOG[name].backbone()
    photos = [crops(vit, 48, 0)]
    phantom = vitreg.plant(vit, photos, 1).vit
    report = vitreg.diagnose(phantom, photos)
    fix = Inpainting.calibrate(phantom, photos, report)
    assert fix == Inpainting.calibrate(phantom, photos)
    assert (fix.layer, fix.threshold) == (report.onset_layer, report.layers[1].threshold)
    assert fix.directions.shape[0] == 0
    with fix.applied_to(phantom):
        after = vitreg.diagnose(phantom, photos)
    assert report.has_artifacts
    assert not after.has_artifacts
    few = Inpainting.calibrate(phantom, photos, report, directions=2)
    assert few.directions.shape == (2, vit.anatomy.width)
    assert few != fix
    with few.applied_to(phantom):
        assert not vitreg.diagnose(phantom, photos).has_artifacts


def test_what_is_refused():
    vit = CATALOG["timm vit"].backbone()
    photos = [crops(vit, 24, 0)]
    with pytest.raises(FixError, match="nothing to in-paint"):
        Inpainting.calibrate(vit, photos)
    phantom = vitreg.plant(vit, photos, 1).vit
    report = vitreg.diagnose(phantom, photos)
    with pytest.raises(ValueError, match="expected 0 to 31"):
        Inpainting.calibrate(phantom, photos, report, directions=32)
    with pytest.raises(FixError, match="none of these images has an outlier"):
        Inpainting.calibrate(vit, photos, report, directions=1)
    with pytest.raises(FixError, match="3 blocks"):
        Inpainting(layer=3, threshold=5.0).apply(vit)
    with pytest.raises(FixError, match="1 directions of width 8"):
        Inpainting(layer=1, threshold=5.0, directions=torch.eye(8)[:1]).apply(vit)
    for wrong in ({"threshold": 0.0}, {"threshold": float("inf")}, {"directions": torch.zeros(8)}):
        with pytest.raises(ValueError, match="expected no neurons, a positive norm"):
            Inpainting(**{"layer": 1, "threshold": 5.0} | wrong)
    with pytest.raises(ValueError, match="not orthonormal"):
        Inpainting(layer=1, threshold=5.0, directions=torch.ones(2, 32))
    marking = RegisterNeurons((RegisterNeuron(1, 3, threshold=0.5),))
    with TokenSplitting(marking).applied_to(vit), pytest.raises(FixError, match="token splitting last"):
        Inpainting(layer=1, threshold=5.0).apply(vit)


def test_images_of_another_size_are_refused_and_a_model_wrapped_for_them_is_not():
    own = CATALOG["hf dinov2"].backbone()
    larger = vitreg.wrap(own.model, image_size=(48, 40))
    fix = Inpainting(layer=1, threshold=5.0)
    with fix.applied_to(own), pytest.raises(FixError, match="expected the 4x5 patches"):
        own(images(larger))
    with fix.applied_to(larger):
        assert residuals(larger, images(larger)).isfinite().all()
