"""What `vitreg eval --report` writes: one evaluation, or a model without and with a fix, as an HTML file.

write_evaluation([before, after], "report.html", vit, fix, config)
"""

from collections.abc import Sequence
from pathlib import Path

from vitreg.data.evenly_spaced import evenly_spaced
from vitreg.data.images import read_images
from vitreg.diagnosis.diagnosing import diagnose
from vitreg.evals.outlier_masks import DIAGNOSED
from vitreg.evals.result import Result, comparison_rows, conclusion
from vitreg.features.config import Config
from vitreg.files import write_atomically
from vitreg.fixes.base import Fix
from vitreg.models.backbone import Backbone
from vitreg.plots.style import safe, short_name
from vitreg.reports.html import Picture, Table, page, picture
from vitreg.reports.parts import Banner, Photos, photos, photos_before_and_after

EXAMPLES = 12
_INTERVALS = "In brackets, 95% bootstrap intervals over images; paired for the difference."


def write_evaluation(
    results: Sequence[Result],
    path: str | Path,
    vit: Backbone | None = None,
    fix: Fix | None = None,
    config: Config | None = None,
) -> Path:
    """Write the report on one result, or on two of a model without and with `fix`; returns the path.

    With the model, `vit`, one can handle norms and attention in the page: they are of a diagnosis of some of
    the photos, made here.
    """
    last = results[-1]
    title = f"{last.task}{', without and with a fix' if len(results) == 2 else ''}"
    about = [f"on {last.data}, n = {last.n:,}", *([f"fix: {last.fix}"] if last.fix else [])]
    about += [f"conclusion: {conclusion(*results)}"] if len(results) == 2 else []
    diagnosed, shown = ("", None) if vit is None else _photos(vit, fix, last, config or Config())
    html = page(
        "evaluation.html",
        f"{safe(short_name(last.model), 60)}: {title}",
        last.versions,
        top=Banner("", title.capitalize(), last.model, about, last.planted),
        metrics=_metrics(results),
        notes=dict.fromkeys((_INTERVALS, *(words for result in results for words in result.notes))),
        pictures=_pictures(results),
        fixed=fix is not None,
        diagnosed=diagnosed,
        photos=shown,
        settings=[(key, str(value)) for key, value in last.config.items()],
    )
    return write_atomically(path, html)


def _metrics(results: Sequence[Result]) -> Table:
    """All metrics of one result, or of two with their difference."""
    if len(results) == 2:
        heads, *rows = comparison_rows(*results)
        return Table(heads, rows)
    return Table(("", results[0].fix or "as it is"), results[0].rows())


def _pictures(results: Sequence[Result]) -> list[Picture]:
    """Each result's picture, if its task has one."""
    return [
        picture(x.picture, f"{x.task}, {x.fix or 'as it is'}", (x.fix or "as it is").capitalize())
        for x in results
        if x.picture is not None
    ]


def _photos(vit: Backbone, fix: Fix | None, result: Result, config: Config) -> tuple[str, Photos | None]:
    """The model's norms and attention on some of the photos, with a fix before and after it; in words too."""
    if not result.photos:
        return "", None
    some = _some(result.photos, config)
    images = read_images(some, vit, batch_size=config.batch_size, workers=config.workers)
    before = diagnose(vit, images, examples=EXAMPLES)
    words = f"A diagnosis of {before.images} of the photos, evenly spread, finds {before.verdict}:"
    words = f"{words} {before.reason}"
    if fix is None:
        return words, photos(before)
    with fix.applied_to(vit):
        after = diagnose(vit, images, examples=EXAMPLES)
    return f"{words} With the fix: {after.verdict}.", photos_before_and_after(before, after)


def _some(paths: Sequence[Path], config: Config) -> list[Path]:
    """Evenly spread photos, first those that will be shown."""
    used = [paths[i] for i in evenly_spaced(len(paths), config.limit)]
    some = [used[i] for i in evenly_spaced(len(used), DIAGNOSED)]
    first = [some[i] for i in evenly_spaced(len(some), EXAMPLES)]
    return [*first, *(path for path in some if path not in first)]
