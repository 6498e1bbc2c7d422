"""Draw the packages of vitreg and who imports whom, from the code: docs/house.md.

    python scripts/house.py

An arrow A --> B says that A imports B, at the head of a file or inside a function. Arrows that follow from
others (A --> B --> C makes A --> C) are left out of the drawing, not of the table.
"""

import ast
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "house.md"
HEAD = """# The house

Packages of vitreg from the ground up, and what each imports. This page is made from the code by
`python scripts/house.py`; a test compares it. [CONTRIBUTING.md](../CONTRIBUTING.md) shows the ways through.
"""


def rooms() -> dict[str, set[str]]:
    """Each package or module at the top level, with those that it imports."""
    graph = grimp.build_graph("vitreg", cache_dir=None, exclude_type_checking_imports=True)
    found: dict[str, set[str]] = {_room(module): set() for module in graph.modules if module != "vitreg"}
    for importer in graph.modules - {"vitreg"}:
        for imported in graph.find_modules_directly_imported_by(importer) - {"vitreg"}:
            found[_room(importer)].add(_room(imported))
    for room, imports in found.items():
        imports.discard(room)
    return found


def _room(module: str) -> str:
    return module.split(".")[1]


def floors(imports: dict[str, set[str]]) -> list[list[str]]:
    """Rooms by the longest way down from each. Raises ValueError for a circle."""
    depth: dict[str, int] = {}

    def visit(room: str, above: tuple[str, ...]) -> int:
        if room in above:
            raise ValueError("a circle: " + " -> ".join([*above[above.index(room) :], room]))
        if room not in depth:
            depth[room] = 1 + max(
                (visit(below, (*above, room)) for below in sorted(imports[room])), default=-1
            )
        return depth[room]

    for room in sorted(imports):
        visit(room, ())
    return [sorted(r for r in depth if depth[r] == floor) for floor in range(max(depth.values()) + 1)]


def _reduced(imports: dict[str, set[str]]) -> list[tuple[str, str]]:
    """The arrows that do not follow from others."""

    def below(room: str) -> set[str]:
        return imports[room].union(*(below(other) for other in imports[room]))

    return [
        (room, other)
        for room in sorted(imports)
        for other in sorted(imports[room])
        if not any(other in below(between) for between in imports[room] - {other})
    ]


def _about(room: str) -> str:
    """The first line of the room's docstring."""
    folder = ROOT / "vitreg" / room
    path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    return (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()[0]


def page() -> str:
    """The page: the drawing, and a table of all rooms and arrows."""
    imports = rooms()
    stack = floors(imports)
    lines = [HEAD, f"{len(imports)} rooms on {len(stack)} floors, no circle.\n", "```mermaid", "flowchart TD"]
    lines += [f"    {room} --> {other}" for room, other in _reduced(imports)]
    lines += ["```", "", "| floor | room | what it is | imports |", "|---|---|---|---|"]
    for floor, names in reversed(list(enumerate(stack))):
        for name in names:
            below = ", ".join(sorted(imports[name])) or "nothing of vitreg"
            lines.append(f"| {floor} | {name} | {_about(name)} | {below} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
