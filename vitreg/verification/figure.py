"""A Verdict as a figure: the model as it is, with the fix, and the controls, with their intervals."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from vitreg.intervals import Estimate
from vitreg.plots.style import INK, OUTLIER, QUIET, house_style, titled
from vitreg.verification.measures import MEASURES
from vitreg.verification.verdict import Verdict


@house_style
def versions_figure(verdict: Verdict) -> Figure:
    """One panel per question, one row per version of the model: value and 95% interval."""
    rows = _versions(verdict)
    if not rows:
        raise ValueError(f"the verdict is {verdict.verdict!r}: nothing was measured that could be drawn.")
    cost = next(name for name in ("top1", "agreement", "cls", "patches") if name in rows["with the fix"])
    panels = [name for name in ("outliers", "attention", cost) if name in rows["with the fix"]]
    figure = Figure(figsize=(8.4, 1.1 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, name in zip(axes, panels, strict=True):
        _draw_versions(ax, name, rows)
    axes[0].set_yticks(range(len(rows)), list(rows))
    axes[0].invert_yaxis()
    return figure


def _versions(verdict: Verdict) -> dict[str, dict[str, Estimate]]:
    names = {"unfixed": "as it is", "fix": "with the fix"}
    if verdict.controls:
        return {names.get(control.name, control.name): control.measures for control in verdict.controls}
    if not verdict.measures:
        return {}
    before = {x.name: x.before for x in verdict.measures if x.before is not None}
    return {"as it is": before, "with the fix": {x.name: x.after for x in verdict.measures}}


def _draw_versions(ax: Axes, name: str, rows: dict[str, dict[str, Estimate]]) -> None:
    for place, (version, measures) in enumerate(rows.items()):
        if (estimate := measures.get(name)) is None:
            continue
        colour = {"as it is": INK, "with the fix": OUTLIER}.get(version, QUIET)
        if estimate.low is not None and estimate.high is not None:
            ax.plot([estimate.low, estimate.high], [place, place], color=colour, alpha=0.5, linewidth=3)
        ax.plot(estimate.value, place, "o", color=colour)
    if MEASURES[name].format.endswith("%"):
        ax.xaxis.set_major_formatter(PercentFormatter(1))
    ax.grid(axis="x", linewidth=0.4)
    titled(ax, MEASURES[name].label.capitalize())
