"""A second population of norms is found with its share and its threshold; a tail of any kind is none."""

import math

import numpy as np
import pytest
import torch
from histograms import best_f1, f1, histogram, two_populations
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vitreg.diagnosis.bins import PER_OCTAVE
from vitreg.diagnosis.populations import detectable_ratio, needed_gain, quantile, second_population
from vitreg.diagnosis.statistics import BINS, EDGES

COUNT = 20000


@settings(max_examples=20, deadline=None)
@example(ratio=1.80078125, share=0.0234375, median=1.0, seed=504)  # the most that was seen to be lost: 0.061
@given(
    ratio=st.floats(1.8, 60),
    share=st.floats(0.02, 0.2),
    median=st.floats(0.5, 500),
    seed=st.integers(0, 9999),
)
def test_a_second_population_is_found_with_its_share_and_the_best_threshold(ratio, share, median, seed):
    norms, high = two_populations(ratio, share, median, seed)
    found = second_population(histogram(norms), EDGES)
    assert found is not None
    assert found.stands_out
    assert found.share == pytest.approx(high.mean(), rel=0.3 if ratio < 2.2 else 0.05)
    lost = best_f1(norms, high) - f1(norms >= found.threshold, high)
    assert lost <= (0.065 if ratio < 2.2 else 0.02)
    exact = np.median(norms[norms >= found.threshold]) / np.median(norms[norms < found.threshold])
    assert found.ratio == pytest.approx(exact, rel=0.045)  # one bin
    assert found.fraction == pytest.approx((norms >= found.threshold).mean(), abs=2 / COUNT)


