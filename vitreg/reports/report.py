"""A result as one HTML file that opens offline: nothing in it comes from outside, and nothing leaves it.

    write_report(report, "report.html")                       # a Diagnosis
    write_verdict(verdict, "report.html")                     # before and after a fix; write_cure for a Cure
    write_comparison([report, other], "comparison.html")      # checkpoints, or sizes of a model
    write(result, "report.html")                              # any of these

With scripts, photos, layers and the threshold can be chosen (report_view.py); without, and on paper, still
pictures of the same stand in their place. All text from outside (names of models and files, reasons) is
escaped, and the page's own policy forbids all but our one script.
"""

from collections.abc import Sequence
from pathlib import Path

from vitreg.diagnosis import figures as plots
from vitreg.diagnosis.emergence import Emergence, short_labels
from vitreg.diagnosis.result import Diagnosis
from vitreg.files import write_atomically
from vitreg.plots.style import percent, safe, short_name
from vitreg.reports.html import facts, note, page, picture, section, table
from vitreg.reports.parts import (
    banner,
    failed,
    figures,
    key_facts,
    layer_table,
    other_kinds,
    photos,
    photos_before_and_after,
    plain_number,
)
from vitreg.reports.viewer import script_for
from vitreg.search.find_fix import FixSearch
from vitreg.verification.figure import versions_figure
from vitreg.verification.measures import MEASURES
from vitreg.verification.verdict import Verdict, measure_table
from vitreg.version import versions

_HOW_EMERGENCE = (
    "Above, the share of patch tokens that are outliers, in the layer where they stand out most. Below, the "
    "same for every layer. Models of different depths are stretched to the same height."
)
_HOW_VERDICT = "The same images in every version of the model. Bars are 95% bootstrap intervals over images."
_HOW_CONTROLS = (
    " The controls: an inert token and random neurons must do less than the fix; the neurons zeroed or at "
    "their mean show what their absence alone does."
)
_KINDS = "a Diagnosis, Verdict, FixSearch or Emergence"
_TITLES = {
    "helps": ("none", "The fix helps"),
    "no effect": ("", "The fix has no effect"),
    "harms": ("found", "The fix harms"),
    "no artifacts": ("none", "No artifacts: nothing to fix"),
    "no fix": ("found", "Artifacts, and no fix for them"),
}


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
    raise TypeError(f"found a {type(result).__name__}, but reports are of {_KINDS}.")


def write_report(report: Diagnosis, path: str | Path) -> Path:
    """Write the report on one model; returns the path. Raises OutputError if it cannot be written."""
    kind = "found" if report.has_artifacts else "none"
    top = banner(kind, report.verdict.capitalize(), report.model, [report.reason], report.planted)
    body = [top, *_of_one_model(report)]
    return write_atomically(path, page(plots.headline(report), body, report.versions, script_for(body)))


def write_cure(cure: FixSearch, path: str | Path) -> Path:
    """Write the report on what `find_cure` found: the verdict on its fix, and why the fix is of its kind."""
    return write_verdict(cure.verdict, path, choice="" if cure.fix is None else cure.choice)


def write_verdict(verdict: Verdict, path: str | Path, *, choice: str = "") -> Path:
    """Write the report on a model before and after a fix; `choice` says why this fix. Returns the path."""
    kind, title = _TITLES[verdict.verdict]
    chosen = [f"Chosen: {choice}"] if choice else []
    body = [banner(kind, title, verdict.model, [verdict.reason, *chosen], verdict.planted)]
    before, after = verdict.before, verdict.after
    if after is None:
        body += _of_one_model(before)
    else:
        body += [
            section("Before and after", photos_before_and_after(before, after)),
            section("Verdict", _verdict(verdict)),
            section("The model as it is: key facts", key_facts(before)),
            section("The model as it is: norms, layers, places", figures(before)),
            *other_kinds(before),
            section("The model as it is: every layer", layer_table(before)),
            section("The model with the fix: every layer", layer_table(after)),
            *failed(before.failed_images),
        ]
    headline = f"{safe(short_name(verdict.model), 60)}: {title.lower()}"
    return write_atomically(path, page(headline, body, verdict.versions, script_for(body)))


def write_comparison(reports: Sequence[Diagnosis], path: str | Path) -> Path:
    """Write one page about several checkpoints or sizes, in the order given; returns the path."""
    labels = short_labels([report.model for report in reports])
    figure = plots.emergence(list(zip(labels, reports, strict=True)))
    alt = "Share of outliers by model: " + "; ".join(
        f"{label} {percent(report.outlier_fraction)}" for label, report in zip(labels, reports, strict=True)
    )
    body = [
        f"<header><h1>{len(reports)} models compared</h1></header>",
        section("Emergence", picture(figure, alt, _HOW_EMERGENCE)),
        section("Every model", _comparison_table(labels, reports)),
    ]
    return write_atomically(path, page(f"{len(reports)} models compared", body, versions()))


def _of_one_model(report: Diagnosis) -> list[str]:
    return [
        section("Key facts", key_facts(report)),
        section("Photos", photos(report)),
        section("Norms, layers, places", figures(report)),
        *other_kinds(report),
        section("Every layer", layer_table(report)),
        *failed(report.failed_images),
    ]


def _verdict(verdict: Verdict) -> str:
    """What was measured, with the controls: a figure, and all numbers."""
    drawn = ", ".join(MEASURES[measure.name].label.strip() for measure in verdict.measures)
    how = _HOW_VERDICT + (_HOW_CONTROLS if verdict.controls else "")
    figure = picture(versions_figure(verdict), f"Versions of the model, compared by {drawn}", how)
    heads, rows = measure_table(verdict)
    fix = facts(
        [("Fix", f"type {verdict.fix.type!r}"), ("Neurons", "; ".join(str(verdict.fix.neurons).splitlines()))]
    )
    return fix + figure + table(heads, rows) + "".join(map(note, verdict.footnotes()))


def _comparison_table(labels: Sequence[str], reports: Sequence[Diagnosis]) -> str:
    heads = ["model", "verdict", "images", "layers", "onset", "detect", "threshold", "outliers"]
    heads += ["per image", "attention, last block"]
    rows = [
        [
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
        for label, x in zip(labels, reports, strict=True)
    ]
    return table(heads, rows) + facts((x.model, x.reason) for x in reports)
