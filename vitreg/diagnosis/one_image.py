"""One image as a model sees it: norms, attention from any token, neurons, prediction.

    view = look(vit, pixels, query="register 0", neurons=[(7, 417)])     # pixels (1, 3, h, w)
    view.norms                                   # (l, gh, gw)
    view.attention.of(11)                        # where that token looks in the last block: (gh, gw)
    view.activations[7, 417]                     # (gh, gw)
    view.likeliest(class_names(vit))             # [("tench", 0.93), ...]

One forward pass. What a fix makes of the image is seen by looking twice, without it and while it is applied.
A Diagnosis tells what is so in general, over many images; this is what the explorer and notebooks show of
one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vitreg.diagnosis.statistics import query_tokens
from vitreg.errors import NonFiniteError
from vitreg.hooks.attention import AttentionCall
from vitreg.models.backbone import Backbone
from vitreg.models.head import logits_of
from vitreg.models.layout import TokenLayout
from vitreg.models.probe import evaluating
from vitreg.tracing.streams import token_norms, watch

# A token whose attention one can ask for: "CLS", "register 0", a patch as (row, column), or "patches": the
# mean of some that are spread evenly, for models without CLS.
Query = str | tuple[int, int]


@dataclass(frozen=True, eq=False)
class Attention:
    """Where one token looks, by layer and head: its attention to patches, each map scaled to a sum of 1.

    `to_patches` is the share of its whole attention that goes to patches; the rest is on CLS and registers.
    Both are 0 in blocks where the token does not exist: a fix's register before it enters.
    """

    maps: Float[np.ndarray, "l h gh gw"]
    to_patches: Float[np.ndarray, "l h"]

    def of(self, layer: int, head: int | None = None) -> Float[np.ndarray, "gh gw"]:
        """One head's map; without a head, the mean of all heads' maps, as in a Diagnosis."""
        found: np.ndarray = self.maps[layer].mean(0) if head is None else self.maps[layer, head]
        return found


@dataclass(frozen=True, eq=False)
class ImageView:
    """Patch norms of the residual stream after every block, where one token looks, the activations of the
    neurons that were asked for, and the model's (c,) output, if it has the shape of logits."""

    norms: Float[np.ndarray, "l gh gw"]
    attention: Attention
    activations: Mapping[tuple[int, int], Float[np.ndarray, "gh gw"]]
    logits: Float[Tensor, " c"] | None

    def likeliest(self, names: Sequence[str], count: int = 5) -> list[tuple[str, float]]:
        """The likeliest of the named classes, with their probabilities (see vitreg.models.head.class_names).
        None without names: the output of a model without a head is no logits."""
        if self.logits is None or not names:
            return []
        chances, classes = self.logits.softmax(-1).topk(min(count, len(names)))
        return [(names[c], p) for c, p in zip(classes.tolist(), chances.tolist(), strict=True)]


def inspect_image(
    vit: Backbone,
    pixels: Float[Tensor, "1 3 h w"],
    *,
    query: Query | None = None,
    neurons: Sequence[tuple[int, int]] = (),
) -> ImageView:
    """One image, with the attention of one token in every layer and head (default: CLS, or "patches"), and
    with the activations of some MLP neurons, (layer, index): inputs of the down-projection, at each patch.

    A fix's registers count behind the model's own. Raises ValueError for a token or a neuron that the model
    does not have, NonFiniteError where the residual stream holds NaN.
    """
    query = queries(vit)[0] if query is None else query
    _check_neurons(vit, neurons)
    norms: list[Tensor] = []
    rows: list[Tensor] = []
    found: dict[tuple[int, int], np.ndarray] = {}

    def block(layer: int, residual: Tensor) -> None:
        norms.append(token_norms(residual[:, seen.layout.patch_slice])[0])

    def attend(layer: int, call: AttentionCall) -> None:
        tokens, inner = _tokens(query, seen.inner), seen.inner
        if tokens is None:
            rows.append(torch.zeros(call.q.shape[1], inner.patches))
        else:
            rows.append(call.rows(tokens.to(call.q.device))[0, ..., inner.patch_slice].mean(1).float().cpu())

    def activate(layer: int, activation: Tensor) -> None:
        inner = seen.inner
        for place in neurons:
            if place[0] == layer:
                found[place] = inner.as_grid(activation[0, inner.patch_slice, place[1]]).float().cpu().numpy()

    watching = watch(vit, on_block=block, on_attention=attend, on_neurons=activate if neurons else None)
    with evaluating(vit.model), watching as seen:
        output = vit(pixels)
    if _tokens(query, seen.inner) is None:
        raise ValueError(f"the model has no token {query!r}: found {seen.inner}.")
    grid = seen.layout.as_grid(torch.stack(norms)).cpu().numpy()
    if not np.isfinite(grid).all():
        raise NonFiniteError(f"the residual stream holds NaN or infinity in {vit.dtype}. Use float32.")
    logits = logits_of(output)
    attention = _attention(torch.stack(rows), seen.layout)
    return ImageView(grid, attention, found, None if logits is None else logits[0].cpu())


def _check_neurons(vit: Backbone, neurons: Sequence[tuple[int, int]]) -> None:
    anatomy = vit.anatomy
    for layer, index in neurons:
        if not (0 <= layer < anatomy.depth and 0 <= index < anatomy.neurons):
            raise ValueError(
                f"block {layer}, neuron {index}: expected blocks 0 to {anatomy.depth - 1} and neurons 0 to"
                f" {anatomy.neurons - 1}."
            )


def _attention(to_patches: Float[Tensor, "l h p"], layout: TokenLayout) -> Attention:
    shares = to_patches.sum(-1)
    maps = to_patches / shares.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    return Attention(layout.as_grid(maps).numpy(), shares.numpy())


def queries(vit: Backbone, registers: int = 0) -> list[str]:
    """The tokens of a model, beside its patches, that one can look from: "CLS" or "patches", and registers.

    `registers`: how many more a fix brings.
    """
    own = vit.layout.registers + registers
    return ["CLS" if vit.layout.prefix else "patches", *(f"register {i}" for i in range(own))]


def _tokens(query: Query, layout: TokenLayout) -> Tensor | None:
    """The indices of the token (or tokens) asked for; None where there is none."""
    if query == "patches":
        return query_tokens(TokenLayout(0, 0, layout.grid)) + layout.patch_slice.start
    if query == "CLS":
        return torch.zeros(1, dtype=torch.long) if layout.prefix else None
    if isinstance(query, str):
        kind, _, number = query.partition(" ")
        if kind != "register" or not number.isdecimal():
            raise ValueError(f"{query!r}: expected 'CLS', 'patches', 'register K', or a patch (row, column).")
        known = int(number) < layout.registers
        return torch.tensor([layout.register_slice.start + int(number)]) if known else None
    (row, column), (rows, columns) = query, layout.grid
    inside = 0 <= row < rows and 0 <= column < columns
    return torch.tensor([layout.patch_slice.start + row * columns + column]) if inside else None
