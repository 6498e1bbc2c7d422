"""Statistics stream: the same whatever the batches and the ranks, and equal to what is computed directly."""

from itertools import pairwise

import pytest
import torch
from catalog import CATALOG, images
from hypothesis import given, settings
from hypothesis import strategies as st
from looking import removing
from ranked import of_each

import vitreg
from vitreg.diagnosis.diagnosing import collect
from vitreg.diagnosis.statistics import EDGES, neighbour_similarity, share_by_chance
from vitreg.models.layout import TokenLayout
from vitreg.models.probe import evaluating

VIT = CATALOG["timm dinov2 registers"].backbone()
IMAGES = images(VIT, 12)


def statistics(*batches: torch.Tensor) -> vitreg.diagnosis.statistics.Statistics:
    return collect(VIT, batches, examples=0).statistics


def same(one, other) -> None:
    for name, value in vars(one).items():
        theirs = getattr(other, name)
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            torch.testing.assert_close(value, theirs, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs)), name


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(1, 11), max_size=4, unique=True), st.permutations(range(12)))
def test_neither_batches_nor_order_matter(cuts, order):
    bounds = [0, *sorted(cuts), 12]
    shuffled = IMAGES[torch.tensor(order)]
    same(statistics(*(shuffled[a:b] for a, b in pairwise(bounds))), statistics(IMAGES))


def test_statistics_of_ranks_are_put_together():
    parts = (IMAGES[:5], IMAGES[5:])
    mine = [statistics(part) for part in parts]
    for whole in of_each(2, lambda ranks: mine[ranks.rank].together(ranks)):
        same(whole, statistics(IMAGES))


def test_sums_beyond_a_bound_equal_those_over_the_tokens_beyond_it():
    with evaluating(VIT.model), vitreg.trace(VIT, attention="cls", qkv=True, embedding=True) as t:
        VIT(IMAGES)
    s, patches = statistics(IMAGES), t.layout.patch_slice
    norms, layer = t.norms[..., patches], 1
    bound = EDGES[(norms[layer].median() > EDGES).sum()]
    beyond, bins = norms[layer] >= bound, EDGES[:-1] >= bound
    shares = t.attention[layer + 1][:, :, 0, patches]
    shares = shares / shares.sum(-1, keepdim=True)
    assert int(s.counts[layer][bins].sum()) == int(beyond.sum())
    assert torch.equal(s.positions[layer][:, bins].sum(1), beyond.sum(0).int())
    expected = (shares * beyond[:, None]).sum((0, 2)).double()
    torch.testing.assert_close(s.attention[layer + 1][:, bins].sum(1), expected, rtol=1e-5, atol=1e-5)
    values = t.v[layer + 1][:, :, patches].norm(dim=(1, 3))
    assert float(s.values[layer + 1][bins].sum()) == pytest.approx(float(values[beyond].sum()), rel=1e-5)
    similar = neighbour_similarity(t.embedding, t.layout)
    assert float(s.similarity[layer][bins].sum()) == pytest.approx(float(similar[beyond].sum()), rel=1e-4)


def test_neighbour_similarity_is_the_mean_cosine_to_the_cells_beside():
    layout, patches = TokenLayout(1, 0, (3, 4)), torch.randn(2, 12, 5)
    found = layout.as_grid(neighbour_similarity(patches, layout))
    grid = patches.unflatten(1, (3, 4))
    for row in range(3):
        for column in range(4):
            beside = [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
            near = [grid[0, r, c] for r, c in beside if 0 <= r < 3 and 0 <= c < 4]
            cosines = [torch.cosine_similarity(grid[0, row, column], x, dim=0) for x in near]
            assert float(found[0, row, column]) == pytest.approx(float(torch.stack(cosines).mean()), abs=1e-5)


@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (4, 1)])
def test_neighbour_similarity_on_thin_grids(grid):
    layout = TokenLayout(0, 0, grid)
    assert neighbour_similarity(torch.ones(1, layout.patches, 3), layout).isfinite().all()


@pytest.mark.parametrize("width", [16, 48, 192, 768])
@pytest.mark.parametrize("count", [1, 3])
def test_the_share_by_chance_is_that_of_random_vectors(width, count):
    squares = torch.randn(20000, width, generator=torch.Generator().manual_seed(0)).square()
    expected = float((squares.topk(count).values.sum(1) / squares.sum(1)).mean())
    assert share_by_chance(width, count) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("least", [3000, 3130, 3270, 3410, 3560])
@pytest.mark.parametrize("photos", [2, 3, 5])
def test_a_direction_is_seen_wherever_the_threshold_falls_in_its_bin(least: float, photos: int) -> None:
    """Outliers of nearly equal norms, whose threshold parts a coarse bin: hardly one of them is lost."""
    vector = torch.nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(0)), dim=0)
    norms = torch.linspace(least, 1.15 * least, photos)

    def plant(module, args, output):
        output = output.clone()
        output[:photos, VIT.layout.patch(1, 2)] = vector * norms[:, None]
        return output

    with removing([VIT.model.blocks[1].register_forward_hook(plant)]):
        s = statistics(IMAGES)
    for threshold in EDGES[(EDGES > 2500) & (least > EDGES)].tolist():
        assert s.direction(1, threshold) > 0.95
