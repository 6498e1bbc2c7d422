"""What `vitreg look -o F.html` writes: the picture and its figures, in one HTML file.

write_look(seen, "look.html")
"""

from pathlib import Path
from typing import Any

from vitreg.files import write_atomically
from vitreg.printing import short_name
from vitreg.reports.html import Table, page, picture
from vitreg.reports.parts import Banner
from vitreg.version import versions
from vitreg.viewing.result import Look
from vitreg.viewing.wording import sentence, table, what_judged


def write_look(seen: Look, path: str | Path, figure: Any = None) -> Path:
    """Write what was seen, with `figure` (default: `seen.figure()`); returns the path."""
    lines = [sentence(seen, version, 0, named=False) for version in seen.versions]
    title = f"{len(seen.names)} photos" if len(seen.names) > 1 else short_name(seen.names[0])
    top = Banner(
        "found" if seen.has_artifacts else "none",
        title,
        ", ".join(dict.fromkeys(version.model for version in seen.versions)),
        [*(lines if len(seen.names) == 1 else ()), what_judged(seen)],
        seen.planted,
    )
    drawn = picture(
        seen.figure if figure is None else lambda: figure,
        " ".join(lines),
        "Norms are multiples of the photo's median, attention of what the mean patch gets. Like colours mean"
        " like features.",
        colours=None,  # a palette would blur the photos
    )
    shown = {"top": top, "drawn": drawn, "figures": Table(*table(seen)), "photos": None}
    return write_atomically(path, page("look.html", title, versions(), **shown))
