"""Attention bias (Jiang et al., Appendix A.2): a constant key and value in place of a register token.

    fix = AttentionBias.calibrate(vit, photos, neurons)
    with fix.applied_to(vit):
        vit(images)

The register neurons are zeroed on all tokens. What the other tokens would have read from the test-time
register, its mean key k' and value v' over the calibration images, takes part in every attention as one
more key: softmax(q [K; k']^T) [V; v']. There is no extra token anywhere.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitreg.data.batches import Batch, pixels_of
from vitreg.data.first_images import ranks_of
from vitreg.distributed import Ranks
from vitreg.errors import FixError, ImageError, UnsupportedModelError
from vitreg.fixes.base import Fix, first_patch
from vitreg.fixes.neurons import RegisterNeurons
from vitreg.fixes.registers import TestTimeRegisters
from vitreg.hooks.attention import AttentionCall, MultiheadCall
from vitreg.hooks.attention_mode import AttentionMode
from vitreg.hooks.block_edit import BlockEdit, Inner
from vitreg.hooks.inside_block import within
from vitreg.hooks.neuron_edit import edited
from vitreg.models.backbone import Backbone
from vitreg.models.probe import evaluating
from vitreg.tracing.streams import watch


@dataclass(frozen=True, eq=False)
class AttentionBias(Fix):
    """Register neurons zeroed, and one constant key and value per block and head.

    `tensors` holds "keys" (l, h, c) and "values" (l, h, e) in float32, one per query head, after rotary
    positions and key norms; l counts the blocks from `entry` (0-based) to the last. They are means at the
    size of the calibration images: calibrate again for another. A model that computes attention step by step
    and gives it back gives the rows without the new key.
    """

    type: ClassVar[str] = "bias"
    does_not_cure: ClassVar[str] = (
        "outliers that no neuron makes, such as those of an outlying position embedding; and the key that"
        " stands in for them is a mean, the same for every image."
    )
    tensors: dict[str, Tensor] = field(default_factory=dict, repr=False)
    entry: int = 0

    @classmethod
    def calibrate(
        cls,
        vit: Backbone,
        images: Iterable[Batch] | Iterable[Tensor],
        neurons: RegisterNeurons,
        **options: Any,
    ) -> "AttentionBias":
        """The fix that stands in for `TestTimeRegisters(neurons, **options)`, from its mean over images.

        One streaming pass (the paper takes 1000 images). Raises ValueError for options whose effect is no
        constant key: more than one register, and anything but zero left behind on the other tokens.
        """
        constant = {"registers": 1, "left": "zero", "keep_prefix": False}
        if constant | options != options | constant:
            raise ValueError(
                "expected one register, and left='zero' and keep_prefix=False for the other tokens: with a"
                " bias the neurons are zeroed everywhere."
            )
        register = TestTimeRegisters(neurons, **options)
        means = _Means(vit, register.entry)
        with register.applied_to(vit), evaluating(vit.model), watch(vit, on_attention=means.add):
            for batch in images:
                vit(pixels_of(batch))
        return cls(register.neurons, means.tensors(ranks_of(images)), register.entry)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AttentionBias) and (
            (self.neurons, self.entry, self.tensors.keys())
            == (other.neurons, other.entry, other.tensors.keys())
            and all(torch.equal(kept, other.tensors[name]) for name, kept in self.tensors.items())
        )

    def __hash__(self) -> int:
        return hash((self.neurons, self.entry))

    def edits(self, vit: Backbone) -> dict[int, BlockEdit]:
        layers = range(self.entry, vit.anatomy.depth)
        keys, values = (self.tensors[name].to(vit.device) for name in ("keys", "values"))
        down = vit.anatomy.down_projection
        return {
            layer: _BiasEdit(self.neurons, layer, down, key, value)
            for layer, key, value in zip(layers, keys, values, strict=True)
        }

    def check(self, vit: Backbone) -> None:
        super().check(vit)
        anatomy = vit.anatomy
        wanted = (anatomy.depth - self.entry, anatomy.heads)
        found = {name: tuple(self.tensors[name].shape) for name in ("keys", "values") if name in self.tensors}
        if len(found) != 2 or any(len(shape) != 3 or shape[:2] != wanted for shape in found.values()):
            raise FixError(
                f"expected keys and values of {wanted[0]} blocks (from block {self.entry}) and {wanted[1]}"
                f" heads, found {found or 'none'}. Calibrate with this model: AttentionBias.calibrate(vit,"
                " images, neurons)."
            )


class _Means:
    """Sums over images of the register's key and value in each block, in float64."""

    def __init__(self, vit: Backbone, entry: int) -> None:
        self._register = first_patch(vit, entry)  # where it will stand once it is applied
        self._entry, self._images = entry, 0
        self._sums: dict[str, dict[int, Tensor]] = {"keys": {}, "values": {}}

    def add(self, layer: int, call: AttentionCall) -> None:
        if layer < self._entry:
            return
        for name, tokens in (("keys", call.k), ("values", call.v)):
            read = tokens[:, :, self._register].double()
            self._sums[name][layer] = self._sums[name].get(layer, 0.0) + read.sum(0)
        self._images += len(read) if layer == self._entry else 0

    def tensors(self, ranks: Ranks) -> dict[str, Float[Tensor, "l h c"]]:
        """The means over the images of all ranks."""
        images = sum(ranks.gather(self._images))
        if not images:
            raise ImageError("there are no images to calibrate with; expected at least one batch.")
        mine = {
            name: torch.stack([sums[layer] for layer in sorted(sums)]).cpu()
            for name, sums in self._sums.items()
            if sums
        }
        parts = [part for part in ranks.gather(mine) if part]  # of ranks that had images
        return {
            name: (torch.stack([part[name] for part in parts]).sum(0) / images).float() for name in parts[0]
        }


