"""The API pages: one for each package, from its __init__.pyi, with the docstrings of what is public.

Docstrings of vitreg are plain text with indented code; `as_restructured` says so in autodoc's language.
"""

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "reference" / "api"


def names_of(stub: Path) -> list[str]:
    """What a package calls public."""
    listed = re.search(r"__all__ = (\[.*?\])", stub.read_text(), re.DOTALL)
    assert listed is not None
    found: list[str] = ast.literal_eval(listed[1])
    return found


def packages() -> dict[str, list[str]]:
    """Each package of vitreg that has public names, with them as one imports them."""
    top = names_of(ROOT / "vitreg" / "__init__.pyi")
    found = {
        stub.parent.name: [
            f"vitreg.{name}" if name in top else f"vitreg.{stub.parent.name}.{name}"
            for name in names_of(stub)
        ]
        for stub in sorted((ROOT / "vitreg").glob("*/__init__.pyi"))
    }
    shown = {name for names in found.values() for name in names}
    for name in top:
        if f"vitreg.{name}" not in shown:
            found.setdefault(_room(name), []).append(f"vitreg.{name}")
    return {room: sorted(set(names), key=_reading_order) for room, names in sorted(found.items())}


def _room(name: str) -> str:
    return str(getattr(importlib.import_module("vitreg"), name).__module__).split(".")[1]


def _reading_order(name: str) -> tuple[bool, bool, str]:
    """What vitreg itself offers comes first, functions before classes."""
    last = name.rpartition(".")[2]
    return name.count(".") > 1, not last[0].islower(), last.lower()


def page(room: str, names: list[str]) -> str:
    """The page of one package."""
    module = importlib.import_module(f"vitreg.{room}")
    lines = [f"# vitreg.{room}", "", summary(module), ""]
    for name in names:
        lines += [f"## {name.rpartition('.')[2]}", "", "```{eval-rst}", *_directive(name), "```", ""]
    return "\n".join(lines)


def _directive(name: str) -> list[str]:
    package, _, last = name.rpartition(".")
    value = getattr(importlib.import_module(package), last)
    if inspect.isclass(value):
        members = [] if issubclass(value, Exception) else ["   :members:"]
        return [f".. autoclass:: {name}", *members]
    if inspect.isfunction(value):
        return [f".. autofunction:: {name}"]
    return [f".. autodata:: {name}", "   :no-value:"]


def summary(value: object) -> str:
    """The first sentence or line of a docstring."""
    text = inspect.getdoc(value) or ""
    return " ".join(text.partition("\n\n")[0].split())


def index(found: dict[str, list[str]]) -> str:
    """All packages with all their names, and what each is in a sentence."""
    lines = ["# Python API", "", _INTRODUCTION, ""]
    for room, names in found.items():
        lines += [f"## [vitreg.{room}](api/{room}.md)", "", "| name | what it is |", "|---|---|"]
        for name in names:
            package, _, last = name.rpartition(".")
            about = summary(getattr(importlib.import_module(package), last)).replace("|", "\\|")
            about = re.split(r"(?<=[.:;?]) ", about)[0].rstrip(":;")
            lines.append(f"| [`{name}`](api/{room}.md#{last.lower()}) | {about} |")
        lines.append("")
    pages = "\n".join(f"api/{room}" for room in found)
    return "\n".join([*lines, "```{toctree}", ":hidden:", pages, "```", ""])


_INTRODUCTION = (
    "Everything below is public; all else may change at any time. What most people need is on `vitreg`"
    " itself: `import vitreg` is cheap, and each name is loaded when it is first used.\n\n"
    "Tensors have their shapes in the signature: `b` images, `n` tokens, `p` patches, `d` width, `f` neurons,"
    " `l` layers, `h` heads, `gh gw` the grid of patches. Layers are counted from 0: layer *i* is the"
    " residual stream after block *i*, before any final norm."
)


def as_restructured(lines: list[str]) -> list[str]:
    """Indented stretches become code blocks; lines that only look like markup are kept as text."""
    result: list[str] = []
    inside = False
    for line in lines:
        indented = line.startswith("    ") or (line.startswith("  ") and inside)
        if indented and not inside:
            if result and result[-1].strip():
                result.append("")
            result += [".. code-block:: text" if not _is_python(line) else ".. code-block:: python", ""]
        if inside and not indented and line.strip():
            result.append("")
        inside = indented or (inside and not line.strip())
        result.append(f"    {line}" if indented else _escaped(line))
    return result


def _is_python(line: str) -> bool:
    try:
        ast.parse(re.sub(r":\s*(#.*)?$", ": pass", line.strip()))
    except SyntaxError:
        return False
    return bool(re.search(r"[=(]", line))


def _escaped(line: str) -> str:
    parts = re.split(r"(`[^`]*`)", line)
    return "".join(
        part if part.startswith("`") else re.sub(r"([*|_]{1,2})(?=\W|\w|$)", r"\\\1", part) for part in parts
    )


def _docstring(app: "Sphinx", what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    lines[:] = as_restructured(lines)


def write_pages(app: "Sphinx") -> None:
    """Write all pages, those that have changed only: Sphinx reads by date."""
    FOLDER.mkdir(exist_ok=True)
    found = packages()
    wanted = {FOLDER / f"{room}.md": page(room, names) for room, names in found.items()}
    wanted[FOLDER.parent / "api.md"] = index(found)
    for path in set(FOLDER.glob("*.md")) - set(wanted):
        path.unlink()
    for path, text in wanted.items():
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def setup(app: "Sphinx") -> dict[str, bool]:
    app.connect("builder-inited", write_pages)
    app.connect("autodoc-process-docstring", _docstring)
    return {"parallel_read_safe": True}
