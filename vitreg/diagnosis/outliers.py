"""Which patches are outliers: the one definition that everything uses.

rule = diagnosis.rule
rule.mask(norms)                  # True where a patch is an outlier; norms after block `rule.layer`
rule.probability(norms)           # how likely it is one, where the populations overlap
"""

import math
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

T = TypeVar("T", Tensor, np.ndarray)


@dataclass(frozen=True)
class OutlierRule:
    """A patch is an outlier if its norm after block `layer` (0-based) is at least `threshold`.

    `curve` holds rising (norm, probability) pairs: how likely such a norm is an outlier's, interpolated on
    the log of the norm. Without it the probability is 0 or 1. An infinite threshold marks none.
    """

    layer: int
    threshold: float = math.inf
    curve: tuple[tuple[float, float], ...] = ()

    @property
    def marks_any(self) -> bool:
        """Whether any patch can be an outlier."""
        return math.isfinite(self.threshold)

    def to_json(self) -> dict[str, Any]:
        return {
            "layer": self.layer,
            "threshold": self.threshold if self.marks_any else None,
            "curve": [list(pair) for pair in self.curve],
        }

    def mask(self, norms: T) -> T:
        """True where a norm is an outlier's; of any shape."""
        marked: T = norms >= self.threshold
        return marked

    def probability(self, norms: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """How likely each norm is an outlier's, in 0 to 1; of any shape."""
        if not self.curve:
            return self.mask(norms).to(torch.float32)
        at, probabilities = zip(*self.curve, strict=True)
        logs = np.log(np.maximum(norms.detach().cpu().double().numpy(), 1e-30))
        found = np.interp(logs, np.log(np.asarray(at)), probabilities)
        return torch.from_numpy(found).to(norms.device, torch.float32)
