"""What keeps the teacher from collapse: centres that move once per optimizer step, Sinkhorn, signs of it.

The losses are lightly's. Their own centres move within the forward pass: the second micro-batch of a step
would meet another centre than the first. Here they wait for the end of the step, so that neither gradient
accumulation nor the number of processes changes a loss.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vitreg.errors import MissingExtraError

try:
    from lightly.loss import DINOLoss, IBOTPatchLoss
    from lightly.loss.swav_loss import sinkhorn
    from lightly.models.modules.center import Center, center_momentum
except ImportError as error:
    raise MissingExtraError("lightly", "train") from error


class Tally:
    """The mean of all vectors since the last `take`, over all micro-batches and processes.

    Plain attributes: as buffers, DistributedDataParallel would overwrite them with those of process 0.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None  # (d + 1,): the vectors' sum and their number

    def add(self, vectors: Float[Tensor, "*n d"]) -> None:
        rows = vectors.detach().flatten(0, -2).float()
        new = torch.cat([rows.sum(0), rows.new_tensor([len(rows)])])
        self._sum = new if self._sum is None else self._sum + new

    def take(self) -> Float[Tensor, " d"] | None:
        """None where no vector came to any process. Every process must call it."""
        total, self._sum = self._sum, None
        if total is None:
            return None
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total)
        return total[:-1] / total[-1] if total[-1] else None


class DinoLoss(DINOLoss):  # type: ignore[misc]  # lightly has no types
    """lightly's DINO loss; its centre waits for `move_center`."""

    def __init__(self, output_dim: int, center_momentum: float) -> None:
        super().__init__(output_dim, center_momentum=center_momentum)
        self.tally = Tally()

    def update_center(self, teacher_out: Tensor) -> None:
        self.tally.add(teacher_out)

    def move_center(self) -> None:
        _move(self.center, self.tally, self.center_momentum)


class _LateCenter(Center):  # type: ignore[misc]  # lightly has no types
    def __init__(self, size: tuple[int, ...], momentum: float) -> None:
        super().__init__(size, momentum=momentum)
        self.tally = Tally()

    def update(self, x: Tensor) -> None:
        self.tally.add(x)


class IbotLoss(IBOTPatchLoss):  # type: ignore[misc]  # lightly has no types
    """lightly's iBOT loss; its centre waits for `move_center`."""

    def __init__(self, output_dim: int, center_momentum: float) -> None:
        super().__init__(output_dim)
        self.center = _LateCenter((1, output_dim), center_momentum)

    def move_center(self) -> None:
        _move(self.center.center, self.center.tally, self.center.momentum)


@torch.no_grad()
def _move(center: Tensor, tally: Tally, momentum: float) -> None:
    mean = tally.take()
    if mean is not None:
        center.copy_(center_momentum(center, mean.expand_as(center), momentum))


@torch.no_grad()
def balanced(scores: Float[Tensor, "n k"], temperature: float) -> Float[Tensor, "n k"]:
    """Scores whose softmax at this temperature is Sinkhorn's assignment (arXiv 2006.09882, 3 iterations)."""
    if not len(scores):
        return scores
    inside = (scores - scores.max()).clamp_min(-80 * temperature)  # no exp() over- or underflows
    chosen: Tensor = sinkhorn(inside, iterations=3, epsilon=temperature)
    return temperature * chosen.clamp_min(1e-30).log()


@torch.no_grad()
def health(
    cls: Float[Tensor, "b d"], scores: Float[Tensor, "b k"], temperature: float
) -> dict[str, Float[Tensor, ""]]:
    """Signs of collapse. `std`: of the teacher's unit CLS over the photos, 1 for directions at random.

    `entropy` (nats) of the teacher's choice for one crop, and of `entropy_mean`, its mean over the crops: no
    collapse while the first is well below the second, and the second far from 0.
    """
    chosen = (scores / temperature).softmax(-1)
    spread = F.normalize(cls, dim=-1).std(0, correction=0).square().sum().sqrt()
    return {"std": spread, "entropy": _entropy(chosen).mean(), "entropy_mean": _entropy(chosen.mean(0))}


def _entropy(chances: Float[Tensor, "*b k"]) -> Float[Tensor, "*b"]:
    return torch.special.entr(chances).sum(-1)
