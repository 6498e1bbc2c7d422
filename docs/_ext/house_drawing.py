"""The drawing of the packages in docs/house.md, which keeps it as Mermaid, as a picture without scripts."""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

WIDE, HIGH, ACROSS, DOWN = 104, 28, 24, 36  # of a room, and between rooms


def drawn(text: str) -> str:
    """The page with its Mermaid block as an SVG: rooms on their floors, arrows from importer to imported."""
    arrows = re.findall(r"^    (\w+) --> (\w+)$", text, re.MULTILINE)
    floors: dict[int, list[str]] = {}
    for floor, room in re.findall(r"^\| (\d+) \| (\w+) \|", text, re.MULTILINE):
        floors.setdefault(int(floor), []).append(room)
    return re.sub(r"```mermaid\n.*?```", lambda _: _raw(_svg(floors, arrows)), text, flags=re.DOTALL)


def _raw(svg: str) -> str:
    return f"```{{raw}} html\n{svg}\n```"


def _svg(floors: dict[int, list[str]], arrows: list[tuple[str, str]]) -> str:
    most = max(map(len, floors.values()))
    width, top = most * (WIDE + ACROSS), max(floors)
    centre = {
        room: (
            width * (i + 0.5 + 0.12 * (floor % 2)) / (len(rooms) + 0.12),
            (top - floor) * (HIGH + DOWN) + HIGH,
        )
        for floor, rooms in floors.items()
        for i, room in enumerate(rooms)
    }
    height = (top + 1) * (HIGH + DOWN) + HIGH
    lines = [_line(centre[above], centre[below]) for above, below in arrows]
    boxes = [_box(room, *at) for room, at in centre.items()]
    return (
        f'<svg class="house" viewBox="0 0 {width:.0f} {height}" role="img"'
        f' aria-label="Packages of vitreg, each above those that it imports">{"".join(lines + boxes)}</svg>'
    )


def _line(start: tuple[float, float], end: tuple[float, float]) -> str:
    (x, y), (to_x, to_y) = (start[0], start[1] + HIGH / 2), (end[0], end[1] - HIGH / 2)
    bend = (y + to_y) / 2
    return f'<path d="M{x:.0f} {y:.0f} C{x:.0f} {bend:.0f} {to_x:.0f} {bend:.0f} {to_x:.0f} {to_y:.0f}"/>'


def _box(room: str, x: float, y: float) -> str:
    return (
        f'<rect x="{x - WIDE / 2:.0f}" y="{y - HIGH / 2:.0f}" width="{WIDE}" height="{HIGH}" rx="4"/>'
        f'<text x="{x:.0f}" y="{y + 4:.0f}" text-anchor="middle">{room}</text>'
    )


def setup(app: "Sphinx") -> dict[str, bool]:
    def read(app: "Sphinx", docname: str, source: list[str]) -> None:
        if docname == "house":
            source[0] = drawn(source[0])

    app.connect("source-read", read)
    return {"parallel_read_safe": True}
