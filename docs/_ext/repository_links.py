"""Links of pages to what lies beside docs/: pages of the site where there is one, else the repository."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[2]
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "README.md": "index.md"}


def relinked(text: str, docname: str, repository: str) -> str:
    """The text with links that leave docs/ turned to where a reader of the site finds it."""
    folder = (ROOT / "docs" / docname).parent

    def turned(match: re.Match[str]) -> str:
        link, anchor = match[1], match[2] or ""
        path = (folder / link).resolve()
        if path.is_relative_to(ROOT / "docs") or not path.is_relative_to(ROOT):
            return match[0]
        inside = path.relative_to(ROOT).as_posix()
        if inside in PAGES:
            up = "../" * docname.count("/")
            return f"]({up}{PAGES[inside]}{anchor})"
        return f"]({repository}/blob/main/{inside}{anchor})"

    return re.sub(r"\]\((\.\.?/[^)#\s]+)(#[^)\s]*)?\)", turned, text)


def setup(app: "Sphinx") -> dict[str, bool]:
    def read(app: "Sphinx", docname: str, source: list[str]) -> None:
        source[0] = relinked(source[0], docname, app.config.repository)

    app.connect("source-read", read)
    return {"parallel_read_safe": True}
