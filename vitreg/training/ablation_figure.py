"""Metrics, artifacts and cost against the number of registers.

ablation(found).savefig("ablation.png")
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from vitreg.plots.style import INK, NORMAL, OUTLIER, QUIET, house_style, safe, titled
from vitreg.training.cost import CLAIMED

if TYPE_CHECKING:
    from vitreg.training.ablation import Ablation, Arm

# Okabe and Ito's palette, after the two colours that mean normal and outlier.
_COLOURS = ("#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_NAMES = {"top1": "top-1", "knn": "k-NN top-1"}


@house_style
def ablation(found: Ablation) -> Figure:
    """Four panels: metrics with their 95% intervals, artifacts, FLOPs beside the paper's claims, speed."""
    figure = Figure(figsize=(8.6, 6.0), layout="constrained")
    (metrics, artifacts), (flops, speed) = figure.subplots(2, 2)
    _draw_metrics(metrics, found.arms)
    _draw_artifacts(artifacts, found.arms)
    _draw_flops(flops, found)
    _draw_speed(speed, found.arms)
    for ax in (metrics, artifacts, flops, speed):
        ax.set_xticks(range(len(found.arms)), [str(arm.registers) for arm in found.arms])
        ax.set_xlim(-0.4, len(found.arms) - 0.6)
    for ax in (flops, speed):
        ax.set_xlabel("registers")
    figure.suptitle(safe(found.about, 110), x=0.01, ha="left", fontsize=9.5)
    return figure


def _draw_metrics(ax: Axes, arms: Sequence[Arm]) -> None:
    places = np.arange(len(arms))
    for name, label in _NAMES.items():
        if all(name in arm.logged for arm in arms):
            ax.plot(places, [arm.logged[name] / 100 for arm in arms], "o-", color=NORMAL, label=label)
    for task, colour in zip(arms[0].results, _COLOURS, strict=False):
        metric = next(iter(arms[0].results[task].metrics))
        scores = [arm.results[task].estimates()[metric] for arm in arms]
        values = np.array([score.value for score in scores])
        low, high = (np.array([getattr(score, side) for score in scores]) for side in ("low", "high"))
        ends = np.abs(np.stack([values - low, high - values]))
        ax.errorbar(places, values, ends, fmt="o-", color=colour, elinewidth=0.8, label=f"{task} {metric}")
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    titled(ax, "Metrics (bars: 95% interval)", columns=2)


def _draw_artifacts(ax: Axes, arms: Sequence[Arm]) -> None:
    """Largest norm over median, with the share of outliers and of attention on them in words."""
    places = [i for i, arm in enumerate(arms) if "norm_ratio" in arm.logged]
    ratios = [arms[i].logged["norm_ratio"] for i in places]
    ax.plot(places, ratios, "o-", color=OUTLIER)
    for place, ratio in zip(places, ratios, strict=True):
        words = f"{arms[place].logged['outliers']:.2g}%"
        above: dict[str, Any] = {
            "textcoords": "offset points",
            "ha": "center",
            "fontsize": 7.5,
            "color": QUIET,
        }
        ax.annotate(words, (place, ratio), (0, 6), **above)
    ax.set_ylim(0, 1.2 * max(ratios, default=1.0))
    ax.set_ylabel("largest norm over median")
    titled(ax, "Artifacts (and share of outliers)")


def _draw_flops(ax: Axes, found: Ablation) -> None:
    """By how much FLOPs grow here and in the paper's models; the paper's claims as bars."""
    kinds = zip(found.growth().items(), (INK, *_COLOURS), strict=False)
    for (name, shares), colour in kinds:
        ax.plot(shares, "o-", color=colour, label="this model" if name == "here" else name)
    claimed = [(i, CLAIMED[arm.registers]) for i, arm in enumerate(found.arms) if arm.registers in CLAIMED]
    if claimed:
        places, limits = zip(*claimed, strict=True)
        low, high = np.array(places) - 0.3, np.array(places) + 0.3
        ax.hlines(limits, low, high, color=OUTLIER, lw=2.2, label="claimed at most (Darcet et al.)", zorder=3)
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.set_ylabel("more FLOPs")
    ax.set_ylim(bottom=0)
    titled(ax, "Cost of a forward pass", columns=2)


def _draw_speed(ax: Axes, arms: Sequence[Arm]) -> None:
    ax.axhline(1, color=QUIET, lw=0.8, ls="--", zorder=0)
    ax.plot([arm.speed.ratio for arm in arms], "o-", color=NORMAL, label="median of rounds")
    ax.plot([arm.speed.best_ratio for arm in arms], "o-", color=QUIET, label="best of rounds")
    ax.set_ylabel(f"photos/s over those with {arms[0].registers} registers")
    ax.set_ylim(0, 1.15 * max(max(arm.speed.ratio, arm.speed.best_ratio) for arm in arms))
    titled(ax, "Speed, measured", columns=2)
