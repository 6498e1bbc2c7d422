"""The threshold finds a second population of norms at any scale, and is not fooled by a tail."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitreg.statistics import BINS, EDGES, _bin
from vitreg.threshold import quantile, widest_gap


def histogram(norms: np.ndarray) -> torch.Tensor:
    return torch.bincount(_bin(torch.from_numpy(norms)), minlength=BINS)


def two_populations(
    ratio: float, fraction: float, median: float, seed: int, count: int = 20000
) -> np.ndarray:
    rng = np.random.default_rng(seed)
    high = int(fraction * count)
    normal = median * np.exp(rng.normal(0, 0.12, count - high))
    return np.concatenate([normal, ratio * median * np.exp(rng.normal(0, 0.12, high))])


@settings(max_examples=60, deadline=None)
@given(
    ratio=st.floats(4, 60),
    fraction=st.floats(0.002, 0.2),
    median=st.floats(0.5, 500),
    seed=st.integers(0, 9999),
)
def test_a_second_population_is_found_with_its_share(ratio, fraction, median, seed):
    norms = two_populations(ratio, fraction, median, seed)
    gap = widest_gap(histogram(norms), EDGES)
    assert gap is not None
    assert gap.separates
    assert 1.2 * median < gap.threshold < ratio * median
    assert gap.fraction == pytest.approx(int(fraction * 20000) / 20000, rel=0.02)
    outliers = norms > (ratio**0.5) * median
    exact = np.median(norms[outliers]) / np.median(norms[~outliers])
    assert gap.ratio == pytest.approx(exact, rel=0.045)  # one bin


TAILS = {
    "narrow": lambda rng, n: np.exp(rng.normal(0, 0.1, n)),
    "wide": lambda rng, n: np.exp(rng.normal(0, 0.3, n)),
    "exponential": lambda rng, n: 5 + rng.exponential(1, n),
    "skewed": lambda rng, n: rng.gamma(3, 1, n) + 1,
    "student t": lambda rng, n: np.exp(0.1 * rng.standard_t(5, n)),
    "two close groups": lambda rng, n: np.concatenate(
        [np.exp(rng.normal(0, 0.1, n - n // 50)), 2.2 * np.exp(rng.normal(0, 0.1, n // 50))]
    ),
    "constant": lambda rng, n: np.full(n, 7.0),
}


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("count", [200, 20000, 500000])
def test_tails_are_no_second_population(tail, count):
    for seed in range(5):
        gap = widest_gap(histogram(TAILS[tail](np.random.default_rng(seed), count)), EDGES)
        assert gap is None or not gap.separates, (seed, gap)


def test_scaling_the_norms_scales_the_threshold():
    norms = two_populations(20, 0.02, 10, 0)
    one, other = (widest_gap(histogram(scale * norms), EDGES) for scale in (1, 8))
    assert other.threshold == pytest.approx(8 * one.threshold)
    assert other.fraction == one.fraction


def test_tokens_on_their_way_up_do_not_hide_the_gap():
    norms = two_populations(40, 0.02, 10, 0)
    between = np.geomspace(30, 300, 20)  # a twentieth of the outliers
    gap = widest_gap(histogram(np.concatenate([norms, between])), EDGES)
    assert gap.separates
    assert gap.fraction == pytest.approx(0.02, abs=0.001)


def test_most_tokens_cannot_be_outliers():
    gap = widest_gap(histogram(two_populations(20, 0.4, 10, 0)), EDGES)
    assert gap is None or not gap.separates


@given(st.lists(st.floats(0.1, 1e4), min_size=1, max_size=300), st.floats(0, 1))
def test_quantiles_are_right_to_one_bin(norms, q):
    exact = np.quantile(np.array(norms), q, method="inverted_cdf")
    assert quantile(histogram(np.array(norms)), EDGES, q) == pytest.approx(exact, rel=0.045)


def test_an_empty_histogram_has_no_gap():
    assert widest_gap(torch.zeros(BINS, dtype=torch.int64), EDGES) is None
