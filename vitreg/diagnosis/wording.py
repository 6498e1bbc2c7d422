"""Words for what results hold as data: whoever prints it says the same."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vitreg.diagnosis.result import Queries, Sink


def name_of_queries(queries: "Queries") -> str:
    """Whose attention was read."""
    return {"cls": "CLS", "patches": "evenly spread patches"}[queries]


def kind_of_query(queries: "Queries") -> str:
    """The kind of token whose attention was read."""
    return {"cls": "CLS", "patches": "patch"}[queries]


def words_of_sink(sink: "Sink") -> str:
    """What becomes of the attention that outliers draw."""
    kind = {
        "nop": "NOP sink: attended to, but writes little",
        "broadcast": "broadcast sink: what it holds is read",
    }[sink.kind]
    return f"{kind} (value norms {sink.value_norm_ratio:.2f}x those elsewhere)"
