"""`vitreg demo`: the whole story, offline, on the bundled example; `--real` tells it of a public ViT.

The example has no artifacts of its own. Those that are found and removed here were planted: a phantom, with
known ground truth, and labelled as such wherever it is shown.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

import vitreg
from vitreg.data.images import demo_photos
from vitreg.diagnosis.result import Diagnosis
from vitreg.files import write_atomically
from vitreg.phantoms.bundled import HELD_OUT, ExampleMeasures, measure, planted_example, scenes
from vitreg.phantoms.phantom import Phantom
from vitreg.viewing.at_hand import DEFAULT

REPORT = "report.html"
MEASURED = 256  # photos that top-1 and attention are measured on


@dataclass(frozen=True)
class DemoVersion:
    """A model as a column of the table: its diagnosis, and what it does on held-out photos, if known."""

    name: str
    report: Diagnosis
    measured: ExampleMeasures | None = None


def run(out: Path) -> None:
    """Plant artifacts in the bundled ViT, find them, remove them, and say what each step did."""
    console = Console()
    out.mkdir(parents=True, exist_ok=True)
    vit, phantom, photos = planted_example()
    console.print(f"A small ViT that tells 12 shapes apart, and {photos.total} drawn photos, new to it.")
    clean = vitreg.diagnose(vit, photos)
    console.print(f"It has {clean.verdict}: {clean.reason}\n", highlight=False)
    report = vitreg.diagnose(phantom.vit, photos)
    console.print(
        f"So {len(phantom.neurons)} register neurons were planted in block {phantom.layer} of a copy, a"
        f" phantom with known truth.\n{truth(phantom, report, photos)}"
    )
    cure = vitreg.find_fix(phantom.vit, photos, report=report)
    _tell(console, phantom, report, cure)
    held_out = scenes(MEASURED, HELD_OUT)
    versions = [
        DemoVersion("as trained", clean, measure(vit, held_out)),
        DemoVersion("phantom", report, measure(phantom.vit, held_out)),
        *_fixed(phantom.vit, cure, lambda: measure(phantom.vit, held_out)),
    ]
    console.print(table(versions))
    _write(console, out, versions, cure, phantom.vit)
    console.print(f"ground truth: {phantom.save(out / 'phantom.json')}", highlight=False)


def run_real(out: Path, images: str | None = None, model: str = DEFAULT) -> None:
    """The same of a public model with artifacts of its own, on the bundled photos or others of your own.

    Raises ModelLoadError where neither the hub nor its cache has the model.
    """
    console = Console()
    vit = vitreg.load(model)
    out.mkdir(parents=True, exist_ok=True)
    photos = vitreg.read_images(demo_photos() if images is None else images, vit)
    report = vitreg.diagnose(vit, photos)
    console.print(f"{report}\n", highlight=False)
    cure = vitreg.find_fix(vit, photos, report=report)
    console.print(f"{cure}\n", highlight=False)
    versions = [DemoVersion("as published", report), *_fixed(vit, cure)]
    console.print(table(versions))
    _write(console, out, versions, cure, vit)


def _fixed(
    vit: vitreg.Backbone, cure: vitreg.FixSearch, measured: Callable[[], ExampleMeasures] | None = None
) -> list[DemoVersion]:
    """The version with the fix, if there is one."""
    if cure.fix is None or cure.verdict.after is None:
        return []
    with cure.fix.applied_to(vit):
        return [DemoVersion("fixed", cure.verdict.after, measured() if measured else None)]


def _tell(console: Console, phantom: Phantom, report: Diagnosis, cure: vitreg.FixSearch) -> None:
    """What was found and done, against what was planted."""
    if cure.fix is None:
        return
    named = cure.fix.neurons
    hits = len(set(named.by_layer.get(phantom.layer, [])) & set(phantom.neurons))
    console.print(
        f"Register neurons found: {hits} of {len(phantom.neurons)} planted, of {named.top_k} named."
    )
    console.print(f"Fix: {cure.choice}\nIt {cure.verdict.verdict}: {cure.verdict.reason}\n", highlight=False)


def truth(phantom: Phantom, report: Diagnosis, photos: vitreg.Images) -> str:
    """How well the diagnosis found what was planted."""
    hits = found = planted = 0
    for batch in photos:
        marked, mask = phantom.marked(batch.pixels), report.outliers(phantom.vit, batch.pixels)
        hits += int((marked & mask).sum())
        found, planted = found + int(mask.sum()), planted + int(marked.sum())
    return (
        f"Against the ground truth: {hits} of {planted} planted patches found, {found - hits} false alarms."
    )


def table(versions: Sequence[DemoVersion]) -> Table:
    """A column for each version of the model."""
    found = Table(box=None, header_style="bold")
    for heading in ("", *(version.name for version in versions)):
        found.add_column(heading, justify="right" if heading else "left")
    rows: dict[str, Callable[[DemoVersion], str]] = {
        "verdict": lambda v: v.report.verdict,
        "outlier patches": lambda v: f"{v.report.outlier_fraction:.2%}",
        "largest norm / median": lambda v: f"{max(x.max_norm / x.median_norm for x in v.report.layers):.1f}x",
        "attention on outliers, last block": lambda v: f"{v.report.attention_to_outliers:.1%}",
    }
    for name, value in rows.items():
        found.add_row(name, *map(value, versions))
    measured = [version.measured for version in versions if version.measured]
    if len(measured) == len(versions):
        found.add_row(f"top-1, {MEASURED} other photos", *(f"{m.top1:.1%}" for m in measured))
        found.add_row(
            f"attention on the object ({measured[0].area:.0%} of the area)",
            *(f"{m.on_object:.1%}" for m in measured),
        )
    return found


def _write(
    console: Console,
    out: Path,
    versions: Sequence[DemoVersion],
    cure: vitreg.FixSearch,
    vit: vitreg.Backbone,
) -> None:
    """The fix, the report on the model before and after it, and a picture of both.

    The picture shows the photos that come first: of a phantom, those with the most planted patches.
    """
    from vitreg.diagnosis.version_figures import before_after
    from vitreg.plots.style import png
    from vitreg.reports.report import write_cure

    console.print()
    paths = {"report": write_cure(cure, out / REPORT)}
    if cure.fix is not None:
        paths["fix"] = cure.save(out / "fix", vit=vit)
    figure = before_after([(version.name, version.report) for version in versions])
    paths["picture"] = write_atomically(out / "before_after.png", png(figure))
    for what, path in paths.items():
        console.print(f"{what}: {path}", highlight=False)
