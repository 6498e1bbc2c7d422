"""Do norms form one population or two? The shape of their histogram says, at any ratio that it can show.

    population = second_population(counts, EDGES)
    population.threshold, population.share, population.misjudged

One population of norms is taken to be log-concave on a log axis: normal, lognormal of any spread,
exponential, Student and Pareto tails all are. Two humps, a shoulder or a plateau are not, however close they
are to the bulk. So the best single log-concave density is compared with the best mixture of two, and the
threshold is where the second is clearly the likelier one.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from vitreg.diagnosis.log_concave import Density, Mixture, fit, log_likelihood, mixture

# What twice the log-likelihood must gain by a second population: more than chance gives (a chi-square of a
# few parameters, and patches of one photo are alike), and more per 1000 patches than the bulk of real models
# without artifacts deviates from log-concavity (a DeiT-Ti's first six blocks: at most 7; soft artifacts: 15
# and more; `benchmarks/power.py` counts both).
CHANCE_GAIN, GAIN_PER_1000 = 40.0, 12.0
# A patch is called an outlier from this probability on: if it is twice as likely to be one as not.
LIKELY = 2 / 3
# More than this share of the patches is no second population but half of the first.
MAX_SHARE = 0.25
# A smaller second population is taken while it explains the norms nearly as well: it is tried in steps.
NEARLY, SMALLER = 0.995, 0.9
# What is looked for where nothing was found: a lognormal population of this spread, at most so far out.
SPREAD, MOST_RATIO = 0.2, 64.0
# Thresholds that misjudge this little more than the best one, as a share of the outliers, are as good.
AS_GOOD = 0.002
# A single stray before an empty range of WIDE bins belongs to the nearer population, if MANY are behind it.
WIDE, MANY = 16, 20


@dataclass(frozen=True)
class Population:
    """A second population of norms, above the first.

    threshold   the norm (a bin edge) from which on a patch is called an outlier
    fraction    share of patches at or beyond it, `ratio` their median norm over that of the others
    share       the second population's share of all patches, as the mixture has it
    misjudged   share of all patches that the threshold puts into the wrong population
    gain        twice the log-likelihood ratio of two populations against one, `needed` the least that counts
    posterior   per bin, the probability that a patch with such a norm belongs to it
    """

    threshold: float
    fraction: float
    ratio: float
    share: float
    misjudged: float
    gain: float
    needed: float
    posterior: Float[np.ndarray, " bins"]

    @property
    def stands_out(self) -> bool:
        """Whether one population cannot explain these norms."""
        return self.gain >= self.needed


def needed_gain(patches: float) -> float:
    """What twice the log-likelihood must gain over so many patches before a second population counts."""
    return CHANCE_GAIN + GAIN_PER_1000 * patches / 1000


def second_population(
    counts: Int[Tensor, " bins"],
    edges: Float[Tensor, " edges"],
    *,
    needed: float | None = None,
    about: float | None = None,
) -> Population | None:
    """The second population that explains a histogram best; None where none could gain what is `needed`.

    `counts` per bin, `edges` (bins + 1) norms in equal ratios. `needed` is `needed_gain` if not given.
    `about`: the share that is looked for, where it is known from elsewhere (at most three times as much).
    """
    numbers = counts.double().cpu().numpy()
    total = float(numbers.sum())
    if total < 3:
        return None
    needed = needed_gain(total) if needed is None else needed
    single = fit(numbers)
    alone = log_likelihood(numbers, single.probability)
    if 2 * (log_likelihood(numbers, numbers / total) - alone) < needed:
        return None
    bins = np.arange(len(numbers))
    guesses = [(bins >= start).astype(float) for start in _starts(numbers, single, about)]
    mixtures = [m for guess in guesses if (m := mixture(numbers, guess, alone))]
    most = MAX_SHARE if about is None else min(3 * about, MAX_SHARE)
    possible = [m for m in mixtures if m.share <= most and m.posterior.max() >= LIKELY and m.gain > 0]
    if not possible:
        return None
    best = _fewest(numbers, max(possible, key=lambda m: m.gain), alone)
    return _population(numbers, edges.double().cpu().numpy(), best, needed)


def _fewest(counts: Float[np.ndarray, " bins"], best: Mixture, alone: float) -> Mixture:
    """The mixture with the smallest second population that explains the norms nearly as well as the best one.

    Where populations overlap, the likelihood hardly minds how what lies between is shared out.
    """
    fewest, most_gained = best, best.gain
    while True:
        fewer = mixture(counts, fewest.posterior, alone, SMALLER * fewest.share)
        if fewer is None or fewer.gain < NEARLY * most_gained or fewer.posterior.max() < LIKELY:
            return fewest
        fewest, most_gained = fewer, max(most_gained, fewer.gain)


def _starts(counts: Float[np.ndarray, " bins"], single: Density, about: float | None) -> list[int]:
    """Bins beyond which a second population may lie: where most is left unexplained, and nearer the bulk."""
    total = counts.sum()
    beyond = counts[::-1].cumsum()[::-1] / total
    excess = beyond - single.probability[::-1].cumsum()[::-1]
    median = int(np.searchsorted(counts.cumsum(), total / 2))
    excess[: median + 2] = 0.0
    worst = int(excess.argmax())
    starts = {worst, (worst + median) // 2 + 1, _behind_widest_gap(counts, median)}
    if about is not None:
        starts.add(int(np.argmax(beyond <= about)))
    return sorted(bin for bin in starts if beyond[bin] > 0 and beyond[bin] <= 1.5 * MAX_SHARE)


def _behind_widest_gap(counts: Float[np.ndarray, " bins"], median: int) -> int:
    """The first occupied bin behind the widest empty range above the median."""
    occupied = np.flatnonzero(counts[median:]) + median
    if len(occupied) < 2:
        return median
    return int(occupied[int(np.diff(occupied).argmax()) + 1])


def _population(
    counts: Float[np.ndarray, " bins"], edges: Float[np.ndarray, " edges"], best: Mixture, needed: float
) -> Population:
    total = counts.sum()
    bin = _threshold_bin(counts, best)
    beyond, below = counts[bin:], counts[:bin]
    return Population(
        threshold=float(edges[bin]),
        fraction=float(beyond.sum() / total),
        ratio=quantile(beyond, edges[bin:], 0.5) / quantile(below, edges, 0.5),
        share=float(counts @ best.posterior / total),
        misjudged=float(_misjudged(counts, best.posterior)[bin] / total),
        gain=2 * best.gain,
        needed=needed,
        posterior=best.posterior,
    )


def _misjudged(
    counts: Float[np.ndarray, " bins"], posterior: Float[np.ndarray, " bins"]
) -> Float[np.ndarray, " edges"]:
    """How many patches a threshold at each edge is expected to put into the wrong population."""
    missed = np.append(0.0, (counts * posterior).cumsum())
    false = np.append((counts * (1 - posterior))[::-1].cumsum()[::-1], 0.0)
    return missed + false


def _threshold_bin(counts: Float[np.ndarray, " bins"], best: Mixture) -> int:
    """The first bin where a patch is LIKELY an outlier; the middle of a wide range that does as well."""
    first = _behind_stray(counts, int(np.argmax(best.posterior >= LIKELY)))
    misjudged = _misjudged(counts, best.posterior)
    as_good = misjudged <= misjudged[first] + AS_GOOD * best.share * counts.sum()
    last = first
    while last + 1 < len(as_good) and as_good[last + 1] and counts[last + 1 :].any():
        last += 1
    return (first + last + 1) // 2


def _behind_stray(counts: Float[np.ndarray, " bins"], first: int) -> int:
    """The bin from which outliers are counted: behind a single stray that lies nearer to the others."""
    occupied = np.flatnonzero(counts[first:])[:2] + first
    below = np.flatnonzero(counts[:first])
    if len(occupied) < 2 or not len(below) or counts[occupied[0]] > 1 or counts[first:].sum() < MANY:
        return first
    stray, next_one = occupied
    wide = next_one - stray >= max(WIDE, 2 * (stray - below[-1]))
    return int(stray) + 1 if wide else first


def quantile(
    counts: Float[np.ndarray, " bins"] | Tensor, edges: Float[np.ndarray, " edges"] | Tensor, q: float
) -> float:
    """The q-quantile of a histogram, interpolated (geometrically) within its bin."""
    numbers, at = np.asarray(counts, dtype=float), np.asarray(edges, dtype=float)
    mass = numbers.cumsum()
    rank = max(q * float(mass[-1]), 0.5)
    index = min(int(np.searchsorted(mass, rank)), len(numbers) - 1)
    inside = (rank - (mass[index] - numbers[index])) / max(numbers[index], 1.0)
    low, high = float(at[index]), float(at[index + 1])
    return float(low * (high / low) ** min(max(inside, 0.0), 1.0))


# -- what would have been seen -------------------------------------------------------------------------


def detectable_ratio(counts: Int[Tensor, " bins"], share: float, per_octave: int) -> float | None:
    """From which multiple of the median norm on such a share of the patches would have stood out.

    The share is put beside the histogram's own patches as a lognormal population with a spread of 0.2; what
    two populations would gain on average is compared with what is needed. None: not even MOST_RATIO times it.
    """
    numbers = counts.double().cpu().numpy()
    if numbers.sum() < 3:
        return None
    alone = fit(numbers).probability
    median = int(np.searchsorted(numbers.cumsum(), numbers.sum() / 2))
    spread = SPREAD / np.log(2) * per_octave

    def stands_out(steps: int) -> bool:
        extra = np.exp(-0.5 * ((np.arange(len(numbers)) - median - steps) / spread) ** 2)
        extra *= share / extra.sum()
        both, truth = (1 - share) * numbers + numbers.sum() * extra, (1 - share) * alone + extra
        gain = log_likelihood(both, truth) - log_likelihood(both, fit(both).probability)
        return bool(2 * gain >= needed_gain(float(numbers.sum())))

    low, high = 1, int(np.log2(MOST_RATIO) * per_octave)
    if not stands_out(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if stands_out(middle) else (middle, high)
    return float(2 ** (high / per_octave))