class _BiasEdit(BlockEdit):
    """One block with its register neurons silent and one more key in its attention."""

    def __init__(
        self,
        neurons: RegisterNeurons,
        layer: int,
        down: str,
        key: Float[Tensor, "h c"],
        value: Float[Tensor, "h e"],
    ) -> None:
        self.down, self.key, self.value = down, key, value
        self.index = torch.tensor(neurons.by_layer.get(layer, []), dtype=torch.long)
        self.hooked = down if len(self.index) else None

    def run(self, block: nn.Module, inner: Inner, x: Tensor, args: Any, kwargs: Any) -> Tensor:
        run = partial(within, _OneMoreKey(self.key, self.value, len(x)), partial(inner, x, args, kwargs))
        return edited(block, self.down, self._silence, run) if len(self.index) else run()

    def _silence(self, activation: Float[Tensor, "b n f"]) -> Float[Tensor, "b n f"]:
        return activation.index_fill(-1, self.index.to(activation.device), 0)


class _OneMoreKey(AttentionMode):
    """Attention with a key and value that belong to no token, behind those of the tokens."""

    def __init__(self, key: Tensor, value: Tensor, images: int | None = None) -> None:
        super().__init__(images)
        self._key, self._value = key, value

    def attend(self, call: AttentionCall) -> Float[Tensor, "*b h n e"]:
        _refuse_causal(call.causal or (isinstance(call, MultiheadCall) and call.given.is_causal))
        mask = call.mask
        if mask is not None:  # it hides the new key from nobody
            mask = mask.expand(*mask.shape[:-1], call.k.shape[-2])
            mask = F.pad(mask, (0, 1), value=mask.dtype == torch.bool)
        return call.compute(
            mask, keys=partial(_appended, constant=self._key), values=partial(_appended, constant=self._value)
        )

    def weights(self, call: AttentionCall) -> Float[Tensor, "*b h n m"]:
        """The rows over the tokens alone: what is missing to 1 goes to the new key."""
        logits = call.logits(slice(None))
        scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
        new = call.q.float() @ self._key.to(call.q.device)[..., None].float() * scale
        return torch.cat([logits, new], -1).softmax(-1)[..., :-1]


def _refuse_causal(causal: bool) -> None:
    if causal:
        raise UnsupportedModelError(
            "the attention is causal: which tokens should see a key that belongs to none is not defined."
            " AttentionBias is for vision encoders, whose attention is not."
        )


def _appended(tokens: Float[Tensor, "b h n c"], constant: Float[Tensor, "q c"]) -> Tensor:
    """Keys or values (b, h, n + 1, c); where query heads share them, so do they the constant."""
    heads = tokens.shape[-3]
    one = constant[:: constant.shape[0] // heads, None].to(tokens)
    return torch.cat([tokens, one.expand(*tokens.shape[:-2], 1, -1)], -2)
