"""End a forward pass as soon as it has shown what it was run for."""

from contextlib import suppress

from jaxtyping import Float
from torch import Tensor

from vitreg.models.backbone import Backbone


class Enough(Exception):  # noqa: N818 - no error: the pass has shown what it was run for
    """Raised by a watcher within `run_until`, and never seen outside."""


def run_until(vit: Backbone, images: Float[Tensor, "b 3 h w"]) -> None:
    """A forward pass that a watcher may end, once it has seen what it wants, by raising Enough."""
    with suppress(Enough):
        vit(images)
