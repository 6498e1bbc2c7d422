"""Is what lies beyond a threshold an artifact? Each layer is judged, by the shape of its norms and more.

    judgement = judge(statistics, layer)
    judgement.stands, judgement.evidence

The shape comes first: two populations, not a tail (populations.py), both in the norms themselves and relative
to each photo's ordinary norm, so that photos of two kinds are not taken for patches of two kinds. Where
outliers are not far out, the shape alone does not tell artifacts from content: other evidence must speak for
them, too.
"""

from dataclasses import dataclass, replace

import torch

from vitreg.diagnosis.outliers import OutlierRule
from vitreg.diagnosis.populations import CHANCE_GAIN, Population, needed_gain, second_population
from vitreg.diagnosis.statistics import EDGES, Statistics

# Norms of this many times the others' median are far out (published: 3x to 50x). If they are also well apart
# (at most this share of them misjudged), they need no other evidence: tails heavier than log-concave ones
# reach as far, but without a valley (a sixth to a half misjudged; artifacts: to a twentieth).
FAR, APART = 3.0, 0.1
# Evidence that what stands out is one thing, made by the model. In real models without artifacts and under
# tails of every kind, the largest norms share a direction to at most 0.5 (soft artifacts: 0.7 to 0.9), and
# three dimensions hold at most 0.2 of the excess beyond chance (0.45 to 1). In small random models they may
# hold more, but with either sign: no direction.
SHARED_DIRECTION, FEW_DIMENSIONS = 0.6, 0.45
ONE_SIDE = 0.25  # of the direction, before few dimensions count
# Bright patches of random models share a direction, too: that of their content, in many dimensions (to 0.2).
NOT_MANY = 0.25  # of the excess in three dimensions, before a direction counts
ONE_VECTOR = 0.8  # of both
# Where outliers share a direction and few dimensions as clearly as this, less of a shape is needed.
STRONG_DIRECTION, STRONG_DIMENSIONS, STRONG_NEEDS = 0.8, 0.55, 0.4
# Content of small random models looks the same, but nearer (to 1.4x). There, only a strong direction counts.
NEAR = 1.5
DRAWN_ATTENTION = 3.0  # times the even share, in the next block
# At fixed positions one more photo shows nothing new: there, positions are counted and not patches.
BOUND = 0.5
# If this share of them lies in one sixteenth of the photos, it is these photos' own matter, unless they are
# far out in few dimensions.
ONE_GROUP = 0.6
# What was there after block 0 is what the photo shows (white and flat areas have norms of their own), and not
# made by the model, if so much of it is left, unless far out.
INHERITED = 0.5
# The misjudged share of outliers beyond which populations are no two.
MAX_MISJUDGED = 0.75


@dataclass(frozen=True)
class Evidence:
    """What speaks for or against artifacts in one layer, beside the shape of the norms.

    direction       how far outliers differ from ordinary patches by one shared vector, 0 to 1
    few_dimensions  how far three residual dimensions carry their excess squared norm, 0 to 1: 0 is what the
                    three richest ones hold by chance, of which narrow models have more
    attention       attention that they draw in the next block, in even shares (None: no next block)
    bound           share of them at fixed positions
    one_group       share of them in one sixteenth of the photos
    inherited       cosine of what sets them apart to what sets apart the largest norms after block 0 (1 in
                    block 0 itself, 0 where its norms are one population)
    """

    direction: float
    few_dimensions: float
    attention: float | None
    bound: float
    one_group: float
    inherited: float = 0.0

    @property
    def one_vector(self) -> bool:
        """Whether outliers are hardly more than ordinary patches and one vector of a few dimensions."""
        return min(self.direction, self.few_dimensions) >= ONE_VECTOR

    @property
    def strong(self) -> bool:
        """Whether direction and dimensions hardly leave another explanation."""
        return self.direction >= STRONG_DIRECTION and self.few_dimensions >= STRONG_DIMENSIONS

    @property
    def named(self) -> tuple[str, ...]:
        """What speaks for artifacts, in words."""
        words = []
        if self.direction >= SHARED_DIRECTION and self.few_dimensions >= NOT_MANY:
            words.append(f"they share one direction ({self.direction:.2f} of 1)")
        if self.few_dimensions >= FEW_DIMENSIONS and self.direction >= ONE_SIDE:
            words.append(
                f"three residual dimensions carry what sets them apart ({self.few_dimensions:.2f} of 1)"
            )
        if self.attention is not None and self.attention >= DRAWN_ATTENTION:
            words.append(f"they draw {self.attention:.0f}x their share of attention in the next block")
        return tuple(words)


