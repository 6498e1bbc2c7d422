"""Artifacts that are no high norms: what each kind measures in the diagnosis' one pass, and what it finds.

    class Sinks(Meter):                 # one for each kind; sums over images, in memory that does not grow
        def attention(self, layer, rows): ...
        def finding(self, context) -> Finding: ...

A meter sees every forward pass that the diagnosis makes, adds to its sums, and concludes once all images have
been seen. Sums of several processes add up.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from vitreg.distributed import Ranks
from vitreg.models.backbone import Backbone
from vitreg.models.layout import TokenLayout


@dataclass(frozen=True)
class Finding(ABC):
    """What was measured of one kind of artifact. `str()` says it in one or two plain sentences.

    `present` says whether the model has this kind; `layer` (0-based) is where it is clearest: the residual
    stream after that block, or the attention in it. `positions` (gh, gw), where a kind has places, is the
    share of images that show it at each patch.
    """

    kind: ClassVar[str]  # its name in JSON: lower case, words
    title: ClassVar[str]  # its headline in reports
    present: bool
    layer: int
    positions: list[list[float]] | None

    @abstractmethod
    def __str__(self) -> str:
        """What was found, in the user's words, with the figures that show it."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Context:
    """What a meter may know when it concludes: how many images were seen, and the norms' own outliers.

    `thresholds` per layer: the norm from which on a patch is a high-norm outlier, or None.
    """

    images: int
    thresholds: tuple[float | None, ...]


@dataclass(frozen=True)
class AttentionRows:
    """What was read of a block's attention.

    `asked` (b, h, p): how CLS (or spread patches, on average) shares out its attention among the patches;
    sums to 1. `spread` (b, h, r, m): how some evenly spread patches share theirs out among all keys, of which
    those at `patches` are the patches': a fix may have keys of its own before and behind them.
    """

    asked: Float[Tensor, "b h p"]
    spread: Float[Tensor, "b h r m"]
    patches: slice


def shares_of_patches(rows: Float[Tensor, "*b m"], patches: slice) -> Float[Tensor, "*b p"]:
    """Attention to patches as shares of what goes to patches."""
    chosen = rows[..., patches]
    return chosen / chosen.sum(-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)


class Meter(ABC):
    """Sums over images for one kind of artifact. Whatever is a Tensor attribute is a sum, and adds up.

    `vit` and `layout` are the model and the tokens of the diagnosed passes. Each callback is called in the
    order of the pass, with tensors in the model's own dtype, on its device; overwrite those that are needed.
    """

    def __init__(self, vit: Backbone, layout: TokenLayout) -> None:
        self.vit, self.layout = vit, layout

    def zeros(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """A sum that starts at zero, on the model's device."""
        return torch.zeros(*shape, dtype=dtype, device=self.vit.device)

    def start(self) -> None:  # noqa: B027
        """A forward pass enters block 0."""

    def embedding(self, patches: Float[Tensor, "b p d"]) -> None:  # noqa: B027
        """The patch embedding, before positions, where the model has one."""

    def block(self, layer: int, residual: Float[Tensor, "b n d"], norms: Float[Tensor, "b n"]) -> None:  # noqa: B027
        """The residual stream after a block, and its tokens' norms."""

    def attention(self, layer: int, rows: AttentionRows) -> None:  # noqa: B027
        """The attention of a block."""

    def sums(self) -> Iterator[str]:
        """The names of the sums."""
        return (name for name, value in vars(self).items() if isinstance(value, Tensor))

    def all_reduce(self, ranks: Ranks) -> None:
        """Replace the sums by those of all processes' images, on the CPU."""
        for name in list(self.sums()):
            setattr(self, name, ranks.add(getattr(self, name).cpu()))

    @abstractmethod
    def finding(self, context: Context) -> Finding:
        """What the sums say."""
