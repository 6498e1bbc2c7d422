"""Passes of models whose head raises when it is given images alone: a captioner that waits for text, say.

All that vitreg reads is computed before: such a pass ends where the head raises, and has no output.
"""

import threading
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor, nn

from vitreg.errors import VitregError
from vitreg.models.probe import Forward

if TYPE_CHECKING:
    from vitreg.models.backbone import Backbone


def run_without_head(last: nn.Module, forward: Forward, images: Float[Tensor, "b 3 h w"]) -> None:
    """Run `forward` on images; what it raises after the block `last` ends the pass, and is no error.

    What the blocks themselves raise, and vitreg's own errors, are raised as ever.
    """
    passed, thread = [], threading.get_ident()

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() == thread:
            passed.append(True)

    # Behind the hooks that are there: what they raise counts.
    with last.register_forward_hook(leave):
        try:
            forward(images)
        except VitregError:
            raise
        except Exception:
            if not passed:
                raise


def without_output(vit: "Backbone") -> str:
    """Why a model has no output of its own, as a clause; empty for those that have one."""
    error = vit.anatomy.head_error
    return f"{vit.name} has no output for images alone: behind its blocks it raises {error}" if error else ""