@dataclass(frozen=True)
class Judgement:
    """A layer's second population, if the shape shows one, and whether it is an artifact's.

    `margin` is how many times the shape's gain exceeds what is needed, by the view that shows it least: norms
    themselves, relative to the photo's ordinary ones, and positions where outliers are bound to them. With a
    strong direction it is the better of the first two.
    """

    population: Population | None
    evidence: Evidence | None
    margin: float
    stands: bool

    @property
    def threshold(self) -> float | None:
        return self.population.threshold if self.population is not None and self.stands else None


NOTHING = Judgement(None, None, 0.0, False)


def judge_layers(s: Statistics) -> list[Judgement]:
    """Judge the norms after each block. Block 0 has artifacts of its own only if they are far out."""
    first = judge(s, 0)
    later = [judge(s, layer, first.population) for layer in range(1, len(s.counts))]
    if first.population is not None and first.evidence is not None and first.population.ratio < FAR:
        first = replace(first, evidence=replace(first.evidence, inherited=1.0), stands=False)
    return [first, *later]


def judge(s: Statistics, layer: int, first: Population | None = None) -> Judgement:
    """Judge the norms after one block; `first` is the second population after block 0, if there is one."""
    patches = float(s.counts[layer].sum())
    needed = needed_gain(patches)
    least = CHANCE_GAIN + STRONG_NEEDS * (needed - CHANCE_GAIN)  # chance stays what it is
    # Photos of different brightness blur the norms themselves, which only have to agree.
    absolute = second_population(s.counts[layer], EDGES, needed=least / 4)
    if absolute is None:
        return NOTHING
    evidence = _evidence(s, layer, absolute, first)
    if evidence.one_vector and absolute.ratio >= FAR:  # also photos that are full of outliers
        return Judgement(absolute, evidence, absolute.gain / needed, absolute.gain >= needed)
    relative = second_population(s.relative[layer], EDGES, needed=least)
    if relative is not None:
        agreeing = second_population(s.counts[layer], EDGES, needed=least / 4, about=relative.fraction)
        if agreeing is not None:
            absolute, evidence = agreeing, _evidence(s, layer, agreeing, first)
    if evidence.strong:  # which no mixture of photos brings about: either view will do
        margin = max(absolute.gain, relative.gain if relative is not None else 0.0) / least
    elif relative is not None and agreeing is not None:
        margin = min(relative.gain, 4 * absolute.gain) / needed
    else:
        return NOTHING
    if evidence.bound >= BOUND and absolute.ratio < FAR:
        positions = s.positions.shape[1]
        margin = min(margin, absolute.gain * positions / patches / needed_gain(positions))
    return Judgement(absolute, evidence, margin, _stands(margin, absolute, evidence))


def _stands(margin: float, population: Population, evidence: Evidence) -> bool:
    if margin < 1 or population.misjudged > MAX_MISJUDGED * population.share:
        return False
    if population.ratio >= FAR and population.misjudged <= APART * population.share:
        return evidence.one_group <= ONE_GROUP or evidence.few_dimensions >= ONE_VECTOR
    made = evidence.inherited < INHERITED and (evidence.strong or population.ratio >= NEAR)
    return bool(evidence.named) and evidence.one_group <= ONE_GROUP and made


def _evidence(s: Statistics, layer: int, population: Population, first: Population | None) -> Evidence:
    threshold = population.threshold
    attention = None
    if layer + 1 < len(s.counts):
        by_head = s.attention_beyond(layer + 1, threshold)
        attention = sum(by_head) / len(by_head) / max(population.fraction, 1e-12)
    return Evidence(
        direction=s.direction(layer, threshold),
        few_dimensions=s.few_dimensions(layer, threshold),
        attention=attention,
        bound=s.bound(layer, threshold),
        one_group=s.largest_group(layer, threshold),
        inherited=_inherited(s, OutlierRule(layer, threshold), first),
    )


def _inherited(s: Statistics, rule: OutlierRule, first: Population | None) -> float:
    if first is None:
        return 0.0
    excess = s.excess(rule), s.excess(OutlierRule(0, first.threshold))
    return float(torch.cosine_similarity(*excess, dim=0))
