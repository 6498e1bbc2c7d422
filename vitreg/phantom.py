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
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class Phantom:
    """A planted model and its ground truth.

    `layer` (0-based) is the block whose MLP holds the planted `neurons`; outliers appear after it.
    `read` (d,) and `bias` mark a patch where read @ x + bias >= 0.5, x being the input of that MLP.
    `write` (d,) is the unit direction of the excess, `rate` the share of patches marked among the
    images given, `norm` the median norm of marked patches over that of the others, after the block.
    `listens` says whether later keys and values were changed too.
    """

    vit: Backbone
    layer: int
    neurons: tuple[int, ...]
    read: Float[Tensor, " d"]
    bias: float
    write: Float[Tensor, " d"]
    rate: float
    norm: float
    listens: bool
    seed: int

    def marked(self, images: Float[Tensor, "b 3 h w"]) -> Bool[Tensor, "b gh gw"]:
        """The ground truth for any images: the patches that the planted neurons mark."""
        x = _mlp_inputs(self.vit, _Mlp(self.vit, self.layer), images)
        layout = self.vit.layout_for(images)
        return layout.as_grid((x[:, layout.patch_slice] @ self.read + self.bias) >= 0.5)

    def to_json(self) -> dict[str, Any]:
        truth = {k: v for k, v in vars(self).items() if k not in ("vit", "read", "write")}
        return truth | {"model": self.vit.name, "read": self.read.tolist(), "write": self.write.tolist()}

    def save(self, path: str | Path) -> Path:
        """Write the ground truth (not the weights, which the seed makes again) as JSON."""
        from vitreg.output import write_atomically

        return write_atomically(Path(path), json.dumps(self.to_json()))


def plant(
    vit: Backbone,
    images: Tensor | Iterable[Tensor],
    layer: int,
    *,
    neurons: int = 4,
    rate: float = 0.02,
    norm: float = 15.0,
    seed: int = 0,
) -> Phantom:
    """Plant `neurons` register neurons into block `layer` (0-based) of a copy of `vit`.

    `images` (b, 3, h, w), or batches of them, are what the read direction is fitted to: about `rate` of
    their patches get norms `norm` times the others' median. With 2 or more neurons, half rise and half
    hold the sum at its ceiling, so that a patch is either marked or not; a single neuron's outliers grow
    with its input. The same arguments give the same phantom. Raises UnsupportedModelError where the MLP
    has no bias to set a threshold with, or where the block normalises what its MLP writes.
    """
    _check(vit, layer, neurons, rate, norm)
    batches = [images] if isinstance(images, Tensor) else list(images)
    planted = vit.with_model(copy.deepcopy(vit.model), name=f"phantom of {vit.name}")
    mlp = _Mlp(planted, layer)
    read, bias = _fit_read(planted, mlp, batches, rate)
    generator = torch.Generator().manual_seed(seed)
    chosen = _idle_neurons(planted, mlp, batches[0], neurons, generator)
    write = _write_direction(vit.anatomy.width, generator).to(read)
    phantom = Phantom(planted, layer, tuple(chosen), read, bias, write, 0.0, 0.0, False, seed)
    with torch.no_grad():
        mlp.plant(chosen, read, bias, write)
        if not _silent_where_unmarked(phantom, batches[0]):
            mlp.plant(chosen, read, bias, write, gate=1)
        marked = [phantom.marked(batch) for batch in batches]  # decided before the block writes
        achieved = _set_norm(phantom, mlp, batches, marked, norm)
        richest = max(range(len(batches)), key=lambda i: int(marked[i].sum()))
        listens = make_sinks(planted, batches[richest], marked[richest], layer + 1)
    return replace(phantom, rate=float(torch.cat(marked).float().mean()), norm=achieved, listens=listens)


def _check(vit: Backbone, layer: int, neurons: int, rate: float, norm: float) -> None:
    if not 0 <= layer < vit.anatomy.depth:
        raise ValueError(f"layer {layer}: expected 0 to {vit.anatomy.depth - 1}.")
    if not 1 <= neurons <= vit.anatomy.neurons // 4:
        raise ValueError(
            f"neurons={neurons}: expected 1 to {vit.anatomy.neurons // 4}, a quarter of the MLP."
        )
    if not 0 < rate <= 0.2 or norm < 4:
        raise ValueError(f"rate={rate}, norm={norm}: expected a rate up to 0.2 and a norm of at least 4.")


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

    def plant(self, neurons: list[int], read: Tensor, bias: float, write: Tensor, gate: int = 0) -> None:
        """Rising neurons carry relu(t), holding ones -relu(t - 1), for t = read @ x + bias.

        In a gated MLP two rows feed a neuron and are multiplied: row number `gate` reads, the other is
        held at 1.
        """
        rising = (len(neurons) + 1) // 2
        for index, neuron in enumerate(neurons):
            holding = index >= rising
            rows = [(up, r) for up in self.ups for r in range(neuron, up.out_features, self.down.in_features)]
            for position, (up, row) in enumerate(rows):
                reads = len(rows) == 1 or position == gate
                up.weight[row] = read.to(up.weight) if reads else 0.0
                up.bias[row] = bias - float(holding) if reads else 1.0
            share = -1.0 / (len(neurons) - rising) if holding else 1.0 / rising
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


