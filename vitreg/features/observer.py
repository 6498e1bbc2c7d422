"""The named features of one forward pass.

observe = Observer(vit, ["cls", "patches@8", "attention"])
rows = observe(pixels)                 # {name: (b, ...)}
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vitreg.errors import UnsupportedModelError
from vitreg.fixes.base import applied
from vitreg.fixes.splitting import Fork
from vitreg.hooks.attention import AttentionCall
from vitreg.hooks.block_edit import edits_of
from vitreg.models.backbone import Backbone
from vitreg.models.head import find_readout, logits_of
from vitreg.models.headless import without_output
from vitreg.models.probe import evaluating
from vitreg.tracing.streams import token_norms, watch

FEATURES = (
    "logits", "output", "cls", "mean", "patches", "registers", "test_registers",
    "norms", "queries", "keys", "values", "attention",
)  # fmt: skip
_OF_ATTENTION = ("queries", "keys", "values", "attention")


class Observer:
    """Runs a model, with whatever fix is applied, and keeps some features. Of layer "@L" or of the last one.

    logits (c)          the model's own head
    output (k)          what the model returns: an embedding, say
    cls (d)             the CLS token; mean (d): the mean of the patches; patches (p, d)
    registers (r, d)    trained register tokens
    test_registers (r, d)   what the applied fix carries beside the stream: test-time registers or, under
                        splitting, originals (NaN in places that no token took); last layer only
    norms (p)           of the patches in the residual stream
    queries, keys, values (p, h*c)  of the patches, heads concatenated
    attention (h, p)    of CLS to the patches

    Tokens are taken after the model's final norm, also those of earlier layers (as in DINOv2's evaluations);
    `norms` before it.
    """

    def __init__(self, vit: Backbone, wanted: Sequence[str], dtype: torch.dtype = torch.float32) -> None:
        self._vit, self._dtype = vit, dtype
        self._readout = find_readout(vit)
        depth = vit.anatomy.depth
        self._wanted: dict[int, dict[str, str]] = {}  # {layer: {feature: the name asked for}}
        for name in wanted:
            feature, _, layer = name.partition("@")
            self._check(feature)
            number = int(layer or -1) % depth
            if not -depth <= int(layer or -1) < depth or feature in self._wanted.get(number, {}):
                raise ValueError(
                    f"feature {name!r}: expected a layer of {-depth} to {depth - 1}, and each feature once."
                )
            self._wanted.setdefault(number, {})[feature] = name

    @staticmethod
    def knows(name: str) -> bool:
        return name.partition("@")[0] in FEATURES

    def _check(self, feature: str) -> None:
        layout = self._vit.layout
        if feature in ("cls", "attention") and not layout.prefix:
            raise UnsupportedModelError(f"{self._vit.name} has no CLS token; use the mean of the patches.")
        if feature == "registers" and not layout.registers:
            raise UnsupportedModelError(f"{self._vit.name} has no trained register tokens.")
        if feature == "logits" and not self._readout.classes:
            why = without_output(self._vit) or f"{self._vit.name} has no classification head"
            raise UnsupportedModelError(f"{why}.")
        if feature == "output" and (why := without_output(self._vit)):
            raise UnsupportedModelError(f"{why}. Use cls or mean.")

    def __call__(self, pixels: Float[Tensor, "b 3 h w"]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        last = self._vit.anatomy.depth - 1

        def block(layer: int, residual: Tensor) -> None:
            wanted, layout = self._wanted.get(layer, {}), seen.layout
            if "norms" in wanted:
                found[wanted["norms"]] = token_norms(residual[:, layout.patch_slice])
            if wanted.keys() & {"cls", "mean", "patches", "registers"}:
                stream = self._normed(residual)
                patches = stream[:, layout.patch_slice]
                parts = {
                    "cls": lambda: stream[:, 0],
                    "mean": lambda: patches.mean(1),
                    "patches": lambda: patches,
                    "registers": lambda: stream[:, layout.register_slice],
                }
                found.update({name: parts[part]() for part, name in wanted.items() if part in parts})

        def attend(layer: int, call: AttentionCall) -> None:
            wanted, patches = self._wanted.get(layer, {}), seen.inner.patch_slice
            for feature, tensor in (("queries", "q"), ("keys", "k"), ("values", "v")):
                if feature in wanted:
                    heads = getattr(call, tensor)[:, :, patches]
                    found[wanted[feature]] = heads.transpose(1, 2).flatten(2).detach()
            if "attention" in wanted:
                found[wanted["attention"]] = call.rows(slice(0, 1))[:, :, 0, patches]

        of_attention = any(f in _OF_ATTENTION for wanted in self._wanted.values() for f in wanted)
        watching = watch(self._vit, on_block=block, on_attention=attend if of_attention else None)
        with evaluating(self._vit.model), torch.no_grad(), watching as seen:
            output = self._vit(pixels)
        wanted = self._wanted.get(last, {})
        if "logits" in wanted:
            logits = logits_of(output)
            assert logits is not None
            found[wanted["logits"]] = logits
        if "output" in wanted:
            found[wanted["output"]] = self._one_vector(output)
        if "test_registers" in wanted:
            found[wanted["test_registers"]] = self._carried()
        return {name: value.detach().to("cpu", self._dtype).contiguous() for name, value in found.items()}

    def _normed(self, stream: Tensor) -> Tensor:
        return stream if self._readout.norm is None else self._readout.norm(stream)

    def _one_vector(self, output: Any) -> Tensor:
        first = output[0] if isinstance(output, tuple) else output  # CoCa returns its tokens with it
        if isinstance(first, Tensor) and first.dim() == 2:
            return first
        raise UnsupportedModelError(f"{self._vit.name} does not return one vector per image.")

    def _carried(self) -> Tensor:
        blocks = self._vit.anatomy.block_modules(self._vit.model)
        for handle in reversed(applied(self._vit.model)) if any(map(edits_of, blocks)) else ():
            carried = handle.carried
            if isinstance(carried, Fork):
                return self._normed(carried.original).masked_fill(~carried.valid[..., None], torch.nan)
            if carried is not None:
                return self._normed(carried)
        raise UnsupportedModelError("no fix that carries test-time registers is applied to the model.")
