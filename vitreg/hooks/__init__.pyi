from .attention import AttentionCall, intercept
from .block_edit import BlockEdit, bare, edits_of, install, uninstall
from .carry import Carry
from .stream import Stream

__all__ = [
    "AttentionCall",
    "BlockEdit",
    "Carry",
    "Stream",
    "bare",
    "edits_of",
    "install",
    "intercept",
    "uninstall",
]
