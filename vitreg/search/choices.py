"""What a search for a fix lets one choose."""

from typing import Literal

FixKind = Literal[
    "auto", "registers", "splitting", "bias", "shift-average", "positions", "inpainting", "projection"
]
# How neurons are scored: by what they do to outliers alone, or as the paper does.
Method = Literal["contrast", "paper"]
