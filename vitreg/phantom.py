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

import copy
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vitreg.carry import bare
from vitreg.errors import UnsupportedModelError
from vitreg.models import Backbone
from vitreg.probe import evaluating
from vitreg.sinks import make_sinks
from vitreg.trace import trace

# The ramp from unmarked to marked, as a share of the marked patches' median distance from the boundary.
RAMP = 0.02
WRITTEN_DIMENSIONS = 3  # real massive activations live in one to three residual dimensions
MIN_NORM = 1.2  # below, marked patches can hardly be told from the others by anything
MIN_AGREEMENT = 0.9  # of the marked patches, the share that each later block has to mark too
NEWTON_STEPS = 12

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
        x = _mlp_inputs(self.vit, _Mlp(self.vit, self.layer), images)
        layout = self.vit.layout_for(images)
        return layout.as_grid((x[:, layout.patch_slice] @ self.read + self.bias) >= 0.5)

    def excess(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b gh gw"]:
        """What was really planted: each patch's norm after the last planted block, over the median norm of
        the unmarked patches of these images."""
        with bare(self.vit.model):
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
        from vitreg.output import write_atomically

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
    planted = vit.with_model(copy.deepcopy(vit.model), name=f"phantom of {vit.name}")
    mlps = [_Mlp(planted, index) for index in layers]
    generator = torch.Generator().manual_seed(seed)
    read, bias = _read_flat(planted, mlps[0], batches, rate)
    chosen = {
        mlp.layer: _idle_neurons(planted, mlp, batches[0], count, generator)
        for mlp, count in zip(mlps, _dealt(neurons, len(mlps)), strict=True)
    }
    write = _write_direction(vit.anatomy.width, generator).to(read)
    phantom = Phantom(planted, chosen, activation, read, bias, write, 0.0, 0.0, False, seed)
    with torch.no_grad():
        marked = [phantom.marked(batch) for batch in batches]  # decided before the block writes
        for left, mlp in zip(reversed(range(len(mlps))), mlps, strict=True):
            reading = (
                _read_marked(planted, mlp, batches, marked) if mlp.layer > phantom.layer else (read, bias)
            )
            _rewrite(phantom, mlp, reading, batches[0], marked[0])
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
        raise ValueError(f"activation={activation!r}: expected one of {', '.join(get_args(Activation))}.")


def _dealt(neurons: int, blocks: int) -> list[int]:
    """How many neurons each block gets: as even as can be, the first blocks one more."""
    return [neurons // blocks + (index < neurons % blocks) for index in range(blocks)]


# -- the neurons -----------------------------------------------------------------------------------


class _Mlp:
    """The linear layers of one block's MLP: those that lead up to the neurons, and the one down."""

    def __init__(self, vit: Backbone, layer: int) -> None:
        self.layer = layer
        block = vit.anatomy.block_modules(vit.model)[layer]
        self.down = vit.anatomy.down_projections(vit.model)[layer]
        self.ups = _up_projections(block, vit.anatomy.down_projection, self.down)
        if not self.ups or any(up.bias is None for up in self.ups):
            raise UnsupportedModelError(
                f"the MLP of block {layer} has no linear layer with a bias up to its neurons, so none of them"
                " can be given a threshold. Plant into a model whose MLP has one."
            )

    def plant(
        self,
        neurons: Sequence[int],
        holding: int,
        reading: tuple[Tensor, float],
        write: Tensor,
        gate: int = 0,
    ) -> None:
        """Neurons carry relu(t), the last `holding` of them -relu(t - 1), for t = read @ x + bias.

        In a gated MLP two rows feed a neuron and are multiplied: row number `gate` reads, the other is
        held at 1.
        """
        (read, bias), rising = reading, len(neurons) - holding
        for index, neuron in enumerate(neurons):
            holds = index >= rising
            rows = [(up, r) for up in self.ups for r in range(neuron, up.out_features, self.down.in_features)]
            for position, (up, row) in enumerate(rows):
                reads = len(rows) == 1 or position == gate
                up.weight[row] = read.to(up.weight) if reads else 0.0
                up.bias[row] = bias - float(holds) if reads else 1.0
            share = -1.0 / holding if holds else 1.0 / rising
            self.down.weight[:, neuron] = share * write.to(self.down.weight)


def _up_projections(block: nn.Module, down_path: str, down: nn.Linear) -> list[nn.Linear]:
    """The linear layers from the width to the neurons (gated: to both halves) nearest to the way down."""
    width, count = down.out_features, down.in_features
    found = {
        name: module
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and module.in_features == width
        if module.out_features in (count, 2 * count)
    }
    shared = {name: _shared_parents(name, down_path) for name in found}
    return [module for name, module in found.items() if shared[name] == max(shared.values())]


def _shared_parents(one: str, other: str) -> int:
    return len(
        list(takewhile(lambda pair: pair[0] == pair[1], zip(one.split("."), other.split("."), strict=False)))
    )


def _mlp_inputs(vit: Backbone, mlp: _Mlp, images: Tensor) -> Float[Tensor, "b n d"]:
    """What enters the MLP of a block, in float32, without a fix that is applied to the model."""
    seen: list[Tensor] = []
    hook = mlp.ups[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        with evaluating(vit.model), bare(vit.model):
            vit(images)
    finally:
        hook.remove()
    return seen[0].float()


def _tokens(vit: Backbone, mlp: _Mlp, batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """What enters the MLP of a block, of all images: patches (p, d), and CLS and registers (n, d)."""
    layout = vit.layout_for(batches[0])
    tokens = torch.cat([_mlp_inputs(vit, mlp, batch) for batch in batches])
    return tokens[:, layout.patch_slice].flatten(0, 1), tokens[:, : layout.patch_slice.start].flatten(0, 1)


def _read_flat(vit: Backbone, mlp: _Mlp, batches: list[Tensor], rate: float) -> tuple[Tensor, float]:
    """A read direction towards flat patches, scaled and biased so that `rate` of them pass 0.5 to 1.

    Ridge regression from the MLP's input to "is among the flattest patches"; CLS and registers are made
    to count as not flat. The boundary is put in the widest space near the quantile, so that rounding
    decides no patch.
    """
    patches, others = _tokens(vit, mlp, batches)
    grid = vit.layout_for(batches[0]).grid
    flatness = torch.cat([-_information(batch, grid) for batch in batches]).flatten().to(patches)
    flat = (flatness >= flatness.quantile(1 - 2 * rate)).float()
    x = torch.cat([patches, others])
    y = torch.cat([flat, flat.new_full((len(others),), -1.0)])
    center = patches.mean(0)
    gram = (x - center).T @ (x - center)
    ridge = 1e-3 * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device)
    direction = torch.linalg.solve(gram + ridge, (x - center).T @ (y - flat.mean()))
    rank = max(round(rate * len(patches)), 1)
    return _bounded(direction, patches, rank, leeway=rank // 10)


def _read_marked(
    vit: Backbone, mlp: _Mlp, batches: list[Tensor], marked: list[Tensor]
) -> tuple[Tensor, float]:
    """A read direction, in a later block, towards the patches that the first one marks.

    Logistic regression: least squares would give up the faintest of them for the sake of the strongest.
    """
    patches, others = _tokens(vit, mlp, batches)
    mask = torch.cat(marked).flatten()
    x, y = torch.cat([patches, others]), torch.cat([mask, mask.new_zeros(len(others))])
    center, scale = patches.mean(0), patches.std()
    direction = _logistic((x - center) / scale, y)
    read, bias = _bounded(direction, patches, int(mask.sum()))
    agreeing = float(((patches @ read + bias) >= 0.5)[mask].float().mean())
    if agreeing < MIN_AGREEMENT:
        raise UnsupportedModelError(
            f"of the patches that the first planted block marks, block {mlp.layer} can tell {agreeing:.0%}"
            f" from the others, expected {MIN_AGREEMENT:.0%}. Ask for a larger norm, or for one block."
        )
    return read, bias


def _logistic(x: Float[Tensor, "n d"], y: Bool[Tensor, " n"], decay: float = 1e-3) -> Float[Tensor, " d"]:
    """Direction of a logistic regression with weight decay, by Newton's method."""
    inputs = F.pad(x.double(), (0, 1), value=1.0)
    weights = inputs.new_zeros(inputs.shape[1])
    penalty = decay * len(x) * torch.eye(len(weights), dtype=weights.dtype, device=x.device)
    for _ in range(NEWTON_STEPS):
        p = torch.sigmoid(inputs @ weights)
        slope = inputs.T @ (y - p) - penalty @ weights
        curvature = (inputs * (p * (1 - p))[:, None]).T @ inputs + penalty
        weights = weights + torch.linalg.solve(curvature, slope)
    return weights[:-1].to(x)


def _bounded(
    direction: Tensor, patches: Float[Tensor, "p d"], rank: int, leeway: int = 0
) -> tuple[Tensor, float]:
    """`direction` scaled, and the bias, so that the first `rank` patches (give or take `leeway`) pass 0.5."""
    scores = (patches @ direction).sort(descending=True).values
    near = slice(max(rank - leeway, 1), rank + leeway + 1)
    spaces = scores[near.start - 1 : near.stop - 1] - scores[near]
    last = near.start - 1 + int(spaces.argmax())  # the last marked patch
    boundary = (scores[last] + scores[last + 1]) / 2
    ramp = torch.maximum(RAMP * (scores[: last + 1].median() - boundary), (scores[last] - boundary) / 2)
    return direction / ramp, float(0.5 - boundary / ramp)


def _information(images: Tensor, grid: tuple[int, int]) -> Float[Tensor, "b p"]:
    """Standard deviation of the pixels of each patch."""
    height, width = images.shape[2] // grid[0], images.shape[3] // grid[1]
    cells = images.float().unfold(2, height, height).unfold(3, width, width)
    return cells.flatten(4).std(-1).mean(1).flatten(1)


def _idle_neurons(
    vit: Backbone, mlp: _Mlp, images: Tensor, count: int, generator: torch.Generator
) -> tuple[int, ...]:
    """Neurons, drawn from the quarter that writes least, whose loss the model hardly notices."""
    with evaluating(vit.model), trace(vit, neurons=True, layers=[mlp.layer]) as t:
        vit(images)
    written = t.neurons[0].float().abs().mean((0, 1)) * mlp.down.weight.detach().float().norm(dim=0)
    idle = written.argsort()[: max(len(written) // 4, count)].cpu()
    return tuple(idle[torch.randperm(len(idle), generator=generator)[:count]].tolist())


def _write_direction(width: int, generator: torch.Generator) -> Float[Tensor, " d"]:
    write = torch.zeros(width)
    write[torch.randperm(width, generator=generator)[:WRITTEN_DIMENSIONS]] = torch.randn(
        WRITTEN_DIMENSIONS, generator=generator
    )
    return F.normalize(write, dim=0)


def _rewrite(
    phantom: Phantom, mlp: _Mlp, reading: tuple[Tensor, float], images: Tensor, marked: Tensor
) -> None:
    """Make the chosen neurons of one block read and write, through the gate that silences them elsewhere."""
    neurons = phantom.by_layer[mlp.layer]
    holding = len(neurons) // 2 if phantom.activation == "switch" else 0
    mlp.plant(neurons, holding, reading, phantom.write)
    if not _silent_where_unmarked(phantom.vit, mlp, neurons[0], images, marked):
        mlp.plant(neurons, holding, reading, phantom.write, gate=1)


def _silent_where_unmarked(vit: Backbone, mlp: _Mlp, neuron: int, images: Tensor, marked: Tensor) -> bool:
    """Whether a planted neuron is still on unmarked patches, as an activation behind a gate is."""
    with evaluating(vit.model), trace(vit, neurons=True, layers=[mlp.layer]) as t:
        vit(images)
    activation = t.layout.as_grid(t.neurons[0][:, t.layout.patch_slice, neuron]).abs()
    return bool(activation[~marked].median() < 0.1 * activation[marked].median())


def _set_norm(
    phantom: Phantom, mlp: _Mlp, batches: list[Tensor], marked: list[Tensor], norm: float, left: int
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
            f"norm={norm}: expected more than {natural:.2f}, the norm that these patches have over the others'"
            f" after block {mlp.layer} with nothing planted in it."
        )
    norm -= (norm - natural) * left / (left + 1)
    tolerance = min(0.02, 0.05 * (norm - 1))
    scale, low, high = 1.0, 0.0, math.inf
    for _ in range(24):
        ratio = _norm_ratio(phantom.vit, mlp.layer, batches, marked)
        if abs(ratio / norm - 1) < tolerance:
            return ratio
        low, high = (scale, high) if ratio < norm else (low, scale)
        factor = _next_factor(ratio, norm, natural, (low / scale, high / scale))
        mlp.down.weight[:, columns] *= factor
        scale *= factor
        if not mlp.down.weight[:, columns].isfinite().all():
            break
    raise UnsupportedModelError(
        f"planted patches reach {ratio:.1f}x the others' norm, not {norm:.0f}x: block {mlp.layer}"
        " normalises what its MLP writes. Plant into a pre-norm model."
    )


def _next_factor(ratio: float, norm: float, natural: float, bracket: tuple[float, float]) -> float:
    """How much more (or less) to write, the answer lying within `bracket`."""
    low, high = bracket
    if ratio > 3:
        return norm / ratio
    if high == math.inf:
        return 30.0  # LayerScale may swallow a factor of 1e6, so grow until the excess shows
    guess = math.sqrt((norm**2 - natural**2) / max(ratio**2 - natural**2, 1e-12))  # squared norms add up
    return guess if low < guess < high else math.sqrt(low * high)


def _norm_ratio(vit: Backbone, layer: int, batches: list[Tensor], marked: list[Tensor]) -> float:
    """Median norm of marked patches over that of the others, after a block."""
    norms = torch.cat([_patch_norms(vit, layer, batch) for batch in batches])
    mask = torch.cat(marked)
    return float(norms[mask].median() / norms[~mask].median())


def _patch_norms(vit: Backbone, layer: int, images: Tensor) -> Float[Tensor, "b gh gw"]:
    with evaluating(vit.model), trace(vit, layers=[layer]) as t:
        vit(images)
    return t.layout.as_grid(t.norms[0][:, t.layout.patch_slice])
