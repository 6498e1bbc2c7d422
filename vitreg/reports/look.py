"""What `vitreg look -o F.html` writes: the picture and its figures, in one HTML file.

write_look(seen, "look.html")
"""

from pathlib import Path
from typing import Any

from vitreg.files import write_atomically
from vitreg.plots.style import number, percent, short_name
from vitreg.reports.html import Table, page, picture
from vitreg.reports.parts import Banner
from vitreg.version import versions
from vitreg.viewing.result import Look
from vitreg.viewing.wording import PhotoFacts, photo_facts, sentence, what_judged

_HEADS = ("photo", "model", "artifacts", "of patches", "norms", "attention", "attention on former artifacts")


def write_look(seen: Look, path: str | Path, figure: Any = None) -> Path:
    """Write what was seen, with `figure` (default: `seen.figure()`); returns the path."""
    alarming = any(version.diagnosis.has_artifacts for version in seen.versions)
    lines = [sentence(seen, version, 0, named=False) for version in seen.versions]
    title = f"{len(seen.names)} photos" if len(seen.names) > 1 else short_name(seen.names[0])
    top = Banner(
        "found" if alarming else "none",
        title,
        ", ".join(dict.fromkeys(version.model for version in seen.versions)),
        [*(lines if len(seen.names) == 1 else ()), what_judged(seen)],
        any(version.diagnosis.planted for version in seen.versions),
    )
    rows = [
        _row(version.label, photo_facts(version, photo, seen.unfixed(version)))
        for photo in range(len(seen.names))
        for version in seen.versions
    ]
    drawn = picture(
        seen.figure() if figure is None else figure,
        " ".join(lines),
        "Norms are multiples of the photo's median, attention of what the mean patch gets. Like colours mean"
        " like features.",
    )
    shown = {"top": top, "drawn": drawn, "figures": Table(_HEADS, rows), "photos": None}
    return write_atomically(path, page("look.html", title, versions(), **shown))


def _row(label: str, facts: PhotoFacts) -> list[str]:
    shares = [
        "-" if share is None else percent(share) for share in (facts.attention, facts.attention_on_former)
    ]
    ratio = "-" if facts.ratio is None else f"{number(facts.ratio)}x the others'"
    return [short_name(facts.photo), label, str(facts.artifacts), str(facts.patches), ratio, *shares]