@pytest.mark.parametrize("spread", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("ratio", [3, 4, 6, 12])
def test_wide_populations_are_found_too(ratio, spread):
    for seed in range(3):
        rng = np.random.default_rng(seed)
        norms, high = two_populations(1, 0.02, 10, seed, spread=0.15)
        norms[high] *= ratio * np.exp(rng.normal(0, spread, high.sum()))
        found = second_population(histogram(norms), EDGES)
        assert found.stands_out
        assert f1(norms >= found.threshold, high) >= best_f1(norms, high) - (0.05 if ratio < 6 else 0.02)


@pytest.mark.parametrize("share", [0.02, 0.05])
def test_how_many_are_misjudged_is_known(share):
    """Averaged over seeds: what the threshold puts on the wrong side, without the truth."""
    said, true = [], []
    for seed in range(6):
        norms, high = two_populations(2.0, share, 10, seed, spread=0.15)
        found = second_population(histogram(norms), EDGES)
        said.append(found.misjudged)
        true.append(((norms >= found.threshold) != high).mean())
    assert np.mean(said) == pytest.approx(np.mean(true), rel=0.5)
    assert np.mean(true) > 1e-4


def test_the_posterior_rises_and_passes_the_threshold_where_it_is_likely():
    norms, _ = two_populations(2.2, 0.05, 10, 0, spread=0.2)
    found = second_population(histogram(norms), EDGES)
    assert (np.diff(found.posterior) >= 0).all()
    at = int(np.argmin(abs(EDGES.numpy() - found.threshold)))
    assert found.posterior[at - 2] < 2 / 3 <= found.posterior[at + 1]


TAILS = {
    "narrow": lambda rng, n: np.exp(rng.normal(0, 0.1, n)),
    "lognormal 0.3": lambda rng, n: np.exp(rng.normal(0, 0.3, n)),
    "lognormal 0.8": lambda rng, n: np.exp(rng.normal(0, 0.8, n)),
    "exponential": lambda rng, n: 5 + rng.exponential(1, n),
    "gamma": lambda rng, n: rng.gamma(3, 1, n) + 1,
    "Pareto 1.5": lambda rng, n: 1 + rng.pareto(1.5, n),
    "Pareto 3": lambda rng, n: 1 + rng.pareto(3, n),
    "Student 2": lambda rng, n: abs(rng.standard_t(2, n)) + 1e-3,
    "Student 3": lambda rng, n: abs(rng.standard_t(3, n)) + 1e-3,
    "uniform": lambda rng, n: rng.uniform(5, 15, n),
    "constant": lambda rng, n: np.full(n, 7.0),
}


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("count", [20, 600, 20000, 500000])
def test_tails_are_no_second_population(tail, count):
    for seed in range(8 if count < 500000 else 2):
        found = second_population(histogram(TAILS[tail](np.random.default_rng(seed), count)), EDGES)
        assert found is None or not found.stands_out, (seed, found)


def test_scaling_the_norms_scales_the_threshold():
    norms, _ = two_populations(20, 0.02, 10, 0)
    one, other = (second_population(histogram(scale * norms), EDGES) for scale in (1, 8))
    assert other.threshold == pytest.approx(8 * one.threshold)
    assert (other.fraction, other.share) == (one.fraction, pytest.approx(one.share))
    assert other.gain == pytest.approx(one.gain)


def test_patches_on_their_way_up_do_not_hide_a_population():
    norms, _ = two_populations(40, 0.02, 10, 0)
    between = np.geomspace(30, 300, 20)  # a twentieth of the outliers
    found = second_population(histogram(np.concatenate([norms, between])), EDGES)
    assert found.stands_out
    assert found.fraction == pytest.approx(0.02, abs=0.001)


@pytest.mark.parametrize("share", [0.4, 0.6])
def test_most_patches_cannot_be_outliers(share):
    found = second_population(histogram(two_populations(20, share, 10, 0)[0]), EDGES)
    assert found is None or not found.stands_out


def test_a_share_that_is_known_bounds_what_is_looked_for():
    norms, _ = two_populations(3, 0.1, 10, 0)
    assert second_population(histogram(norms), EDGES, about=0.1).share == pytest.approx(0.1, rel=0.1)
    assert second_population(histogram(norms), EDGES, about=0.01) is None


def test_more_patches_need_more_evidence():
    norms, _ = two_populations(1.6, 0.02, 10, 0, count=2000)
    counts = histogram(norms)
    assert needed_gain(1e6) > needed_gain(1e3) > 0
    found = second_population(counts, EDGES, needed=0.0)
    assert found.stands_out
    assert second_population(counts, EDGES, needed=1e9) is None


@pytest.mark.parametrize("norms", [[], [3.0], [3.0, 80.0]])
def test_too_few_norms_have_no_population(norms):
    assert second_population(histogram(np.array(norms)), EDGES) is None
    assert detectable_ratio(histogram(np.array(norms)), 0.02, PER_OCTAVE) is None


@given(st.lists(st.floats(0.1, 1e4), min_size=1, max_size=300), st.floats(0, 1))
def test_quantiles_are_right_to_one_bin(norms, q):
    exact = np.quantile(np.array(norms), q, method="inverted_cdf")
    assert quantile(histogram(np.array(norms)), EDGES, q) == pytest.approx(exact, rel=0.045)


# -- what would have been seen -------------------------------------------------------------------------


def stands_out_in(ratio: float, share: float, count: int, spread: float, seeds: int = 6) -> float:
    """The share of seeds in which such a population beside a lognormal bulk stands out."""
    seen = 0
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        norms = 10 * np.exp(rng.normal(0, spread, count))
        high = rng.choice(count, round(share * count), replace=False)
        norms[high] = 10 * ratio * np.exp(rng.normal(0, 0.2, len(high)))
        found = second_population(histogram(norms), EDGES)
        seen += found is not None and found.stands_out
    return seen / seeds


@pytest.mark.parametrize(("share", "count"), [(0.02, 6000), (0.005, 20000)])
@pytest.mark.parametrize("spread", [0.15, 0.3])
def test_from_the_detectable_ratio_on_populations_stand_out(share, count, spread):
    bulk = 10 * np.exp(np.random.default_rng(99).normal(0, spread, count))
    ratio = detectable_ratio(histogram(bulk), share, PER_OCTAVE)
    assert ratio is not None
    assert stands_out_in(1.1 * ratio, share, count, spread) >= 0.8
    assert stands_out_in(0.7 * ratio, share, count, spread) <= 0.2


def test_more_photos_and_larger_shares_are_detectable_from_smaller_ratios_on():
    def ratio(count: int, share: float) -> float:
        bulk = np.exp(np.random.default_rng(0).normal(0, 0.2, count))
        return detectable_ratio(histogram(bulk), share, PER_OCTAVE) or math.inf

    assert ratio(600, 0.02) > ratio(6000, 0.02) >= ratio(60000, 0.02)
    assert ratio(6000, 0.005) > ratio(6000, 0.02)
    assert ratio(100, 0.001) == math.inf  # a tenth of a patch


def test_an_empty_histogram():
    assert second_population(torch.zeros(BINS, dtype=torch.int64), EDGES) is None
