"""Which view is shown: everything that a user has chosen, and the same as the query of an address.

    View.of({"tab": "norms", "photo": "3", "layer": "7"}, explorer).address()   # "?tab=norms&photo=3&layer=7"

An address may say anything: what the model does not have is left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from urllib.parse import urlencode

from vitreg.app.explorer import Explorer, Pick
from vitreg.diagnosis.one_image import Query

# The tabs, and what each of them shows of a View beside the photo.
OWN = {
    "norms": ("layer", "threshold"),
    "attention": ("source", "row", "column", "block", "head"),
    "features": ("like_row", "like_column"),
    "neurons": ("neurons", "does", "registers", "to_row", "to_column", "watched"),
    "objects": (),
    "compare": (),
}
REGISTERS, SHIFT = "move to registers", "fire at the chosen patch"
MEAN = "mean of heads"
MOST_REGISTERS = 8


@dataclass(frozen=True)
class View:
    """The choices of all tabs. Layers, heads, rows and columns count from 0.

    norms      layer; threshold (a norm), or None for that of the diagnosis
    attention  source, the token that looks ("CLS", "register 0", "patch"); row and column of that patch;
               block; head, or MEAN
    features   row and column of the patch that the others are compared with
    neurons    switched on, as "layer:index"; what they do; to how many registers; row and column of the patch
               where they fire instead; which one's activation is shown
    """

    tab: str = "norms"
    photo: str = "0"
    layer: int = 0
    threshold: float | None = None
    source: str = "CLS"
    row: int = 0
    column: int = 0
    block: int = 0
    head: str = MEAN
    like_row: int = 0
    like_column: int = 0
    neurons: tuple[str, ...] = ()
    does: str = REGISTERS
    registers: int = 1
    to_row: int = 0
    to_column: int = 0
    watched: str = ""

    @property
    def query(self) -> Query:
        return self.source if self.clicked is None else self.clicked

    @property
    def clicked(self) -> Pick | None:
        """The patch that attention is looked at from, if it is one."""
        return (self.row, self.column) if self.source == "patch" else None

    @property
    def one_head(self) -> int | None:
        return None if self.head == MEAN else int(self.head)

    @property
    def like(self) -> Pick:
        """The patch that the others are compared with."""
        return self.like_row, self.like_column

    @property
    def patch(self) -> Pick:
        """Where the neurons fire."""
        return self.to_row, self.to_column

    @property
    def places(self) -> list[Pick]:
        """The neurons that are switched on."""
        return [place_of(name) for name in self.neurons]

    def address(self) -> str:
        """The query of the address that leads here: the tab, the photo, and what the tab shows of it."""
        names = ("tab", *(("photo",) if self.shareable else ()), *OWN[self.tab])
        said = {name: getattr(self, name) for name in names}
        said = {k: ",".join(v) if isinstance(v, tuple) else v for k, v in said.items() if v is not None}
        return "?" + urlencode(said, safe=",:")

    @property
    def shareable(self) -> bool:
        """Whether others have the photo, too."""
        return not self.photo.startswith("upload-")

    @staticmethod
    def first(explorer: Explorer) -> "View":
        """What a page shows that was asked for nothing."""
        chosen = tuple(name_of((n.layer, n.index)) for n in explorer.chosen)
        return View(
            layer=explorer.report.detect_layer,
            source=explorer.queries[0],
            block=explorer.vit.anatomy.depth - 1,
            like_row=explorer.report.grid[0] // 2,
            like_column=explorer.report.grid[1] // 2,
            neurons=chosen,
            watched=chosen[0] if chosen else "",
        )

    @staticmethod
    def of(said: Mapping[str, str], explorer: Explorer) -> "View":
        """The view that an address asks for."""
        first = View.first(explorer)
        depth, (rows, columns) = explorer.vit.anatomy.depth, explorer.report.grid
        known = [name_of((n.layer, n.index)) for n in explorer.candidates]
        heads = [MEAN, *map(str, range(explorer.vit.anatomy.heads))]

        def number(name: str, most: int) -> int:
            text, default = said.get(name, ""), getattr(first, name)
            return min(int(text), most) if text.isdecimal() and len(text) < 9 else default

        def word(name: str, allowed: Sequence[str]) -> str:
            return said[name] if said.get(name) in allowed else getattr(first, name)

        named = [name for name in said.get("neurons", "").split(",") if name in known]
        return View(
            tab=word("tab", list(OWN)),
            photo=said["photo"] if explorer.photo(said.get("photo")) else first.photo,
            layer=number("layer", depth - 1),
            threshold=_norm(said.get("threshold", "")),
            source=word("source", [*explorer.queries, "patch"]),
            row=number("row", rows - 1),
            column=number("column", columns - 1),
            block=number("block", depth - 1),
            head=word("head", heads),
            like_row=number("like_row", rows - 1),
            like_column=number("like_column", columns - 1),
            neurons=tuple(named) if "neurons" in said else first.neurons,
            does=word("does", (REGISTERS, SHIFT)),
            registers=number("registers", MOST_REGISTERS),
            to_row=number("to_row", rows - 1),
            to_column=number("to_column", columns - 1),
            watched=word("watched", known),
        )


def name_of(neuron: Pick) -> str:
    """A neuron (layer, index) as "layer:index"."""
    return f"{neuron[0]}:{neuron[1]}"


def place_of(name: str) -> Pick:
    """The (layer, index) that a neuron's name, "layer:index", says."""
    layer, _, index = name.partition(":")
    return int(layer), int(index)


def _norm(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if isfinite(value) and value > 0 else None
