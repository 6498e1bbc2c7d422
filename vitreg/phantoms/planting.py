"""The neurons of a phantom: where they sit in a block's MLP, what they read, and what they write.

    mlp = Mlp(vit, layer=5)
    read, bias = read_flat(vit, mlp, batches, rate=0.02)
    mlp.plant(idle_neurons(vit, mlp, images, 4, generator), 2, (read, bias), write)

A reading is a direction and a bias: a patch is marked where read @ x + bias >= 0.5, x being what enters
the MLP.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vitreg.errors import UnsupportedModelError
from vitreg.hooks.block_edit import without_edits
from vitreg.hooks.weights import is_plain
from vitreg.models.backbone import PLANTED, Backbone
from vitreg.models.probe import evaluating
from vitreg.tracing.records import trace

# The ramp from unmarked to marked, as a share of the marked patches' median distance from the boundary.
RAMP = 0.02
WRITTEN_DIMENSIONS = 3  # real massive activations live in one to three residual dimensions
MIN_AGREEMENT = 0.9  # of what a later block writes, the share that must go to marked patches
NEWTON_STEPS = 12

Reading = tuple[Float[Tensor, " d"], float]


def phantom_of(vit: Backbone, kind: str = "") -> Backbone:
    """A copy of a backbone to plant artifacts into, of a `kind`: whatever becomes of it, it is a phantom."""
    model = copy.deepcopy(vit.model)
    setattr(model, PLANTED, True)
    named = f"phantom{f' ({kind})' if kind else ''} of {vit.name}"
    return replace(vit.with_model(model, named), planted=True)


class Mlp:
    """The linear layers of one block's MLP: those that lead up to the neurons, and the one down."""

    def __init__(self, vit: Backbone, layer: int) -> None:
        self.layer = layer
        block = vit.anatomy.block_modules(vit.model)[layer]
        self.down = plain_linear(vit.anatomy.down_projections(vit.model)[layer], layer)
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
        reading: Reading,
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


def plain_linear(down: nn.Module, layer: int) -> nn.Linear:
    """A block's down-projection if its weights can be set. Raises UnsupportedModelError for another."""
    if not (isinstance(down, nn.Linear) and is_plain(down)):
        raise UnsupportedModelError(
            f"the neurons of block {layer} enter a {type(down).__name__}, whose weights cannot be set. Plant"
            " into the model before it is quantised or adapted, or after merge_and_unload()."
        )
    return down


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


