"""The log-concave fit is the maximum-likelihood one; EM never loses."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from vitreg.diagnosis import log_concave
from vitreg.diagnosis.log_concave import KNOT_GAIN, fit, log_likelihood, mixture

BINS = 120
SHAPES = {
    "normal": lambda rng, n: rng.normal(60, 12, n),
    "exponential": lambda rng, n: 20 + rng.exponential(15, n),
    "uniform": lambda rng, n: rng.uniform(20, 90, n),
    "two humps": lambda rng, n: np.where(rng.random(n) < 0.1, rng.normal(90, 5, n), rng.normal(45, 6, n)),
    "a shoulder": lambda rng, n: np.where(rng.random(n) < 0.2, rng.uniform(50, 90, n), rng.normal(45, 6, n)),
    "few": lambda rng, n: rng.normal(60, 12, 12),
}
GAPS = (0, 1, 2, 5, 40)


def counts_of(shape: str, seed: int, n: int = 5000) -> np.ndarray:
    values = SHAPES[shape](np.random.default_rng(seed), n)
    return np.bincount(np.clip(values, 0, BINS - 1).astype(int), minlength=BINS).astype(float)


def bends(logs: np.ndarray) -> np.ndarray:
    return np.diff(logs, 2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(4))
def test_a_fit_is_log_concave_and_no_bend_would_gain(shape, seed):
    """The conditions for the maximum (Duembgen and Rufibach 2009, theorem 2.4)."""
    counts = counts_of(shape, seed)
    density = fit(counts)
    seen = np.flatnonzero(counts)
    inside = slice(seen[0], seen[-1] + 1)
    assert density.probability.sum() == pytest.approx(1)
    assert not density.probability[: seen[0]].any()
    assert bends(np.log(density.probability[inside])).max() < 1e-9
    residual = (counts / counts.sum() - density.probability)[inside]
    size = len(residual)
    # What a bend downwards at j would gain: the derivative in the direction -max(k - j, 0).
    gains = np.array([-(residual * np.maximum(np.arange(size) - j, 0)).sum() for j in range(size)])
    # And about how much log-likelihood per observation that would bring.
    hinges = np.maximum(np.arange(size)[:, None] - np.arange(size), 0)
    p = density.probability[inside]
    worth = gains**2 / np.maximum(p @ hinges**2 - (p @ hinges) ** 2, 1e-12) / 2
    assert ((gains <= KNOT_GAIN + 1e-6) | (worth < 1e-8)).all()
    assert (worth[np.setdiff1d(density.knots - seen[0], size - 1)] < 1e-7).all()  # equality at the knots
    assert worth[0] < 1e-8  # the mean is the sample's


@pytest.mark.parametrize("shape", SHAPES)
def test_no_other_log_concave_density_is_likelier(shape):
    """Against a general optimiser: heights are sums of hinges with negative weights."""
    counts = counts_of(shape, 7, n=600)
    counts = counts.reshape(-1, 5).sum(1)  # few bins, for its sake
    seen = np.flatnonzero(counts)
    weights = counts[seen[0] : seen[-1] + 1]
    at = np.arange(len(weights), dtype=float)
    hinges = -np.maximum(at[:, None] - at[1:-1], 0)
    basis = np.concatenate([at[:, None], hinges], 1)

    def loss(x):
        logs = basis @ x
        top = logs.max()
        normal = top + np.log(np.exp(logs - top).sum())
        slope = basis.T @ (weights / weights.sum() - np.exp(logs - normal))
        return -(weights @ logs) / weights.sum() + normal, -slope

    bounds = [(None, None)] + [(0, None)] * (len(at) - 2)
    best = minimize(loss, np.zeros(basis.shape[1]), jac=True, bounds=bounds, options={"maxiter": 5000})
    mine = log_likelihood(counts, fit(counts).probability) / counts.sum()
    assert mine == pytest.approx(-best.fun, abs=2e-4)
    assert mine >= -best.fun - 2e-4


@given(st.lists(st.integers(0, 50), min_size=1, max_size=40).filter(any), st.integers(0, 20))
@settings(max_examples=80, deadline=None)
def test_any_histogram_can_be_fitted_wherever_it_lies(numbers, shift):
    counts = np.array(numbers, dtype=float)
    moved = np.concatenate([np.zeros(shift), counts, np.zeros(5)])
    probability = fit(moved).probability
    assert np.isfinite(probability).all()
    assert probability.sum() == pytest.approx(1)
    assert log_likelihood(moved, probability) <= log_likelihood(moved, moved / moved.sum()) + 1e-9
    np.testing.assert_allclose(probability[shift : shift + len(counts)], fit(counts).probability, atol=1e-9)


@pytest.mark.parametrize("gap", GAPS)
def test_two_or_three_bins_are_fitted_exactly_if_they_are_log_concave(gap):
    counts = np.zeros(60)
    counts[10], counts[11 + gap] = 30, 10
    probability = fit(counts).probability
    if gap == 0:
        np.testing.assert_allclose(probability[10:12], [0.75, 0.25])
    assert (probability[10] > 0) & (probability[11 + gap] > 0)
    assert (np.flatnonzero(probability) == np.arange(10, 12 + gap)).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("start", SHAPES)
def test_where_a_fit_starts_does_not_matter(shape, start):
    counts = counts_of(shape, 1)
    cold, warm = fit(counts), fit(counts, fit(counts_of(start, 2)))
    gain = log_likelihood(counts, warm.probability) - log_likelihood(counts, cold.probability)
    assert abs(gain) < 1e-4 * counts.sum()


def em_gains(counts: np.ndarray, guess: np.ndarray, steps: int, monkeypatch) -> list[float]:
    """The gain after each number of steps."""
    alone = log_likelihood(counts, fit(counts).probability)
    monkeypatch.setattr(log_concave, "EM_GAIN", -np.inf)
    monkeypatch.setattr(log_concave, "EM_SHARE", 0.0)
    found = []
    for count in range(1, steps + 1):
        monkeypatch.setattr(log_concave, "EM_STEPS", count)
        two = mixture(counts, guess, alone)
        if two is None:
            break
        found.append(two.gain)
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", ["two humps", "a shoulder"])
def test_em_gains_at_every_step(shape, seed, monkeypatch):
    counts = counts_of(shape, seed)
    gains = em_gains(counts, (np.arange(BINS) > 65).astype(float), 8, monkeypatch)
    assert len(gains) == 8
    assert np.diff(gains).min() >= 0
    assert gains[-1] > gains[0] + 5
    assert gains[-1] > 30


@pytest.mark.parametrize("seed", range(5))
def test_a_mixture_gives_back_what_was_mixed(seed):
    rng = np.random.default_rng(seed)
    low, high = rng.normal(45, 5, 9000), rng.normal(80, 5, 1000)
    counts = np.bincount(np.concatenate([low, high]).astype(int), minlength=BINS).astype(float)
    alone = log_likelihood(counts, fit(counts).probability)
    two = mixture(counts, (np.arange(BINS) > 60).astype(float), alone)
    assert two.share == pytest.approx(0.1, abs=0.005)
    assert (np.diff(two.posterior) >= 0).all()
    assert two.posterior[:46].max() < 0.01
    assert two.posterior[80:].min() > 0.99
    assert two.gain > 200


def test_a_fixed_share_is_kept():
    counts = counts_of("two humps", 0)
    alone = log_likelihood(counts, fit(counts).probability)
    guess = (np.arange(BINS) > 65).astype(float)
    two = mixture(counts, guess, alone, 0.05)
    assert two.share == 0.05
    assert two.gain < mixture(counts, guess, alone).gain


def test_a_component_that_dies_out_is_none():
    counts = counts_of("normal", 0)
    assert mixture(counts, np.zeros(BINS), 0.0) is None
    assert mixture(counts, np.ones(BINS), 0.0) is None
