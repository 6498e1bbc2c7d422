"""What a report says of a diagnosis, part by part: HTML that stands on its own, also on paper."""

from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise

from vitreg.diagnosis import figures as plots
from vitreg.diagnosis.kinds import Finding
from vitreg.diagnosis.result import (
    STRENGTHS,
    Diagnosis,
    LayerDiagnosis,
    describe_positions,
    would_have_been_seen,
)
from vitreg.diagnosis.version_figures import before_after
from vitreg.diagnosis.wording import name_of_queries, words_of_sink
from vitreg.plots.style import number, percent
from vitreg.reports.html import facts, note, picture, section, table, text
from vitreg.reports.viewer import view

_HOW_NORMS = (
    "Every row is a layer, and the darker a cell, the more patch tokens have that norm. A model without "
    "artifacts has one band. Artifacts are a second band to the right, or a shoulder of the first; the "
    "threshold is set where a patch is twice as likely an outlier as not. Below, the same for one layer."
)
_HOW_PLACES = (
    "The patch grid of an image. A few bright cells mean that outliers sit at fixed places whatever "
    "the image shows; scattered ones mean that they follow the content."
)
_HOW_CURVES = (
    "Where the largest norm leaves the median, outliers come up. Attention is what the last figure is about: "
    "if few tokens draw much of it, attention maps show them instead of the image. One thin line per head."
)
_HOW_PHOTOS = (
    "Outlined patches are outliers. Colours mean the same in all photos: norms on a logarithmic scale, "
    "attention (the mean over heads; each photo sums to 100%) on a square-root scale, so that faint "
    "differences stay visible."
)
_HOW_VERSIONS = (
    "Norms after the layer where outliers stand out most, attention in the last block. Colours mean the same "
    "before and after; each version's own outliers are outlined."
)
_ON_A_SHEET = 8  # photos beside each other
_HOW_TABLE = (
    "Layers count from 0. Layer i is the residual stream after block i, before the model's final norm. "
    "Misjudged: patches that the threshold puts on the wrong side, where populations overlap. Attention: its "
    "share on tokens that enter block i as outliers. Values: the norms of their values over those of other "
    "tokens."
)


def banner(kind: str, title: str, model: str, lines: Iterable[str], planted: bool) -> str:
    """The top of a page: what was found (`kind` "found", "none" or neither), of which model, and why."""
    warning = "Phantom: artifacts were planted here on purpose. It is no evidence about a real model."
    label = f'<p class="phantom">{warning}</p>\n' if planted else ""
    words = "".join(f"<p>{text(line[:1].upper() + line[1:])}</p>\n" for line in lines)
    return f"""<header class="{kind}">
<h1>{text(title)}</h1>
<p class="model">{text(model)}</p>
{label}{words}</header>"""


def key_facts(report: Diagnosis) -> str:
    rows = [*_facts_of_input(report), *_facts_of_threshold(report)]
    return facts([*rows, *_facts_of_outliers(report)] if report.has_artifacts else rows)


def _facts_of_input(report: Diagnosis) -> list[tuple[str, str]]:
    (rows, columns), (high, wide) = report.grid, report.image_size
    unread = f", {len(report.failed_images):,} more could not be read" if report.failed_images else ""
    special = f"{report.prefix_tokens} prefix (CLS and the like), {report.register_tokens} registers"
    return [
        ("Images", f"{report.images:,}{unread}"),
        ("Image size", f"{high} x {wide} pixels (height x width)"),
        ("Patch grid", f"{rows} rows x {columns} columns"),
        ("Tokens", f"{special}, {rows * columns:,} patches"),
        ("Layers", f"{len(report.layers)}, counted from 0"),
    ]


def _facts_of_threshold(report: Diagnosis) -> list[tuple[str, str]]:
    sigma = (
        f"{number(report.mean_plus_3_sigma)}, would mark {percent(report.mean_plus_3_sigma_fraction)}"
        f" of patch tokens after block {report.detect_layer}"
    )
    if report.threshold is None:
        layer = ("Layer that came closest", str(report.detect_layer))
        threshold = ("Threshold", "none: no second population of norms is an artifact")
        seen = ("What would have been seen", would_have_been_seen(report))
        sure = ("Sureness", f"{report.sureness:.1%}")
        return [sure, layer, threshold, seen, ("The papers' mean + 3 sigma", sigma)]
    marked = f"{number(report.threshold)}, marks {percent(report.outlier_fraction)} of patch tokens"
    overlap = f"{percent(report.misjudged)} of patch tokens, which no threshold tells apart"
    return [
        ("Strength", f"{report.strength}: {STRENGTHS[report.strength or 'mild']}"),
        ("Sureness", f"{report.sureness:.1%}"),
        ("Onset layer", f"{report.onset_layer} (the first that shows them)"),
        ("Detect layer", f"{report.detect_layer} (where they stand out most)"),
        ("Threshold", f"{marked} after block {report.detect_layer}"),
        ("Overlap of outliers and others", overlap),
        ("The papers' mean + 3 sigma", sigma),
    ]


