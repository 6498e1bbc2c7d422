"""A diagnosis, and a comparison of several, at a glance."""

from typing import TYPE_CHECKING

from vitreg.diagnosis.wording import kind_of_query
from vitreg.printing import Step, Summary, called, percent, short_name

if TYPE_CHECKING:
    from vitreg.diagnosis.emergence import Emergence
    from vitreg.diagnosis.result import Diagnosis

# The fewest photos that a verdict's sureness was measured with (docs/power.md).
ENOUGH_PHOTOS = 32
_PYTHON = Step("remove them, and see whether that helps.", python=("print(vitreg.find_fix(vit, photos))",))


def summary_of(d: "Diagnosis") -> Summary:
    """The verdict, how many outliers there are, how large, from which block on and where, and what to do."""
    rows = _rows_of_artifacts(d) if d.has_artifacts else _rows_of_none(d)
    others = "; ".join(finding.title[0].lower() + finding.title[1:] for finding in d.other_artifacts)
    rows += [("other artifacts", others)] if others else []
    return Summary(
        verdict_of(d),
        called(short_name(d.model), d.planted),
        rows,
        notes=cautions(d),
        steps=[_PYTHON] if d.has_artifacts else [Step("nothing: no patch norm has to be fixed.")],
    )


def verdict_of(d: "Diagnosis") -> str:
    """The verdict with its strength, or the other artifacts where norms have none."""
    if d.has_artifacts:
        return f"artifacts, {d.strength}"
    return "no outlying norms, but other artifacts" if d.other_artifacts else "no artifacts"


def cautions(d: "Diagnosis") -> list[str]:
    """What to keep in mind before one believes the verdict: few photos, photos that could not be read."""
    notes = []
    if d.images < ENOUGH_PHOTOS:
        photos = "1 photo" if d.images == 1 else f"{d.images} photos"
        other = "another photo" if d.images == 1 else "others"
        notes.append(
            f"judged from {photos}: {other} may say otherwise. Give {ENOUGH_PHOTOS} or more to be sure."
        )
    if d.failed_images:
        first = d.failed_images[0]
        count = len(d.failed_images)
        unread = "1 photo" if count == 1 else f"{count} photos, among them"
        notes.append(f"could not read {unread} {first['path']}: {first['reason']}.")
    return notes


def _rows_of_artifacts(d: "Diagnosis") -> list[tuple[str, str]]:
    from vitreg.diagnosis.result import describe_positions

    best, last = d.layers[d.detect_layer], len(d.layers) - 1
    patches = d.grid[0] * d.grid[1]
    ratio = f"{best.ratio:.{0 if best.ratio >= 10 else 1}f}x"
    query = kind_of_query(d.attention_queries)
    return [
        (
            "outliers",
            f"{d.outliers_per_image:.1f} of {patches} patches per photo ({percent(d.outlier_fraction)})",
        ),
        ("their norm", f"{ratio} the others' (median, after block {d.detect_layer})"),
        ("from block", f"{d.onset_layer} on (of blocks 0 to {last})"),
        ("attention", f"{percent(d.attention_to_outliers)} of the {query} attention, last block"),
        ("places", describe_positions(d.position_frequency, images=d.images)),
        ("sureness", f"{d.sureness:.1%}, from {_photos(d)}"),
    ]


def _rows_of_none(d: "Diagnosis") -> list[tuple[str, str]]:
    from vitreg.diagnosis.result import would_have_been_seen

    tail = max(d.layers, key=lambda layer: layer.max_norm / layer.median_norm)
    return [
        ("largest norm", f"{tail.max_norm / tail.median_norm:.1f}x the median (after block {tail.layer})"),
        ("would be seen", would_have_been_seen(d)),
        ("sureness", f"{d.sureness:.1%}, from {_photos(d)}"),
    ]


def _photos(d: "Diagnosis") -> str:
    return f"{d.images:,} photo{'' if d.images == 1 else 's'}"


def summary_of_several(found: "Emergence") -> Summary:
    """How many of the models have artifacts, and a row for each."""
    reports = found.diagnoses
    ill = [label for label, d in zip(found.labels, reports, strict=True) if d.has_artifacts]
    rows = [
        [
            short_name(label),
            verdict_of(d) + (" (a phantom)" if d.planted else ""),
            "-" if d.onset_layer is None else str(d.onset_layer),
            percent(d.outlier_fraction),
            percent(d.attention_to_outliers),
        ]
        for label, d in zip(found.labels, reports, strict=True)
    ]
    few = [caution for caution in cautions(reports[0]) if reports[0].images < ENOUGH_PHOTOS][:1]
    return Summary(
        f"artifacts in {len(ill)} of {len(reports)} models",
        f"{_photos(reports[0])} each",
        rows,
        heads=("model", "verdict", "from block", "outliers", "attention"),
        notes=few,
        steps=[_PYTHON if ill else Step("nothing: no patch norm has to be fixed.")],
    )
