from .attention import AttentionCall
from .attention_mode import AttentionMode, intercept
from .block_edit import BlockEdit, edits_of, install, uninstall, without_edits
from .carry import CarriedTokens
from .stream import Stream

__all__ = [
    "AttentionCall",
    "AttentionMode",
    "BlockEdit",
    "CarriedTokens",
    "Stream",
    "edits_of",
    "install",
    "intercept",
    "uninstall",
    "without_edits",
]
