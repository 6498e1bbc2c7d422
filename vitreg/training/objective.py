"""What a training regime is to the loop: a module that turns a batch into a loss, with its data.

Randomness comes from the global generators of random, numpy and torch alone: the loop seeds them for each
item of the dataset and for each forward pass, so that a run is the same with any number of processes, and
after a resume.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from timm.models import save_for_hf
from torch import Tensor, nn


@runtime_checkable
class Items(Protocol):
    """A map-style dataset."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any: ...


class Objective(nn.Module, ABC):
    """A regime's models, loss and data. What must survive a resume is a parameter or a buffer.

    `vit` is the ViT that is diagnosed, evaluated and saved; `photos` are batches
    (b, 3, h, w) that it is diagnosed on while it trains. `collate` makes a batch of items; None: torch's.
    """

    vit: nn.Module
    dataset: Items
    photos: Sequence[Tensor] = ()
    collate: Callable[[Sequence[Any]], Any] | None = None

    @abstractmethod
    def forward(self, batch: Any) -> dict[str, Tensor]:
        """`loss`, the mean over the photos of this micro-batch, and what else is to be logged."""

    def after_step(self, step: int, steps: int) -> None:
        """Called after each optimizer step, 1 to `steps`: a moving average, say."""

    def evaluate(self) -> dict[str, float]:
        """Figures on held-out data, in per cent where they are shares."""
        return {}

    def finish(self, out: Path) -> dict[str, Path]:
        """Write what the run is for into its folder: {what: path}. Here, the ViT in timm's folder format."""
        save_for_hf(self.vit, str(out / "model"), safe_serialization=True)
        return {"model": out / "model"}