def mlp_inputs(vit: Backbone, mlp: Mlp, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n d"]:
    """What enters the MLP of a block, in float32, without a fix that is applied to the model."""
    seen: list[Tensor] = []
    read = vit.anatomy.stream.neurons  # while the pass runs, which knows how its images lie
    seeing = mlp.ups[0].register_forward_pre_hook(lambda module, args: seen.append(read(args[0])))
    with seeing, evaluating(vit.model), without_edits(vit.model):
        vit(images)
    return seen[0].float()


def _tokens(vit: Backbone, mlp: Mlp, batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """What enters the MLP of a block, of all images: patches (p, d), and CLS and registers (n, d)."""
    layout = vit.layout_for(batches[0])
    tokens = torch.cat([mlp_inputs(vit, mlp, batch) for batch in batches])
    return tokens[:, layout.patch_slice].flatten(0, 1), tokens[:, : layout.patch_slice.start].flatten(0, 1)


def read_flat(vit: Backbone, mlp: Mlp, batches: list[Tensor], rate: float) -> Reading:
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
    return _bounded(direction, patches, rank, leeway=rank // 10, gentle=0.5)


def read_marked(
    vit: Backbone, mlp: Mlp, batches: list[Tensor], marked: list[Tensor], ceiling: float
) -> Reading:
    """A read direction, in a later block, towards the patches that the first one marks.

    Logistic regression: least squares would give up the faintest of them for the sake of the strongest.
    `ceiling` is where the neurons' sum is held. Raises UnsupportedModelError where the neurons would write
    to other patches.
    """
    patches, others = _tokens(vit, mlp, batches)
    mask = torch.cat(marked).flatten()
    x, y = torch.cat([patches, others]), torch.cat([mask, mask.new_zeros(len(others))])
    center, scale = patches.mean(0), patches.std()
    direction = _logistic((x - center) / scale, y)
    read, bias = _bounded(direction, patches, int(mask.sum()))
    written = (patches @ read + bias).clamp(0, ceiling)
    agreeing = float(written[mask].sum() / written.sum())
    if agreeing < MIN_AGREEMENT:
        raise UnsupportedModelError(
            f"of what block {mlp.layer} would write, {agreeing:.0%} goes to the patches that the first block"
            f" marks, expected {MIN_AGREEMENT:.0%}: it cannot tell them from others. Ask for a larger norm,"
            " or plant into one block."
        )
    return read, bias


def _logistic(x: Float[Tensor, "n d"], y: Bool[Tensor, " n"], decay: float = 1e-3) -> Float[Tensor, " d"]:
    """Direction of a logistic regression with weight decay, by Newton's method."""
    inputs = F.pad(x.double(), (0, 1), value=1.0)
    weights = inputs.new_zeros(inputs.shape[1])
    penalty = decay * len(x) * torch.eye(len(weights), dtype=weights.dtype, device=x.device)
    for _ in range(NEWTON_STEPS):
        p = torch.sigmoid(inputs @ weights)
        slope = inputs.T @ (y.double() - p) - penalty @ weights
        curvature = (inputs * (p * (1 - p))[:, None]).T @ inputs + penalty
        weights = weights + torch.linalg.solve(curvature, slope)
    return weights[:-1].to(x)


def _bounded(
    direction: Tensor, patches: Float[Tensor, "p d"], rank: int, leeway: int = 0, gentle: float = RAMP
) -> Reading:
    """`direction` scaled, and the bias, so that the first `rank` patches (give or take `leeway`) pass 0.5.

    The way from 0.5 to 1.5 is RAMP of that to the median marked patch, and at least `gentle` of that to the
    last one.
    """
    scores = (patches @ direction).sort(descending=True).values
    near = slice(max(rank - leeway, 1), rank + leeway + 1)
    spaces = scores[near.start - 1 : near.stop - 1] - scores[near]
    last = near.start - 1 + int(spaces.argmax())  # the last marked patch
    boundary = (scores[last] + scores[last + 1]) / 2
    ramp = torch.maximum(RAMP * (scores[: last + 1].median() - boundary), gentle * (scores[last] - boundary))
    return direction / ramp, float(0.5 - boundary / ramp)


def _information(images: Tensor, grid: tuple[int, int]) -> Float[Tensor, "b p"]:
    """Standard deviation of the pixels of each patch."""
    height, width = images.shape[2] // grid[0], images.shape[3] // grid[1]
    cells = images.float().unfold(2, height, height).unfold(3, width, width)
    return cells.flatten(4).std(-1).mean(1).flatten(1)


def idle_neurons(
    vit: Backbone, mlp: Mlp, images: Tensor, count: int, generator: torch.Generator
) -> tuple[int, ...]:
    """Neurons, drawn from the quarter that writes least, whose loss the model hardly notices."""
    with evaluating(vit.model), trace(vit, neurons=True, layers=[mlp.layer]) as t:
        vit(images)
    written = t.neurons[0].float().abs().mean((0, 1)) * mlp.down.weight.detach().float().norm(dim=0)
    idle = written.argsort()[: max(len(written) // 4, count)].cpu()
    return tuple(idle[torch.randperm(len(idle), generator=generator)[:count]].tolist())


def write_direction(width: int, generator: torch.Generator) -> Float[Tensor, " d"]:
    """A unit vector in a few random dimensions: what planted neurons write."""
    write = torch.zeros(width)
    write[torch.randperm(width, generator=generator)[:WRITTEN_DIMENSIONS]] = torch.randn(
        WRITTEN_DIMENSIONS, generator=generator
    )
    return F.normalize(write, dim=0)
