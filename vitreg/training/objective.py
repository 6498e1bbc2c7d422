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

from vitreg.fixes.added_registers import NAME as ADDED


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

    def no_weight_decay(self) -> set[str]:
        """What is not decayed beside biases and norms: what timm lists for a model, and added registers."""
        exempt: set[str] = set()
        for path, module in self.named_modules():
            listed: Any = None if module is self else getattr(module, "no_weight_decay", None)
            exempt |= {f"{path}.{name}" for name in (*(listed() if listed else ()), ADDED)}
        return exempt

    def evaluate(self) -> dict[str, float]:
        """Figures on held-out data, in per cent where they are shares."""
        return {}

    def finish(self, out: Path) -> dict[str, Path]:
        """Write what the run is for into its folder: {what: path}. Here, the ViT in timm's folder format."""
        return save_model(self.vit, out)


def save_model(model: Any, out: Path) -> dict[str, Path]:
    """Write model/, a folder in the library's own format that `vitreg.load` reads: {"model": its path}."""
    if hasattr(model, "save_pretrained"):  # transformers
        model.save_pretrained(out / "model")
    else:
        save_for_hf(model, str(out / "model"), safe_serialization=True)
    return {"model": out / "model"}
