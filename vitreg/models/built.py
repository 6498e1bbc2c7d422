"""What a library's builder hands over, before it is known whether vitreg can read the model."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from vitreg.models.checkpoint_keys import KeyMismatch
from vitreg.models.sizes import Pair, Preprocess


@dataclass(frozen=True)
class Built:
    """A `whole` model as its library made it, and the `towers` in it that take images, the outermost first.

    `note`: which view of a photo the preprocess gives, where that is not the library's own answer. `keys`:
    what did not fit when the checkpoint was loaded. `native`: the size that the model was made for.
    """

    whole: nn.Module
    towers: Sequence[nn.Module]
    preprocess: Preprocess | None
    note: str = ""
    keys: KeyMismatch | None = None
    native: Pair | None = None
