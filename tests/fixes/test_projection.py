"""Massive channels and position patterns, planted after the last block and projected out."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from catalog import CATALOG, images
from phantoms import crops
from torch import Tensor, nn

import vitreg
from vitreg.errors import FixError, ImageError
from vitreg.fixes import Projection, TestTimeRegisters
from vitreg.fixes.neurons import RegisterNeurons
from vitreg.fixes.projection import massive_channels
from vitreg.hooks.block_edit import BlockEdit, install, uninstall

SOME = ["timm vit", "timm dinov3", "timm beit", "hf dinov2 registers", "open_clip vit", "torchvision vit"]
SEEDS = range(3)
CHANNELS, SIZE = 2, 30.0  # of the median channel


def last(vit: vitreg.Backbone, batch: Tensor) -> Tensor:
    """Every token after the last block."""
    with torch.no_grad(), vitreg.trace(vit, norms=False, residuals=True) as t:
        vit(batch)
    return t.residuals[-1]


class Plant(BlockEdit):
    """Massive channels added to every token that a block gives, and a pattern of positions to the patches.

    The channels are of the half that says least, for what a massive one said of the content is lost.
    """

    def __init__(self, vit: vitreg.Backbone, typical: Tensor, channels: int, rank: int, seed: int) -> None:
        self.place, generator = vit.layout.patch_slice, torch.Generator().manual_seed(seed)
        width, size = vit.anatomy.width, typical.mean()
        idle = typical.argsort()[: width // 2]
        self.channels = idle[torch.randperm(width // 2, generator=generator)[:channels]].sort().values
        self.massive = torch.zeros(width)
        signs = torch.randn(channels, generator=generator).sign()
        self.massive[self.channels] = SIZE * size * signs
        places = torch.randn(vit.layout.patches, rank, generator=generator)
        places -= places.mean(0)  # what all positions share is no position
        directions = torch.randn(rank, width, generator=generator).sign()  # in no dimension large
        directions[:, self.channels] = 0
        self.pattern = 5 * size * places @ directions

    def run(self, block: nn.Module, inner: Any, x: Tensor, args: Any, kwargs: Any) -> Tensor:
        y = inner(x, args, kwargs)
        y = y + self.massive * (1 + 0.05 * y.mean(-1, keepdim=True))  # a little different on each token
        y[:, self.place] += self.pattern
        return y


@contextmanager
def planted(vit: vitreg.Backbone, plant: Plant) -> Iterator[None]:
    """Within the fixes that are applied already."""
    block = vit.anatomy.block_modules(vit.model)[-1]
    install(block, plant)
    yield
    uninstall(block, plant)


def plant_for(vit: vitreg.Backbone, batch: Tensor, channels: int, rank: int, seed: int) -> Plant:
    typical = last(vit, batch)[:, vit.layout.patch_slice].abs().mean((0, 1))
    return Plant(vit, typical, channels, rank, seed)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize(("channels", "rank"), [(CHANNELS, 0), (1, 1)])
def test_the_unplanted_models_features_come_back(name, seed, channels, rank):
    vit = CATALOG[name].backbone(seed)
    photos, start = crops(vit, 32, seed), vit.layout.patch_slice.start
    clean, plant = last(vit, photos), plant_for(vit, photos, channels, rank, seed)
    with planted(vit, plant):
        broken = last(vit, photos)
        fix = Projection.calibrate(vit, photos.split(20), massive=bool(channels), positions=rank)
    with fix.applied_to(vit), planted(vit, plant):
        fixed = last(vit, photos)
    likeness, before = (F.cosine_similarity(x, clean, dim=-1)[:, start:] for x in (fixed, broken))
    assert fix.basis[:channels].nonzero()[:, 1].tolist() == plant.channels.tolist()
    assert len(fix.basis) == channels + rank
    assert likeness.mean() >= 0.95 > 0.7 > before.mean()
    assert torch.equal(fixed[:, :start], broken[:, :start])  # CLS and registers stay as they are
    assert torch.equal(last(vit, photos), clean)


@pytest.mark.parametrize("name", SOME)
def test_nothing_is_massive_in_an_unplanted_model(name):
    for seed in SEEDS:
        vit = CATALOG[name].backbone(seed)
        with pytest.raises(FixError, match=r"nothing to project out: the largest channel is [1-3]\.\dx"):
            Projection.calibrate(vit, [crops(vit, 24, seed)])


def test_outlier_patches_make_no_channel_massive():
    """A few tokens with a large value are no matter of the channel, whatever they make of its mean."""
    vit = CATALOG["timm vit"].backbone()
    photos = [crops(vit, 48, 0)]
    phantom = vitreg.plant(vit, photos, 1, norm=200.0).vit
    values = last(phantom, photos[0])[:, 1:].abs().mean((0, 1))
    assert values.max() > 5 * values.median()
    with pytest.raises(FixError, match="nothing to project out"):
        Projection.calibrate(phantom, photos)


def test_massive_means_a_multiple_of_the_median_and_a_share_of_the_energy():
    typical = torch.ones(1000)
    typical[3], typical[7] = 4.9, 8.0
    assert massive_channels(typical).nonzero().flatten().tolist() == [7]
    typical[7] = 6.0  # of so many channels under 5% of the energy
    assert not massive_channels(typical).any()


@pytest.mark.parametrize("name", ["timm vit", "hf dinov2 registers"])
def test_a_patch_becomes_what_the_formula_says(name):
    vit = CATALOG[name].backbone()
    batch, start = images(vit, 3), vit.layout.patch_slice.start
    basis, mean = torch.linalg.qr(torch.randn(32, 3)).Q.T.contiguous(), torch.randn(32)
    fix = Projection(RegisterNeurons(()), basis, mean)
    plain = last(vit, batch)
    with fix.applied_to(vit):
        fixed = last(vit, batch)
    for image in range(3):
        for token in range(vit.layout.tokens):
            x = plain[image, token]
            parts = sum(((x - mean) @ row) * row for row in basis) if token >= start else 0
            torch.testing.assert_close(fixed[image, token], x - parts, rtol=1e-4, atol=1e-4)


def test_positions_are_the_first_directions_of_the_mean_patches():
    vit = CATALOG["timm siglip"].backbone()
    photos = crops(vit, 30, 0)
    fix = Projection.calibrate(vit, photos.split(7), massive=False, positions=3)
    means = last(vit, photos).mean(0)
    centred = means - means.mean(0)
    left = centred - centred @ fix.basis.T @ fix.basis
    expected = torch.linalg.svdvals(centred)[3:].square().sum()
    torch.testing.assert_close(left.square().sum(), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(fix.mean, means.mean(0), rtol=1e-4, atol=1e-5)
    with fix.applied_to(vit):
        after = last(vit, photos).mean(0)
    torch.testing.assert_close(after, means.mean(0) + left, rtol=1e-3, atol=1e-4)


def test_behind_registers_and_at_another_size_the_patches_are_still_the_patches():
    vit = CATALOG["hf dinov2"].backbone()
    larger, start = vitreg.wrap(vit.model, image_size=(48, 40)), vit.layout.patch_slice.start
    fix = Projection(RegisterNeurons(()), torch.eye(32)[[4]], torch.zeros(32))
    with TestTimeRegisters({1: [3]}, registers=2).applied_to(vit):
        plain = last(larger, images(larger))
        with fix.applied_to(vit):
            fixed = last(larger, images(larger))
    plain[:, start:, 4] = 0
    torch.testing.assert_close(fixed, plain, rtol=1e-5, atol=1e-5)


def test_what_is_refused():
    vit = CATALOG["timm vit"].backbone()
    with pytest.raises(ImageError, match="no images"):
        Projection.calibrate(vit, [], positions=1)
    for wrong in (-1, 20):
        with pytest.raises(ValueError, match="expected 0 to 19 directions"):
            Projection.calibrate(vit, [images(vit)], positions=wrong)
    hf = CATALOG["hf dinov2"].backbone()
    with pytest.raises(ImageError, match="different patch grids"):
        Projection.calibrate(hf, [images(hf), torch.rand(1, 3, 48, 40)], positions=1)
    none = RegisterNeurons(())
    with pytest.raises(FixError, match="8 dimensions, and the model's tokens 32"):
        Projection(none, torch.eye(8)[:1], torch.zeros(8)).apply(vit)
    for basis, mean in ((torch.eye(8)[:0], torch.zeros(8)), (torch.eye(8)[:1], torch.zeros(7))):
        with pytest.raises(ValueError, match="r at least 1"):
            Projection(none, basis, mean)
    with pytest.raises(ValueError, match="not orthonormal"):
        Projection(none, torch.ones(2, 8), torch.zeros(8))
