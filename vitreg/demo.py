"""`vitreg demo`: the whole story on bundled photos, offline.

Until a trained example is bundled, the model is a phantom: random weights with planted artifacts, whose
ground truth is known. It is labelled as such wherever it is shown.
"""

from pathlib import Path

from rich.console import Console
from rich.table import Table

import vitreg
from vitreg.images import demo_photos
from vitreg.output import write_atomically
from vitreg.phantom import Phantom, plant

MODEL, LAYER = "timm:vit_small_patch16_224", 7


def run(out: Path) -> None:
    """Diagnose a random model before and after artifacts are planted; print a table, write a report."""
    from vitreg.report import write_report
    from vitreg.style import png

    console = Console()
    out.mkdir(parents=True, exist_ok=True)
    vit = vitreg.load(MODEL, random_weights=True)
    photos = vitreg.read_images(demo_photos(), vit)
    console.print(
        f"{photos.total} bundled photos, {MODEL} with random weights: a stand-in, no trained model."
    )
    clean = vitreg.diagnose(vit, photos)
    phantom = plant(vit, [batch.pixels for batch in photos], LAYER)
    report = vitreg.diagnose(phantom.vit, photos)
    console.print(
        f"Planted {len(phantom.neurons)} register neurons in block {LAYER}: a phantom with known truth.\n"
    )
    console.print(_table(clean, report))
    console.print(_truth(phantom, report, photos), "\n")
    console.print(str(report), "\n", highlight=False)
    neurons = vitreg.find_register_neurons(phantom.vit, photos, report)
    fix = vitreg.TokenSplitting.calibrate(phantom.vit, photos, neurons)
    verdict = vitreg.verify(phantom.vit, fix, photos, report=report, controls=False)
    hits = len(set(neurons.by_layer.get(LAYER, [])) & set(phantom.neurons))
    console.print(
        f"Register neurons found: {hits} of {len(phantom.neurons)} planted, of {neurons.top_k} named."
    )
    console.print(f"Token splitting {verdict.verdict}: {verdict.reason}\n", highlight=False)
    console.print(f"fix: {fix.save(out / 'fix', vit=phantom.vit)}", highlight=False)
    page = write_report(report, out / "report.html")
    console.print(f"report: {page}\nground truth: {phantom.save(out / 'phantom.json')}", highlight=False)
    picture = out / "overview.png"
    write_atomically(picture, png(report.figure()))
    console.print(f"picture: {picture}", highlight=False)


def _table(clean: "vitreg.Diagnosis", report: "vitreg.Diagnosis") -> Table:
    table = Table(box=None, header_style="bold")
    for heading in ("", "before planting", "phantom"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, value in (
        ("verdict", lambda d: d.verdict),
        ("onset layer", lambda d: "-" if d.onset_layer is None else str(d.onset_layer)),
        ("outlier patches", lambda d: f"{d.outlier_fraction:.2%}"),
        ("largest norm / median", lambda d: f"{max(x.max_norm / x.median_norm for x in d.layers):.1f}x"),
        ("attention on outliers, last block", lambda d: f"{d.attention_to_outliers:.1%}"),
    ):
        table.add_row(name, value(clean), value(report))
    return table


def _truth(phantom: Phantom, report: "vitreg.Diagnosis", photos: "vitreg.Images") -> str:
    """How well the diagnosis found what was planted."""
    hits = found = planted = 0
    for batch in photos:
        truth, mask = phantom.marked(batch.pixels), report.outliers(phantom.vit, batch.pixels)
        hits, found, planted = (
            hits + int((truth & mask).sum()),
            found + int(mask.sum()),
            planted + int(truth.sum()),
        )
    return (
        f"Against the ground truth: {hits} of {planted} planted patches found, {found - hits} false alarms."
    )
