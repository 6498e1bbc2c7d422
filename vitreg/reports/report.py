"""A result as one HTML file that opens offline: nothing in it comes from outside, and nothing leaves it.

    write_report(report, "report.html")                       # a Diagnosis
    write_verdict(verdict, "report.html")                     # before and after a fix; write_cure for a Cure
    write_comparison([report, other], "comparison.html")      # checkpoints, or sizes of a model
    write(result, "report.html")                              # any of these

With scripts, photos, layers and the threshold can be chosen (viewer.py); without, and on paper, still
pictures of the same stand in their place. All text from outside (names of models and files, reasons) is
escaped, and the page's own policy forbids all but our one script.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitreg.diagnosis import figures as plots
from vitreg.diagnosis.emergence import Emergence
from vitreg.diagnosis.result import Diagnosis
from vitreg.diagnosis.summary import cautions
from vitreg.evals.result import Comparison, Result
from vitreg.files import write_atomically
from vitreg.plots.style import percent, safe, short_name
from vitreg.reports.evaluation import write_evaluation
from vitreg.reports.html import Facts, Table, page, picture
from vitreg.reports.look import write_look
from vitreg.reports.parts import Banner, about, layer_table, photos, photos_before_and_after, plain_number
from vitreg.search.fix_search import FixSearch
from vitreg.verification.measures import MEASURES
from vitreg.verification.verdict import Verdict, measure_table
from vitreg.version import versions
from vitreg.viewing.result import Look

_KINDS = "a Diagnosis, Verdict, FixSearch, Emergence, Look, or a result of an evaluation"
_TITLES = {
    "helps": ("none", "The fix helps"),
    "no effect": ("", "The fix has no effect"),
    "harms": ("found", "The fix harms"),
    "no artifacts": ("none", "No artifacts: nothing to fix"),
    "no fix": ("found", "Artifacts, and no fix for them"),
}
_HEADS = [
    *("model", "verdict", "images", "layers", "onset", "detect", "threshold", "outliers", "per image"),
    "attention, last block",
]


def write(result: object, path: str | Path) -> Path:
    """Write the report that a result of any of these kinds has; returns the path."""
    if isinstance(result, Diagnosis):
        return write_report(result, path)
    if isinstance(result, Verdict):
        return write_verdict(result, path)
    if isinstance(result, FixSearch):
        return write_cure(result, path)
    if isinstance(result, Emergence):
        return write_comparison(result.diagnoses, path)
    if isinstance(result, Result):
        return write_evaluation([result], path)
    if isinstance(result, Comparison):
        return write_evaluation([result.before, result.after], path)
    if isinstance(result, Look):
        return write_look(result, path)
    raise TypeError(f"found a {type(result).__name__}, but reports are of {_KINDS}.")


def write_report(report: Diagnosis, path: str | Path) -> Path:
    """Write the report on one model; returns the path. Raises OutputError if it cannot be written."""
    kind = "found" if report.has_artifacts else "none"
    lines = [report.reason, *cautions(report)]
    top = Banner(kind, report.verdict.capitalize(), report.model, lines, report.planted)
    return write_atomically(path, _one_model(plots.headline(report), report.versions, top, report))


def write_cure(cure: FixSearch, path: str | Path) -> Path:
    """Write the report on what `find_fix` found: the verdict on its fix, and why the fix is of its kind."""
    return write_verdict(cure.verdict, path, choice="" if cure.fix is None else cure.choice)


def write_verdict(verdict: Verdict, path: str | Path, *, choice: str = "") -> Path:
    """Write the report on a model before and after a fix; `choice` says why this fix. Returns the path."""
    kind, title = _TITLES[verdict.verdict]
    lines = [verdict.reason, *([f"Chosen: {choice}"] if choice else [])]
    top = Banner(kind, title, verdict.model, lines, verdict.planted)
    headline = f"{safe(short_name(verdict.model), 60)}: {title.lower()}"
    if verdict.after is None:
        return write_atomically(path, _one_model(headline, verdict.versions, top, verdict.before))
    html = page(
        "verdict.html",
        headline,
        verdict.versions,
        top=top,
        photos=photos_before_and_after(verdict.before, verdict.after),
        model=about(verdict.before),
        fixed=layer_table(verdict.after),
        **_measured(verdict),
    )
    return write_atomically(path, html)


def write_comparison(reports: Sequence[Diagnosis], path: str | Path) -> Path:
    """Write one page about several checkpoints or sizes, in the order given; returns the path."""
    found = Emergence(list(reports))
    labels = found.labels
    shares = (f"{name} {percent(x.outlier_fraction)}" for name, x in zip(labels, reports, strict=True))
    html = page(
        "comparison.html",
        f"{len(reports)} models compared",
        versions(),
        photos=None,
        emergence=picture(found.figure, f"Share of outliers by model: {'; '.join(shares)}"),
        models=Table(_HEADS, [_row(name, x) for name, x in zip(labels, reports, strict=True)]),
        reasons=[(x.model, x.reason) for x in reports],
    )
    return write_atomically(path, html)


def _one_model(headline: str, made_with: dict[str, str], top: Banner, report: Diagnosis) -> str:
    """The page on one model."""
    return page("diagnosis.html", headline, made_with, top=top, model=about(report), photos=photos(report))


def _measured(verdict: Verdict) -> dict[str, Any]:
    """What was measured, with the controls: a figure, and all numbers."""
    drawn = ", ".join(MEASURES[measure.name].label.strip() for measure in verdict.measures)
    neurons = "; ".join(str(verdict.fix.neurons).splitlines())
    fix: Facts = [("Fix", f"type {verdict.fix.type!r}"), ("Neurons", neurons)]
    return {
        "fix": fix,
        "compared": picture(verdict.figure, f"Versions of the model, compared by {drawn}"),
        "controls": bool(verdict.controls),
        "measures": Table(*measure_table(verdict)),
        "footnotes": verdict.footnotes(),
    }


def _row(label: str, x: Diagnosis) -> list[str]:
    """What the comparison says of one model."""
    return [
        label,
        x.verdict + (" (a phantom)" if x.planted else ""),
        f"{x.images:,}",
        str(len(x.layers)),
        "-" if x.onset_layer is None else str(x.onset_layer),
        str(x.detect_layer) if x.has_artifacts else "-",
        plain_number(x.threshold),
        percent(x.outlier_fraction),
        f"{x.outliers_per_image:.2f}",
        percent(x.attention_to_outliers),
    ]
