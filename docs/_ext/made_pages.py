"""Pages that are made when the site is built."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx


def make_before_building(app: "Sphinx", path: Path, page: Callable[[], str]) -> dict[str, bool]:
    """Write `page()` to `path` when a build begins; one that has not changed keeps its date."""

    def write(app: "Sphinx") -> None:
        text = page()
        if not path.exists() or path.read_text() != text:
            path.write_text(text)

    app.connect("builder-inited", write)
    return {"parallel_read_safe": True}
