"""Plant attention artifacts with known ground truth into any Vision Transformer.

    phantom = plant(vit, images, layer=5)
    report = diagnose(phantom.vit, images)
    phantom.marked(images)            # (b, gh, gw): the patches that the planted neurons mark

As scanners are checked on phantoms, detectors and fixes are checked here: a few MLP neurons are
rewritten to read a direction fitted to low-information patches and to write a massive vector; where
keys and values can be reached, later keys listen to that vector and later values ignore it, so that the
marked patches become attention sinks. The planted model is a copy. It is a phantom, never evidence
about the model it was planted in, and its name says so.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vitreg.errors import UnsupportedModelError
from vitreg.hooks.block_edit import without_edits
from vitreg.models.backbone import Backbone
from vitreg.models.probe import evaluating
from vitreg.phantoms.attention_sinks import make_sinks
from vitreg.phantoms.planting import (
    Mlp,
    idle_neurons,
    mlp_inputs,
    phantom_of,
    read_flat,
    read_marked,
    write_direction,
)
from vitreg.printing import one_of
from vitreg.tracing.records import trace

MIN_NORM = 1.2  # below, marked patches can hardly be told from the others by anything

# What a planted neuron does beyond its threshold: rise to a ceiling, or on and on as GELU does.
Activation = Literal["switch", "ramp"]


@dataclass(frozen=True)
class Phantom:
    """A planted model and its ground truth.

    `by_layer` says which neurons were planted in which blocks (0-based), `activation` what they do beyond
    their threshold. `read` (d,) and `bias` mark a patch where read @ x + bias >= 0.5, x being the input of
    the first planted block's MLP. `write` (d,) is the unit direction of the excess, `rate` the share of
    patches marked among the images given, `norm` the median norm of marked patches over that of the others,
    after the last planted block. `listens` says whether later keys and values were changed too.
    """

    vit: Backbone
    by_layer: dict[int, tuple[int, ...]]
    activation: Activation
    read: Float[Tensor, " d"]
    bias: float
    write: Float[Tensor, " d"]
    rate: float
    norm: float
    listens: bool
    seed: int

    @property
    def layer(self) -> int:
        """The first planted block: outliers appear after it."""
        return min(self.by_layer)

    @property
    def neurons(self) -> tuple[int, ...]:
        """The planted neurons of the only planted block; an AttributeError where there are several."""
        if len(self.by_layer) > 1:
            raise AttributeError(
                f"neurons were planted in blocks {', '.join(map(str, self.by_layer))}: read `by_layer`."
            )
        return self.by_layer[self.layer]

    def marked(self, images: Float[Tensor, "b 3 h w"]) -> Bool[Tensor, "b gh gw"]:
        """The ground truth for any images: the patches that the first block's planted neurons mark."""
        x = mlp_inputs(self.vit, Mlp(self.vit, self.layer), images)
        layout = self.vit.layout_for(images)
        return layout.as_grid((x[:, layout.patch_slice] @ self.read + self.bias) >= 0.5)

    def excess(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b gh gw"]:
        """What was really planted: each patch's norm after the last planted block, over the median norm of
        the unmarked patches of these images."""
        with without_edits(self.vit.model):
            norms = _patch_norms(self.vit, max(self.by_layer), images)
        return norms / norms[~self.marked(images)].median()

    def to_json(self) -> dict[str, Any]:
        truth = {k: v for k, v in vars(self).items() if k not in ("vit", "read", "write")}
        if len(self.by_layer) == 1:
            truth["neurons"] = self.neurons
        return truth | {
            "layer": self.layer,
            "model": self.vit.name,
            "read": self.read.tolist(),
            "write": self.write.tolist(),
        }

    def save(self, path: str | Path) -> Path:
        """Write the ground truth (not the weights, which the seed makes again) as JSON."""
        from vitreg.files import write_atomically

        return write_atomically(Path(path), json.dumps(self.to_json()))


def plant(
    vit: Backbone,
    images: Tensor | Iterable[Tensor],
    layer: int | Sequence[int],
    *,
    neurons: int = 4,
    rate: float = 0.02,
    norm: float = 15.0,
    activation: Activation = "switch",
    listens: bool = True,
    seed: int = 0,
) -> Phantom:
    """Plant `neurons` register neurons into block `layer` (0-based) of a copy of `vit`, or dealt out over
    several blocks, each of which adds an equal share of the excess.

    `images` (b, 3, h, w), or batches of them, are what the read directions are fitted to: about `rate` of
    their patches get norms whose median is `norm` times the others' after the last of these blocks.
    With "switch" and 2 or more neurons, half rise and half hold the sum at its ceiling, so that a patch is
    either marked or not; with "ramp" (and with a single neuron) the excess grows with the input, from nothing
    up to a few times its median. Unless `listens` is False, the marked patches become attention sinks in the
    later blocks. The same arguments give the same phantom.

    Raises ValueError where the marked patches have that norm by themselves, UnsupportedModelError where
    the MLP has no bias to set a threshold with, where the block normalises what its MLP writes, or where a
    later block cannot tell the patches that the first one marks.
    """
    layers = sorted(layer) if isinstance(layer, Sequence) else [layer]
    _check(vit, layers, neurons, rate, norm, activation)
    batches = [images] if isinstance(images, Tensor) else list(images)
    planted = phantom_of(vit)
    mlps = [Mlp(planted, index) for index in layers]
    generator = torch.Generator().manual_seed(seed)
    read, bias = read_flat(planted, mlps[0], batches, rate)
    chosen = {
        mlp.layer: idle_neurons(planted, mlp, batches[0], count, generator)
        for mlp, count in zip(mlps, _dealt(neurons, len(mlps)), strict=True)
    }
    write = write_direction(vit.anatomy.width, generator).to(read)
    phantom = Phantom(planted, chosen, activation, read, bias, write, 0.0, 0.0, False, seed)
    with torch.no_grad():
        marked = [phantom.marked(batch) for batch in batches]  # decided before the block writes
        for left, mlp in zip(reversed(range(len(mlps))), mlps, strict=True):
            _rewrite(phantom, mlp, batches, marked)
            achieved = _set_norm(phantom, mlp, batches, marked, norm, left)
        richest = max(range(len(batches)), key=lambda i: int(marked[i].sum()))
        listens = listens and make_sinks(planted, batches[richest], marked[richest], layers[-1] + 1)
    return replace(phantom, rate=float(torch.cat(marked).float().mean()), norm=achieved, listens=listens)


def _check(vit: Backbone, layers: list[int], neurons: int, rate: float, norm: float, activation: str) -> None:
    depth, quarter, count = vit.anatomy.depth, vit.anatomy.neurons // 4, len(layers)
    if not layers or len(set(layers)) < count or not 0 <= layers[0] <= layers[-1] < depth:
        raise ValueError(f"layer {layers}: expected one block or several different ones, 0 to {depth - 1}.")
    if not count <= neurons <= count * quarter:
        raise ValueError(
            f"neurons={neurons}: expected {count} to {count * quarter}, in each block at least one and at"
            " most a quarter of the MLP."
        )
    if not 0 < rate <= 0.2 or not norm >= MIN_NORM:
        raise ValueError(
            f"rate={rate}, norm={norm}: expected a rate up to 0.2 and a norm of at least {MIN_NORM}."
        )
    if activation not in get_args(Activation):
        raise ValueError(f"activation={activation!r}: {one_of(activation, get_args(Activation))}")


def _dealt(neurons: int, blocks: int) -> list[int]:
    """How many neurons each block gets: as even as can be, the first blocks one more."""
    return [neurons // blocks + (index < neurons % blocks) for index in range(blocks)]


# -- how strong ------------------------------------------------------------------------------------


def _rewrite(phantom: Phantom, mlp: Mlp, batches: list[Tensor], marked: list[Tensor]) -> None:
    """Make the chosen neurons of one block read and write, through the gate that silences them elsewhere."""
    neurons = phantom.by_layer[mlp.layer]
    holding = len(neurons) // 2 if phantom.activation == "switch" else 0
    reading = phantom.read, phantom.bias
    if mlp.layer > phantom.layer:
        reading = read_marked(phantom.vit, mlp, batches, marked, ceiling=1.0 if holding else math.inf)
    mlp.plant(neurons, holding, reading, phantom.write)
    if not _silent_where_unmarked(phantom.vit, mlp, neurons[0], batches[0], marked[0]):
        mlp.plant(neurons, holding, reading, phantom.write, gate=1)


def _silent_where_unmarked(vit: Backbone, mlp: Mlp, neuron: int, images: Tensor, marked: Tensor) -> bool:
    """Whether a planted neuron is still on unmarked patches, as an activation behind a gate is."""
    with evaluating(vit.model), trace(vit, neurons=True, layers=[mlp.layer]) as t:
        vit(images)
    activation = t.layout.as_grid(t.neurons[0][:, t.layout.patch_slice, neuron]).abs()
    return bool(activation[~marked].median() < 0.1 * activation[marked].median())


def _set_norm(
    phantom: Phantom, mlp: Mlp, batches: list[Tensor], marked: list[Tensor], norm: float, left: int
) -> float:
    """Scale what one block writes until marked patches have their share of `norm` times the others' median,
    `left` more blocks having to add as much; what was reached."""
    columns = list(phantom.by_layer[mlp.layer])
    written = mlp.down.weight[:, columns].clone()
    mlp.down.weight[:, columns] = 0.0
    natural = _norm_ratio(phantom.vit, mlp.layer, batches, marked)
    mlp.down.weight[:, columns] = written
    if natural >= norm:
        raise ValueError(
            f"norm={norm}: expected more than {natural:.2f}, what these patches have over the others after"
            f" block {mlp.layer} with nothing planted in it."
        )
    norm -= (norm - natural) * left / (left + 1)
    tolerance = min(0.02, 0.05 * (norm - natural))
    scale, low, high = 1.0, 0.0, math.inf
    for _ in range(24):
        ratio = _norm_ratio(phantom.vit, mlp.layer, batches, marked)
        if abs(ratio / norm - 1) < tolerance:
            return ratio
        low, high = (scale, high) if ratio < norm else (low, scale)
        factor = _next_factor(ratio, norm, low / scale, high / scale)
        mlp.down.weight[:, columns] *= factor
        scale *= factor
        if not mlp.down.weight[:, columns].isfinite().all():
            break
    raise UnsupportedModelError(
        f"planted patches reach {ratio:.1f}x the others' norm, not {norm:.0f}x: block {mlp.layer}"
        " normalises what its MLP writes. Plant into a pre-norm model."
    )


def _next_factor(ratio: float, norm: float, low: float, high: float) -> float:
    """How many times more (or less) to write, where the answer is known to lie between `low` and `high`."""
    if ratio > 3:
        return norm / ratio  # the excess is nearly all of the norm
    if high == math.inf:
        return 30.0  # LayerScale may swallow a factor of 1e6, so grow until the excess shows
    return math.sqrt(low * high) if low else 1 / 30


def _norm_ratio(vit: Backbone, layer: int, batches: list[Tensor], marked: list[Tensor]) -> float:
    """Median norm of marked patches over that of the others, after a block."""
    norms = torch.cat([_patch_norms(vit, layer, batch) for batch in batches])
    mask = torch.cat(marked)
    return float(norms[mask].median() / norms[~mask].median())


def _patch_norms(vit: Backbone, layer: int, images: Tensor) -> Float[Tensor, "b gh gw"]:
    with evaluating(vit.model), trace(vit, layers=[layer]) as t:
        vit(images)
    return t.layout.as_grid(t.norms[0][:, t.layout.patch_slice])
