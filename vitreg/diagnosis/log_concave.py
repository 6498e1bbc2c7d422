"""Log-concave densities on a histogram, and mixtures of two: what one hump can explain, and what it cannot.

    density = fit(counts)                        # maximum likelihood, log-probabilities per bin
    two = mixture(counts, first_guess, alone)    # EM from a first guess of each bin's component
    two.posterior                                # per bin, the probability of the second component

A density is log-concave if its logarithm is concave: normal, lognormal, exponential and Pareto tails are
(on a log axis), two humps, shoulders and plateaus are not. Its maximum-likelihood estimate is piecewise
linear with few knots (Duembgen and Rufibach 2009); mixtures are fitted by EM (Chang and Walther 2007).
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

# A knot is added while it gains more log-likelihood per observation and unit of slope than this.
KNOT_GAIN = 3e-5
MOST_KNOTS = 24
NEWTON_STEPS = 25
# Beyond its own observations a component of a mixture falls at least by this factor per bin.
TAIL = np.exp(-0.35)
# EM stops where a step gains less than this, or than this share of what the mixture has gained so far.
EM_STEPS, EM_GAIN, EM_SHARE = 60, 0.05, 2e-3
# Knots that a step of EM may add to a component: the next steps go on from there.
EM_ROUNDS = 4
# Both components of a mixture, each times its share.
Parts = tuple[Float[np.ndarray, " bins"], Float[np.ndarray, " bins"]]
# Weights under this share of the largest are no observations.
NEGLIGIBLE = 1e-9


@dataclass
class Density:
    """A log-concave probability per bin: piecewise linear `heights` (logarithms) at `knots` (bins)."""

    knots: Int[np.ndarray, " m"]
    heights: Float[np.ndarray, " m"]
    probability: Float[np.ndarray, " bins"]


def fit(
    weights: Float[np.ndarray, " bins"], start: Density | None = None, rounds: int = 2 * MOST_KNOTS
) -> Density:
    """The log-concave density that maximises sum(weights * log p); `start` is one that may be near.

    An active set of knots: Newton's method on the heights at the knots, dropping those where concavity would
    be lost, then one more knot where it gains most.
    """
    weights = np.asarray(weights, dtype=float)
    seen = np.flatnonzero(weights > NEGLIGIBLE * weights.max())
    first, last = int(seen[0]), int(seen[-1])
    share = weights[first : last + 1] / weights[first : last + 1].sum()
    if last - first < 2:  # any two bins are log-concave
        inside = np.log(np.maximum(share, 1e-12))
        return Density(np.arange(first, last + 1), inside, _placed(inside, first, len(weights)))
    knots, heights = _feasible(start, first, last)
    for _ in range(rounds):
        knots, heights = _newton(share, knots, heights)
        logs = np.interp(np.arange(len(share)), knots, heights)
        gain = _gains(share - np.exp(logs))
        gain[knots] = 0.0
        best = int(gain.argmax())
        if gain[best] <= KNOT_GAIN or len(knots) >= MOST_KNOTS:
            break
        at = int(np.searchsorted(knots, best))
        knots, heights = np.insert(knots, at, best), np.insert(heights, at, logs[best])
    return Density(knots + first, heights, _placed(logs, first, len(weights)))


def _placed(logs: Float[np.ndarray, " k"], first: int, bins: int) -> Float[np.ndarray, " bins"]:
    probability = np.zeros(bins)
    inside = np.exp(logs - logs.max())
    probability[first : first + len(logs)] = inside / inside.sum()
    return probability


def _feasible(
    start: Density | None, first: int, last: int
) -> tuple[Int[np.ndarray, " m"], Float[np.ndarray, " m"]]:
    """Knots and heights to begin with, counted from `first`: those of `start`, or a flat line."""
    size = last - first
    inside = start is not None and (start.knots >= first) & (start.knots <= last)
    if start is None or np.sum(inside) < 2:
        return np.array([0, size]), np.full(2, -np.log(size + 1))
    inner = (start.knots > first) & (start.knots < last)
    knots = np.concatenate([[first], start.knots[inner], [last]])
    heights = np.interp(knots, start.knots, start.heights)
    # Observations beyond the ends of `start`: its first and last pieces go on.
    slopes = np.diff(start.heights) / np.diff(start.knots)
    heights[0] += slopes[0] * min(first - start.knots[0], 0)
    heights[-1] += slopes[-1] * max(last - start.knots[-1], 0)
    return knots - first, heights


def _newton(
    share: Float[np.ndarray, " k"], knots: Int[np.ndarray, " m"], heights: Float[np.ndarray, " m"]
) -> tuple[Int[np.ndarray, " fewer"], Float[np.ndarray, " fewer"]]:
    """Maximise sum(share * f) - sum(exp(f)) over concave f that bend at these knots only."""
    basis = _hats(knots, len(share))
    for _ in range(NEWTON_STEPS):
        logs = basis @ heights
        probability = np.exp(logs)
        slope = basis.T @ (share - probability)
        curvature = (basis * probability[:, None]).T @ basis
        diagonal = curvature.ravel()[:: len(knots) + 1]  # a view
        diagonal += 1e-12 + 1e-9 * diagonal
        step = np.linalg.solve(curvature, slope)
        expected = float(slope @ step)
        if expected < 1e-9:
            break
        length = _damped(share, logs, basis @ step, expected)
        length, lost = _still_concave(knots, heights, length * step, length)
        heights = heights + length * step
        if lost is not None:
            knots, heights = np.delete(knots, lost), np.delete(heights, lost)
            basis = _hats(knots, len(share))
    return knots, heights


def _hats(knots: Int[np.ndarray, " m"], size: int) -> Float[np.ndarray, "k m"]:
    """The piecewise linear functions that are 1 at one knot and 0 at the others."""
    bins = np.arange(size)
    left = np.clip(np.searchsorted(knots, bins, side="right") - 1, 0, len(knots) - 2)
    part = (bins - knots[left]) / (knots[left + 1] - knots[left])
    basis = np.zeros((size, len(knots)))
    basis[bins, left] = 1 - part
    basis[bins, left + 1] = part
    return basis


def _damped(
    share: Float[np.ndarray, " k"],
    logs: Float[np.ndarray, " k"],
    change: Float[np.ndarray, " k"],
    expected: float,
) -> float:
    """How much of a Newton step, which changes the logarithms so, gains (Armijo's rule)."""
    before, length = _value(share, logs), 1.0
    while length > 1e-6 and _value(share, logs + length * change) < before + 1e-4 * length * expected:
        length /= 2
    return length


def _value(share: Float[np.ndarray, " k"], logs: Float[np.ndarray, " k"]) -> float:
    return float(share @ logs - np.exp(np.minimum(logs, 50.0)).sum())


def _still_concave(
    knots: Int[np.ndarray, " m"],
    heights: Float[np.ndarray, " m"],
    change: Float[np.ndarray, " m"],
    length: float,
) -> tuple[float, int | None]:
    """How far one may go without a bend upwards, and the knot that is straight there, if one is."""
    if len(knots) < 3:
        return length, None
    wide = knots[1:] - knots[:-1]
    bend = _bends(heights, wide)
    new = _bends(heights + change, wide)
    turning = new < 0
    if not turning.any():
        return length, None
    reach = np.where(turning, np.maximum(bend, 0) / np.maximum(bend - new, 1e-300), np.inf)
    knot = int(reach.argmin())
    return length * float(reach[knot]), knot + 1


def _bends(heights: Float[np.ndarray, " m"], wide: Int[np.ndarray, " m-1"]) -> Float[np.ndarray, " m-2"]:
    """How much the slope falls at each inner knot; slices, for np.diff takes longer than its sum here."""
    slopes = (heights[1:] - heights[:-1]) / wide
    bends: Float[np.ndarray, " m-2"] = slopes[:-1] - slopes[1:]
    return bends


def _gains(residual: Float[np.ndarray, " k"]) -> Float[np.ndarray, " k"]:
    """What a bend downwards at each bin would gain: -sum over k > j of (k - j) residual[k]."""
    after = np.append(residual[::-1].cumsum()[::-1][1:], 0.0)
    return -after[::-1].cumsum()[::-1]


# -- two components ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mixture:
    """Two log-concave densities on one histogram, the second above the first.

    `share` is that of the second; `posterior` per bin the probability that an observation there belongs to it
    (never falling above the first's mode, 0 below it); `gain` the log-likelihood over that of the best single
    log-concave density.
    """

    share: float
    gain: float
    posterior: Float[np.ndarray, " bins"]
    first: Float[np.ndarray, " bins"]
    second: Float[np.ndarray, " bins"]


def mixture(
    counts: Float[np.ndarray, " bins"],
    first_guess: Float[np.ndarray, " bins"],
    alone: float,
    fixed_share: float | None = None,
) -> Mixture | None:
    """The mixture that EM reaches from a first guess of the posterior; None where a component dies out.

    `alone` is the log-likelihood of the best single density, which the gain is measured by. `fixed_share`
    holds the second component's share.
    """
    total, second = counts.sum(), first_guess
    low: Density | None = None
    high: Density | None = None
    best: tuple[float, float, Parts] | None = None  # the log-likelihood, the share and both parts
    for _ in range(EM_STEPS):
        above = counts * second
        share = above.sum() / total if fixed_share is None else fixed_share
        if above.sum() < 2 or (counts - above).sum() < 2:
            return None
        low, high = fit(counts - above, low, EM_ROUNDS), fit(above, high, EM_ROUNDS)
        p, q = (1 - share) * _with_tails(low.probability), share * _with_tails(high.probability)
        second = q / np.maximum(p + q, 1e-300)
        value = log_likelihood(counts, p + q)
        gained = np.inf if best is None else value - best[0]
        if gained > 0:
            best = value, float(share), (p, q)
        if gained < max(EM_GAIN, EM_SHARE * (value - alone)):
            break
    return None if best is None else _mixture(*best, alone)


def _mixture(value: float, share: float, parts: Parts, alone: float) -> Mixture:
    p, q = parts
    above_mode = np.arange(len(p)) > int(p.argmax())
    second = q / np.maximum(p + q, 1e-300)
    posterior = np.maximum.accumulate(np.where(above_mode, second, 0.0))
    return Mixture(share, value - alone, posterior, p, q)


def _with_tails(probability: Float[np.ndarray, " bins"]) -> Float[np.ndarray, " bins"]:
    """A density that goes on beyond its observations, as steeply as it ends, and at least by TAIL per bin."""
    seen = np.flatnonzero(probability > 0)
    first, last = int(seen[0]), int(seen[-1])
    right = left = TAIL
    if last > first:
        right = min(probability[last] / probability[last - 1], TAIL)
        left = min(probability[first] / probability[first + 1], TAIL)
    longer = probability.copy()
    longer[last + 1 :] = probability[last] * right ** np.arange(1, len(probability) - last)
    longer[:first] = (probability[first] * left ** np.arange(1, first + 1))[::-1]
    return longer / longer.sum()


def log_likelihood(counts: Float[np.ndarray, " bins"], probability: Float[np.ndarray, " bins"]) -> float:
    """Of a histogram under a probability per bin."""
    seen = counts > 0
    return float(counts[seen] @ np.log(np.maximum(probability[seen], 1e-300)))