def _facts_of_outliers(report: Diagnosis) -> list[tuple[str, str]]:
    queries = name_of_queries(report.attention_queries)
    even = f"from {queries}; an even share is {percent(report.outlier_fraction)}"
    similar = [report.neighbour_similarity.get(kind) for kind in ("outlier", "normal")]
    rows = [
        ("Outliers per image", f"{report.outliers_per_image:.2f}"),
        ("Places", describe_positions(report.position_frequency)),
        (
            "Attention on outliers, last block",
            f"{percent(report.attention_to_outliers)} ({even})",
        ),
    ]
    if similar[0] is not None and similar[1] is not None:
        cosines = f"cosine {similar[0]:.2f} for outliers, {similar[1]:.2f} for others"
        rows.append(("Likeness to neighbouring patches", cosines))
    if report.sink:
        rows.append(("Kind of sink", words_of_sink(report.sink)))
    dimensions = ", ".join(f"{d['dimension']} ({d['share']:.0%})" for d in report.excess_dimensions)
    return [*rows, ("Residual dimensions with the excess", dimensions)] if dimensions else rows


def figures(report: Diagnosis) -> str:
    layer = report.layers[report.detect_layer]
    found = f"threshold {number(report.threshold)}" if report.threshold is not None else "no threshold"
    median = f"after block {layer.layer} median {number(layer.median_norm)}"
    norms = f"Norms of patch tokens by layer; {median}, {found}"
    places = f"Outliers by place: {describe_positions(report.position_frequency)}"
    first = f"from layer {report.onset_layer} on" if report.has_artifacts else "in no layer"
    curves = f"Norms, share of outliers and attention on them by layer: outliers {first}"
    shown = [
        picture(plots.norm_histograms(report), norms, _HOW_NORMS),
        picture(plots.position_map(report), places if report.has_artifacts else "No outliers", _HOW_PLACES),
        picture(plots.layer_curves(report), curves, _HOW_CURVES),
    ]
    return f'<div class="figures">{"".join(shown)}</div>'


def other_kinds(report: Diagnosis) -> list[str]:
    """The artifacts that are no high norms, where there are some: in words, and where they lie."""
    present = report.other_artifacts
    if not present:
        return []
    return [section("Other artifacts", "".join(_kind(report, finding) for finding in present))]


def _kind(report: Diagnosis, finding: Finding) -> str:
    words = f"<h3>{text(finding.title)}</h3>{note(str(finding))}"
    if finding.positions is None:
        return words
    alt = f"{finding.title}: how often at each position"
    return words + picture(plots.kind_map(report, finding), alt, _HOW_PLACES)


def photos(report: Diagnosis) -> str:
    """The photos for a screen with scripts, and still pictures of them for paper and without scripts."""
    if not report.examples:
        return note("No example photos were kept.")
    strips = [
        picture(
            plots.photo_strip(report, i),
            f"{example.name}: photo, map of norms, map of attention",
            example.name,
            colours=None,  # a palette would blur the colour scales
        )
        for i, example in enumerate(report.examples)
    ]
    still = f'{note(_HOW_PHOTOS)}<div class="photos">{"".join(strips)}</div>'
    return f'{view([("the model", report)])}\n<div class="still">{still}</div>'


def photos_before_and_after(before: Diagnosis, after: Diagnosis) -> str:
    """The same of a model in two versions, which were diagnosed on the same photos."""
    if not before.examples:
        return note("No example photos were kept.")
    versions = [("as it is", before), ("with the fix", after)]
    alt = "Photos, maps of norms and maps of attention: as it is, and with the fix"
    still = "".join(
        picture(
            before_after([(name, replace(x, examples=x.examples[part])) for name, x in versions]),
            alt,
            _HOW_VERSIONS,
            colours=None,
        )
        for part in _sheets(len(before.examples))
    )
    return f'{view(versions)}\n<div class="still">{still}</div>'


def _sheets(photos: int) -> list[slice]:
    """So many photos on as few pictures as hold them, and about equally many on each."""
    sheets = -(-photos // _ON_A_SHEET)
    ends = [i * photos // sheets for i in range(sheets + 1)]
    return [slice(first, last) for first, last in pairwise(ends)]


def layer_table(report: Diagnosis) -> str:
    heads = [
        "layer",
        "median",
        "p99",
        "max",
        "mean + 3 sigma",
        "threshold",
        "outliers",
        "misjudged",
        "attention",
    ]
    heads += ["values", "CLS norm", "register norm"]
    rows = [_layer_row(layer) for layer in report.layers]
    marks = {report.detect_layer: "detect" if report.has_artifacts else "closest"}
    if report.onset_layer is not None:
        both = report.onset_layer == report.detect_layer
        marks[report.onset_layer] = "onset, detect" if both else "onset"
    for layer, mark in marks.items():
        rows[layer][0] += f" ({mark})"
    return note(_HOW_TABLE) + table(heads, rows, set(marks))


def _layer_row(x: LayerDiagnosis) -> list[str]:
    norms = [x.median_norm, x.p99_norm, x.max_norm, x.mean_plus_3_sigma, x.threshold]
    ratio = "-" if x.value_norm_ratio is None else f"{x.value_norm_ratio:.2f}x"
    shares = [percent(x.outlier_fraction), percent(x.misjudged), percent(x.attention_to_outliers), ratio]
    return [
        str(x.layer),
        *map(plain_number, norms),
        *shares,
        *map(plain_number, [x.cls_norm, x.register_norm]),
    ]


def failed(images: list[dict[str, str]]) -> list[str]:
    """The images that could not be read, if there are any."""
    if not images:
        return []
    rows = [[image["path"], image["reason"]] for image in images]
    few = " open" if len(images) <= 20 else ""
    title = f"<summary>Images that could not be read: {len(images):,}</summary>"
    return [f"<details{few}>{title}{table(['image', 'reason'], rows, words=True)}</details>"]


def plain_number(value: float | None) -> str:
    return "-" if value is None else f"{value:#.3g}" if 1e-3 <= value < 100 else number(value)
