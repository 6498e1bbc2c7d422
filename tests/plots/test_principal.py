"""Colours of features: the library's principal components, the same every time, turned without loss."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from torch import Tensor

from vitreg import NonFiniteError
from vitreg.plots.principal import CLIPPED, PrincipalColours, foreground_of


def cloud(patches: int, width: int, seed: int) -> Tensor:
    """Features with a spread of their own along each axis, so that no two components are alike."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(patches, width, generator=generator, dtype=torch.float64)
    turn, _ = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    return (points * torch.logspace(1, -1, width, dtype=torch.float64)) @ turn + 5


def turn(width: int, seed: int) -> Tensor:
    """A random orthogonal matrix."""
    noise = torch.randn(width, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(noise)[0]


SIZES = {"patches": st.integers(8, 60), "width": st.integers(3, 24), "seed": st.integers(0, 999)}


@given(**SIZES)
@settings(deadline=None, max_examples=40)
def test_the_axes_are_principal_components(patches: int, width: int, seed: int) -> None:
    features = cloud(patches, width, seed)
    colours = PrincipalColours.fit(features)
    library = PCA(3).fit(features.numpy())
    alike = (torch.from_numpy(library.components_) * colours.axes.mT).sum(1).abs()
    assert torch.allclose(alike, torch.ones(3, dtype=alike.dtype), atol=1e-6)
    assert torch.allclose(colours.explained, torch.from_numpy(library.explained_variance_ratio_), atol=1e-9)


@given(**SIZES)
@settings(deadline=None, max_examples=40)
def test_colours_do_not_depend_on_the_order_of_patches_and_fill_their_range(
    patches: int, width: int, seed: int
) -> None:
    features = cloud(patches, width, seed)
    order = torch.randperm(patches, generator=torch.Generator().manual_seed(seed))
    picture = PrincipalColours.fit(features)(features)
    assert (PrincipalColours.fit(features[order])(features).int() - picture.int()).abs().max() <= 1
    assert (picture.amax(0) == 255).all()
    assert (picture.amin(0) == 0).all()
    inside = (picture > 0) & (picture < 255)
    assert inside.double().mean() >= 1 - 2 * CLIPPED - 4 / patches


@given(**SIZES, other=st.integers(3, 24))
@settings(deadline=None, max_examples=40)
def test_another_model_that_says_the_same_gets_the_same_colours(
    patches: int, width: int, seed: int, other: int
) -> None:
    """The same three scores, turned, mirrored, scaled and moved, in another number of dimensions."""
    scores = cloud(patches, 3, seed) - 5
    first = torch.zeros(patches, width, dtype=torch.float64)
    first[:, :3] = scores
    second = torch.zeros(patches, other, dtype=torch.float64)
    second[:, :3] = 7 * scores @ turn(3, seed + 1)
    second = second @ turn(other, seed + 2) - 3
    ours = PrincipalColours.fit(first)
    theirs = PrincipalColours.fit(second).matched(second, ours.scores(first))
    wanted, got = ours.scores(first), theirs.scores(second)
    unit = [x / x.std(0, unbiased=False) for x in (wanted - wanted.mean(0), got - got.mean(0))]
    assert torch.allclose(*unit, atol=1e-6)
    assert (ours(first).int() - theirs(second).int()).abs().max() <= 1


@pytest.mark.parametrize("patches", [1, 2, 3, 50])
@pytest.mark.parametrize("width", [1, 2, 5])
def test_too_little_for_three_components_is_drawn_all_the_same(patches: int, width: int) -> None:
    for features in (cloud(patches, width, 0), torch.ones(patches, width)):
        colours = PrincipalColours.fit(features)
        assert colours(features).shape == (patches, 3)
        assert colours.explained.isfinite().all()


def test_features_without_end_are_refused() -> None:
    features = cloud(20, 4, 0)
    features[3, 2] = torch.inf
    with pytest.raises(NonFiniteError, match="no principal components"):
        PrincipalColours.fit(features)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("share", [0.15, 0.4])
def test_the_foreground_is_what_the_border_has_less_of(sign: int, share: float) -> None:
    mask = torch.zeros(3, 10, 12, dtype=torch.bool)
    side = round((120 * share) ** 0.5)
    mask[:, 2 : 2 + side, 3 : 3 + side] = True
    features = torch.randn(3, 10, 12, 6) * 0.1
    features[..., 0] += sign * mask * 5
    assert (foreground_of(features, torch.ones_like(mask)) == mask).all()


def test_outliers_do_not_choose_the_foreground() -> None:
    mask = torch.zeros(1, 10, 10, dtype=torch.bool)
    mask[:, 3:7, 3:7] = True
    outliers = torch.zeros_like(mask)
    outliers[0, 0, 0] = outliers[0, 9, 9] = True
    features = torch.randn(1, 10, 10, 6) * 0.1
    features[..., 0] += mask * 2.0
    features[..., 1] += outliers * 500.0
    normal = foreground_of(features, ~outliers)
    assert (normal == mask)[~outliers].all()
