"""What a report says of a diagnosis, part by part, as data for the templates."""

from dataclasses import dataclass, replace
from functools import partial
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
from vitreg.reports.html import Facts, Picture, Table, picture
from vitreg.reports.viewer import View, view

_ON_A_SHEET = 8  # photos beside each other
_HEADS = [
    *("layer", "median", "p99", "max", "mean + 3 sigma", "threshold", "outliers", "misjudged", "attention"),
    *("values", "CLS norm", "register norm"),
]


@dataclass(frozen=True)
class Banner:
    """The top of a page: what was found (`kind` "found", "none" or neither), of which model, and why."""

    kind: str
    title: str
    model: str
    lines: list[str]
    planted: bool


@dataclass(frozen=True)
class Kind:
    """An artifact that is no high norm: in words, and where it lies if it has places."""

    title: str
    words: str
    places: Picture | None


@dataclass(frozen=True)
class Model:
    """All that a page says of one model, but for its photos; `failed` lists images that could not be read."""

    facts: Facts
    norms: Picture
    places: Picture
    curves: Picture
    kinds: list[Kind]
    layers: Table
    failed: Table


@dataclass(frozen=True)
class Photos:
    """Photos to handle, and still pictures of them for paper and without scripts; none if none were kept."""

    view: View | None
    stills: list[Picture]


def about(report: Diagnosis) -> Model:
    """All that a page says of a diagnosis, but for its photos."""
    failed = [[image["path"], image["reason"]] for image in report.failed_images]
    return Model(
        facts=key_facts(report),
        norms=_norms(report),
        places=_places(report),
        curves=_curves(report),
        kinds=[_kind(report, finding) for finding in report.other_artifacts],
        layers=layer_table(report),
        failed=Table(["image", "reason"], failed),
    )


def key_facts(report: Diagnosis) -> Facts:
    """What was looked at, the threshold and, where there are some, the outliers."""
    rows = [*_facts_of_input(report), *_facts_of_threshold(report)]
    return [*rows, *_facts_of_outliers(report)] if report.has_artifacts else rows


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
        ("Places", describe_positions(report.position_frequency, images=report.images)),
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


def _norms(report: Diagnosis) -> Picture:
    """The norms of patch tokens, layer by layer."""
    layer = report.layers[report.detect_layer]
    found = f"threshold {number(report.threshold)}" if report.threshold is not None else "no threshold"
    median = f"after block {layer.layer} median {number(layer.median_norm)}"
    return picture(
        lambda: plots.norm_histograms(report), f"Norms of patch tokens by layer; {median}, {found}"
    )


def _places(report: Diagnosis) -> Picture:
    """Where outliers lie in the grid of patches."""
    places = f"Outliers by place: {describe_positions(report.position_frequency, images=report.images)}"
    return picture(lambda: plots.position_map(report), places if report.has_artifacts else "No outliers")


def _curves(report: Diagnosis) -> Picture:
    """How norms, outliers and attention go with the layer."""
    first = f"from layer {report.onset_layer} on" if report.has_artifacts else "in no layer"
    alt = f"Norms, share of outliers and attention on them by layer: outliers {first}"
    return picture(lambda: plots.layer_curves(report), alt)


def _kind(report: Diagnosis, finding: Finding) -> Kind:
    """One finding, with a map where it has places."""
    alt = f"{finding.title}: how often at each position"
    places = None if finding.positions is None else picture(lambda: plots.kind_map(report, finding), alt)
    return Kind(finding.title, str(finding), places)


def photos(report: Diagnosis) -> Photos:
    """The photos of one model, and a still picture of each."""
    stills = [
        picture(
            partial(plots.photo_strip, report, i),
            f"{example.name}: photo, map of norms, map of attention",
            example.name,
            colours=None,  # a palette would blur the colour scales
        )
        for i, example in enumerate(report.examples)
    ]
    return Photos(view([("the model", report)]) if stills else None, stills)


def photos_before_and_after(before: Diagnosis, after: Diagnosis) -> Photos:
    """The same of a model in two versions, which were diagnosed on the same photos."""
    if not before.examples:
        return Photos(None, [])
    versions = [("as it is", before), ("with the fix", after)]
    alt = "Photos, maps of norms and maps of attention: as it is, and with the fix"
    sheets = (
        [(name, replace(x, examples=x.examples[part])) for name, x in versions]
        for part in _sheets(len(before.examples))
    )
    return Photos(
        view(versions), [picture(partial(before_after, sheet), alt, colours=None) for sheet in sheets]
    )


def _sheets(photos: int) -> list[slice]:
    """So many photos on as few pictures as hold them, and about equally many on each."""
    sheets = -(-photos // _ON_A_SHEET)
    ends = [i * photos // sheets for i in range(sheets + 1)]
    return [slice(first, last) for first, last in pairwise(ends)]


def layer_table(report: Diagnosis) -> Table:
    """A row for each layer; the layers of the onset and of the detection are marked."""
    rows = [_layer_row(layer) for layer in report.layers]
    marks = {report.detect_layer: "detect" if report.has_artifacts else "closest"}
    if report.onset_layer is not None:
        both = report.onset_layer == report.detect_layer
        marks[report.onset_layer] = "onset, detect" if both else "onset"
    for layer, mark in marks.items():
        rows[layer][0] += f" ({mark})"
    return Table(_HEADS, rows, frozenset(marks))


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


def plain_number(value: float | None) -> str:
    """A number with three digits; a dash for none."""
    return "-" if value is None else f"{value:#.3g}" if 1e-3 <= value < 100 else number(value)
