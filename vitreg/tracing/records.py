"""Record what happens inside a Vision Transformer during a forward pass.

    with trace(vit, attention="cls") as t:
        vit(batch)
    t.norms          # (l, b, n)
    t.attention      # (l, b, h, r, n)

A trace holds the latest forward pass only, so memory grows with the batch and never with the number
of images. `watch` is the streaming form underneath: it hands each block's tensors to a function and
keeps nothing.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from vitreg.errors import UnsupportedModelError
from vitreg.hooks.attention import AttentionCall
from vitreg.models.anatomy import Anatomy
from vitreg.models.backbone import Backbone
from vitreg.models.layout import TokenLayout
from vitreg.tracing.streams import token_norms, watch

AttentionRows = Literal["cls", "registers", "full"] | Sequence[int]


class trace:  # noqa: N801 - used as a verb, like torch.no_grad
    """Record chosen parts of the latest forward pass of `vit` made inside the `with` block.

    norms       L2 norms of the residual stream after each block -> `t.norms` (l, b, n)
    residuals   the residual stream itself -> `t.residuals` (l, b, n, d)
    neurons     inputs of the MLPs' down-projections -> `t.neurons` (l, b, n, f)
    attention   "cls", "registers", "full", or patch numbers (row-major) -> `t.attention`
                (l, b, h, r, n), softmax over all tokens; r rows in the order asked for
    qkv         -> `t.q`, `t.k`, `t.v` (l, b, h, n, c), after rotary positions and q/k norm
    embedding   the patch embedding before positions -> `t.embedding` (b, p, d)
    layers      the 0-based layers to record (default all); the l axis follows this order

    Tokens n are those of `t.layout`; of neurons, attention, q, k and v those of `t.inner`, which counts the
    registers that a fix carries inside the blocks (and attention="registers" has their rows).
    Reading what was not asked for, or before a forward pass, is an AttributeError that says so.
    """

    def __init__(
        self,
        vit: Backbone,
        *,
        norms: bool = True,
        residuals: bool = False,
        neurons: bool = False,
        attention: AttentionRows | None = None,
        qkv: bool = False,
        embedding: bool = False,
        layers: Iterable[int] | None = None,
    ) -> None:
        self._vit = vit
        self.layers = _checked_layers(layers, vit.anatomy)
        self._rows = attention
        self._norms, self._residuals, self._qkv = norms, residuals, qkv
        self._record: dict[str, dict[int, Tensor]] = {}
        self._watch = watch(
            vit,
            on_start=self._forget,
            on_embedding=partial(self._put, "embedding", 0) if embedding else None,
            on_block=self._block,
            on_neurons=self._keep_neurons if neurons else None,
            on_attention=self._attention if attention is not None or qkv else None,
        )
        # A wrong request is an error before the forward pass; how many patches there are, only that can say.
        of_the_pass = (attention == "registers" and self._watch.edited) or _are_patches(attention)
        if attention is not None and not of_the_pass:
            _query_index(attention, vit.layout)

    def __enter__(self) -> "trace":
        self._watch.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._watch.__exit__(*error)

    @property
    def layout(self) -> TokenLayout:
        """The token layout of the recorded pass."""
        return self._watch.layout

    @property
    def inner(self) -> TokenLayout:
        """The token layout inside the recorded blocks (of the last of them, should they differ)."""
        return self._watch.inside(self.layers[-1])

    def __getattr__(self, name: str) -> Tensor:
        # Only called for names that are not attributes yet: the recorded tensors.
        record = self.__dict__.get("_record", {})
        if name == "embedding" and name in record:
            return record[name][0]
        if name not in record:
            raise AttributeError(
                f"this trace has no {name!r}: it holds {sorted(record) or 'nothing yet'}. Ask for it in"
                " trace(...) and run the model inside the with block."
            )
        missing = [layer for layer in self.layers if layer not in record[name]]
        if missing:
            raise AttributeError(
                f"this trace has no {name!r} of layers {missing}: the latest forward pass did not reach them."
            )
        if len({record[name][layer].shape for layer in self.layers}) > 1:
            raise AttributeError(
                f"this trace's {name!r} has other tokens in some layers than in others: the fix on this model"
                f" carries none through the first blocks. Ask for fewer of the layers {self.layers}."
            )
        return torch.stack([record[name][layer] for layer in self.layers])

    def _forget(self) -> None:
        """A new pass begins: drop the last one, before it takes memory beside the new, or mixes with it."""
        self._record = {name: kept for name, kept in self._record.items() if name == "embedding"}

    def _put(self, name: str, layer: int, value: Tensor) -> None:
        self._record.setdefault(name, {})[layer] = value

    def _block(self, layer: int, residual: Tensor) -> None:
        if layer not in self.layers:
            return
        if self._norms:
            self._put("norms", layer, token_norms(residual))
        if self._residuals:
            self._put("residuals", layer, residual)

    def _keep_neurons(self, layer: int, activation: Tensor) -> None:
        if layer in self.layers:
            self._put("neurons", layer, activation)

    def _attention(self, layer: int, call: AttentionCall) -> None:
        if layer not in self.layers:
            return
        if self._rows is not None:
            self._put("attention", layer, call.rows(_query_index(self._rows, self._watch.inner)))
        if self._qkv:
            for name in ("q", "k", "v"):
                self._put(name, layer, getattr(call, name).detach())


def _checked_layers(layers: Iterable[int] | None, anatomy: Anatomy) -> list[int]:
    chosen = list(range(anatomy.depth)) if layers is None else list(layers)
    wrong = [layer for layer in chosen if not 0 <= layer < anatomy.depth]
    if wrong or not chosen:
        raise ValueError(f"layers {wrong or chosen}: expected one or more of 0 to {anatomy.depth - 1}.")
    return chosen


def _are_patches(rows: AttentionRows | None) -> bool:
    return rows is not None and not isinstance(rows, str) and len(rows) > 0 and min(rows) >= 0


def _query_index(rows: AttentionRows, layout: TokenLayout) -> Tensor | slice:
    """The query tokens whose attention rows are wanted."""
    if rows == "full":
        return slice(None)
    if rows == "cls":
        if layout.prefix == 0:
            raise UnsupportedModelError(
                "this model has no CLS token; ask for the attention of patches instead, by their numbers."
            )
        return slice(0, 1)
    if rows == "registers":
        if layout.registers == 0:
            raise UnsupportedModelError(
                "this model has no register tokens whose attention could be recorded."
            )
        return layout.register_slice
    if isinstance(rows, str):
        raise ValueError(f"attention={rows!r}: expected 'cls', 'registers', 'full' or patch numbers.")
    wrong = [patch for patch in rows if not 0 <= patch < layout.patches]
    if wrong or not rows:
        raise ValueError(f"patches {wrong or list(rows)}: expected some of 0 to {layout.patches - 1}.")
    return torch.tensor(list(rows)) + layout.patch_slice.start