def _fit_read(vit: Backbone, mlp: _Mlp, batches: list[Tensor], rate: float) -> tuple[Tensor, float]:
    """A read direction towards flat patches, scaled and biased so that `rate` of them pass 0.5 to 1.

    Ridge regression from the MLP's input to "is among the flattest patches"; CLS and registers are made
    to count as not flat. The boundary is put in the widest space near the quantile, so that rounding
    decides no patch.
    """
    layout = vit.layout_for(batches[0])
    tokens = torch.cat([_mlp_inputs(vit, mlp, batch) for batch in batches])
    patches = tokens[:, layout.patch_slice].flatten(0, 1)
    others = tokens[:, : layout.patch_slice.start].flatten(0, 1)
    flatness = torch.cat([-_information(batch, layout.grid) for batch in batches]).flatten().to(patches)
    flat = (flatness >= flatness.quantile(1 - 2 * rate)).float()
    x = torch.cat([patches, others])
    y = torch.cat([flat, flat.new_full((len(others),), -1.0)])
    center = patches.mean(0)
    gram = (x - center).T @ (x - center)
    ridge = 1e-3 * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device)
    direction = torch.linalg.solve(gram + ridge, (x - center).T @ (y - flat.mean()))
    scores = (patches @ direction).sort(descending=True).values
    rank = max(round(rate * len(scores)), 1)
    near = slice(max(rank - rank // 10, 1), rank + rank // 10 + 1)
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
) -> list[int]:
    """Neurons, drawn from the quarter that writes least, whose loss the model hardly notices."""
    with evaluating(vit.model), trace(vit, neurons=True, layers=[mlp.layer]) as t:
        vit(images)
    written = t.neurons[0].float().abs().mean((0, 1)) * mlp.down.weight.detach().float().norm(dim=0)
    idle = written.argsort()[: max(len(written) // 4, count)].cpu()
    return idle[torch.randperm(len(idle), generator=generator)[:count]].tolist()


def _write_direction(width: int, generator: torch.Generator) -> Float[Tensor, " d"]:
    write = torch.zeros(width)
    write[torch.randperm(width, generator=generator)[:WRITTEN_DIMENSIONS]] = torch.randn(
        WRITTEN_DIMENSIONS, generator=generator
    )
    return F.normalize(write, dim=0)


def _silent_where_unmarked(phantom: Phantom, images: Tensor) -> bool:
    """Whether the planted neurons are still on unmarked patches, as an activation behind a gate is."""
    layout = phantom.vit.layout_for(images)
    with evaluating(phantom.vit.model), trace(phantom.vit, neurons=True, layers=[phantom.layer]) as t:
        phantom.vit(images)
    activation = t.neurons[0][:, layout.patch_slice, phantom.neurons[0]].flatten().abs()
    marked = phantom.marked(images).flatten()
    return bool(activation[~marked].median() < 0.1 * activation[marked].median())


def _set_norm(phantom: Phantom, mlp: _Mlp, batches: list[Tensor], marked: list[Tensor], norm: float) -> float:
    """Scale the write vectors until marked patches have `norm` times the others' median; what was reached."""
    columns = list(phantom.neurons)
    for _ in range(12):  # LayerScale may swallow a factor of 1e6, so grow until the excess shows
        ratio = _norm_ratio(phantom, batches, marked)
        if abs(ratio / norm - 1) < 0.02:
            return ratio
        mlp.down.weight[:, columns] *= norm / ratio if ratio > 3 else 30.0
        if not mlp.down.weight[:, columns].isfinite().all():
            break
    raise UnsupportedModelError(
        f"planted patches reach {ratio:.1f}x the others' norm, not {norm:.0f}x: block {phantom.layer}"
        " normalises what its MLP writes. Plant into a pre-norm model."
    )


def _norm_ratio(phantom: Phantom, batches: list[Tensor], marked: list[Tensor]) -> float:
    """Median norm of marked patches over that of the others, after the planted block."""
    on, off = [], []
    for batch, mask in zip(batches, marked, strict=True):
        with evaluating(phantom.vit.model), trace(phantom.vit, layers=[phantom.layer]) as t:
            phantom.vit(batch)
        norms = t.layout.as_grid(t.norms[0][:, t.layout.patch_slice])
        on.append(norms[mask])
        off.append(norms[~mask])
    return float(torch.cat(on).median() / torch.cat(off).median())
