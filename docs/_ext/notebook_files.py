"""Each tutorial also as an .ipynb file, for Jupyter or Colab, beside its page: made from the same text."""

from pathlib import Path

import jupytext
from sphinx.application import Sphinx

DOCS = Path(__file__).resolve().parents[1]


def notebooks() -> list[Path]:
    """The tutorials: pages that say they are notebooks."""
    return [path for path in sorted((DOCS / "tutorials").glob("*.md")) if "\nkernelspec:" in path.read_text()]


def write_notebooks(app: Sphinx, error: Exception | None) -> None:
    if error is None and app.builder.format == "html":
        for path in notebooks():
            target = Path(app.outdir) / "tutorials" / f"{path.stem}.ipynb"
            jupytext.write(jupytext.read(path, fmt="md:myst"), target)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("build-finished", write_notebooks)
    return {"parallel_read_safe": True}
