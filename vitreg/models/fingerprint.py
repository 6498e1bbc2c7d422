"""Which model a fix was made for: its geometry, and a hash that is the same in every library's form of it.

fingerprint = Fingerprint.of(vit)
fingerprint.check(other)          # another geometry is an error, other weights are a warning
"""

import hashlib
import warnings
from dataclasses import dataclass, field
from weakref import WeakSet

import numpy as np
from torch import nn

from vitreg.errors import FixError, FixWarning, UnsupportedModelError
from vitreg.hooks.weights import dense_weight, is_quantised
from vitreg.models.backbone import Backbone
from vitreg.models.probe import evaluating

_WARNED: WeakSet[nn.Module] = WeakSet()
# Rows of each block's down-projection that the hash covers.
ROWS = 16


@dataclass(frozen=True)
class Fingerprint:
    """Blocks, width, neurons per block and the hash of the weights.

    `base_model` is the name, where known, `image_size` the (height, width) at which the model was looked at.
    `weights` is None where there is nothing to hash: quantised weights are other numbers in every format.
    """

    depth: int
    width: int
    neurons: int
    weights: str | None
    base_model: str | None = field(default=None, compare=False)
    image_size: tuple[int, int] | None = field(default=None, compare=False)

    @staticmethod
    def of(vit: Backbone) -> "Fingerprint":
        a = vit.anatomy
        return Fingerprint(a.depth, a.width, a.neurons, weights_hash(vit), vit.name, vit.image_size)

    def check(self, vit: Backbone) -> None:
        """Raise FixError for a model of another geometry, warn (FixWarning) about other weights."""
        a = vit.anatomy
        if (self.depth, self.width, self.neurons) != (a.depth, a.width, a.neurons):
            raise FixError(
                f"the fix was made for {self.depth} blocks of width {self.width} with {self.neurons} neurons"
                f"{self._base()}, but this model has {a.depth} blocks of width {a.width} with {a.neurons}"
                " neurons. Apply it to the model that it was made for, or find this model's own neurons."
            )
        found = weights_hash(vit)
        if self.weights is None or found is None:
            self._warn_unknown(vit, here=found is None)
        elif self.weights != found:
            warnings.warn(
                f"the fix was made for other weights{self._base()}: expected hash {self.weights}, found"
                f" {found}. Register neurons differ between trainings: check with `vitreg verify`.",
                FixWarning,
                stacklevel=4,  # past Fix.check and Fix.apply
            )

    def _warn_unknown(self, vit: Backbone, here: bool) -> None:
        """Once for each model."""
        if vit.model in _WARNED:
            return
        _WARNED.add(vit.model)
        whose = "this model's" if here else "those of the model that the fix was made for"
        warnings.warn(
            f"whether the fix was made for these weights{self._base()} cannot be told, because {whose} are"
            " quantised and have no hash. Check with `vitreg verify`.",
            FixWarning,
            stacklevel=5,  # past `check`, Fix.check and Fix.apply
        )

    def _base(self) -> str:
        return f" ({self.base_model})" if self.base_model else ""


def weights_hash(vit: Backbone) -> str | None:
    """16 hex digits of the SHA-256 of the signs of some rows of every block's down-projection.

    Signs, for rounding to bfloat16 or float16 keeps them, on any path (from float32 by float16 to bfloat16 is
    not from float32 to bfloat16), while training flips some of the many near zero. The layer has the same
    layout (out, in) in every library. A zero has no sign, for a layer that is asked for its weights does not
    tell -0 from 0. None where the weights are quantised, or cannot be read.
    """
    digest = hashlib.sha256()
    with evaluating(vit.model):
        for linear in vit.anatomy.down_projections(vit.model):
            if is_quantised(linear):
                return None
            try:
                rows = dense_weight(linear, ROWS)
            except UnsupportedModelError:
                return None
            digest.update(np.packbits((rows < 0).cpu().numpy()).tobytes())
    return digest.hexdigest()[:16]
