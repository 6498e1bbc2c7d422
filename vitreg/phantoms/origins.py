"""Plant outliers that no neuron makes, with known truth, into any Vision Transformer.

    phantom = plant_attention_outliers(vit, images, layer=1)
    report = diagnose(phantom.vit, images)
    phantom.marked(images)            # (b, gh, gw): the patches that were planted

A position embedding is planted in its table. What writes a massive vector for some patches and not for
others has to switch, which no linear map does: there a forward hook on a module of the copy adds the vector
to what the module gives, where that lies beyond a boundary (weights stay what they are, so a state dict does
not hold it). The planted model is a copy; it is a phantom, never evidence about the model it was planted in,
and its name says so.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import isfinite
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vitreg.errors import UnsupportedModelError
from vitreg.hooks.attention_mode import intercept
from vitreg.hooks.block_edit import without_edits
from vitreg.hooks.hooked import hooked
from vitreg.models.backbone import Backbone
from vitreg.models.positions import position_parameter
from vitreg.models.probe import evaluating, first_tensor
from vitreg.phantoms.planting import phantom_of
from vitreg.tracing.early_stop import Enough, run_until
from vitreg.tracing.removal import entering
from vitreg.tracing.streams import token_norms, watch

WRITTEN_DIMENSIONS = 3  # as in vitreg.phantoms.phantom
# Directions to mark patches by, of which the one with the widest space at its boundary is taken.
DIRECTIONS = 32


@dataclass(frozen=True)
class OriginPhantom:
    """A planted model and its ground truth.

    `kind` says what makes the outliers, as in `find_origin`; `layer` (0-based) is the block of an attention
    output, None for what enters block 0; `positions` are (row, column) of planted positions. `write` (d,) is
    the unit direction of what is written, `rate` the share of patches marked among the images given, `norm`
    the median norm of marked patches over that of the others, where block 0 is entered or after the layer.
    """

    vit: Backbone
    kind: Literal["position embedding", "attention output", "patch embedding"]
    layer: int | None
    positions: tuple[tuple[int, int], ...]
    write: Float[Tensor, " d"]
    rate: float
    norm: float
    seed: int
    writer: "Writer | None" = field(repr=False, default=None)

    def marked(self, images: Float[Tensor, "b 3 h w"]) -> Bool[Tensor, "b gh gw"]:
        """The ground truth for any images: the patches that were planted."""
        layout = self.vit.layout_for(images)
        if self.writer is not None:
            return layout.as_grid(self.writer.marks(self.vit, images))
        mask = torch.zeros(len(images), *layout.grid, dtype=torch.bool, device=self.vit.device)
        for row, column in self.positions:
            mask[:, row, column] = True
        return mask

    def to_json(self) -> dict[str, Any]:
        truth = {k: v for k, v in vars(self).items() if k not in ("vit", "write", "writer")}
        return truth | {"model": self.vit.name, "write": self.write.tolist()}


def plant_position_outliers(
    vit: Backbone, positions: Sequence[tuple[int, int]], norm: float = 15.0, seed: int = 0
) -> OriginPhantom:
    """Give some positions of the grid, (row, column), an outlying position embedding in a copy of `vit`.

    Their tokens enter block 0 with norms about `norm` times the others' median (measured on noise): a vector
    in a few dimensions is added to the row of the table of positions that each reads most. (Where the model
    resamples its table, neighbours read that row, too: `positions` are all that get at least half.) Raises
    UnsupportedModelError for a model without such a table (rotary or relative positions alone), or that
    normalises tokens before block 0.
    """
    rows, columns = vit.layout.grid
    outside = [cell for cell in positions if not (0 <= cell[0] < rows and 0 <= cell[1] < columns)]
    if outside or not positions:
        raise ValueError(f"positions {outside or list(positions)}: expected some within {rows}x{columns}.")
    planted, generator = phantom_of(vit), torch.Generator().manual_seed(seed)
    noise = torch.rand(4, 3, *vit.image_size, generator=generator) * 2 - 1
    cells = torch.tensor([row * columns + column for row, column in positions], device=vit.device)
    table, responses = position_parameter(planted, cells.tolist())
    write = _direction(vit.anatomy.width, generator).to(vit.device)
    marked = torch.zeros(len(noise), rows * columns, dtype=torch.bool, device=vit.device)
    marked[:, cells] = True
    own = table.detach().clone()
    read = responses.argmax(1)

    def scale(amount: float) -> None:
        changed = own.reshape(-1, own.shape[-1]).clone()
        changed[read] += (amount / responses.amax(1))[:, None].to(own) * write.to(own)
        with torch.no_grad():
            table.copy_(changed.reshape(own.shape))

    reached = _set_norm(planted, [noise], marked, -1, norm, scale)
    norms = _norms(planted, [noise], -1).median(0).values
    outlying = norms >= reached / 2 * norms[~marked[0]].median()
    reading = [divmod(cell, columns) for cell in outlying.nonzero().flatten().tolist()]
    rate = len(reading) / (rows * columns)
    return OriginPhantom(planted, "position embedding", None, tuple(reading), write, rate, reached, seed)


def plant_attention_outliers(
    vit: Backbone,
    images: Tensor | Sequence[Tensor],
    layer: int,
    *,
    rate: float = 0.02,
    norm: float = 15.0,
    seed: int = 0,
) -> OriginPhantom:
    """Let the attention of block `layer` (0-based) write a massive vector at about `rate` of the patches.

    Which patches depends on what the attention gives them: they lie furthest along a direction drawn by
    `seed`. Raises UnsupportedModelError where a block computes attention in no module of its own.
    """
    if not 0 <= layer < vit.anatomy.depth:
        raise ValueError(f"layer {layer}: expected 0 to {vit.anatomy.depth - 1}.")
    path = _attention_module(vit, layer)
    return _plant(vit, images, "attention output", layer, path, rate, norm, seed)


def plant_patch_outliers(
    vit: Backbone,
    images: Tensor | Sequence[Tensor],
    *,
    rate: float = 0.02,
    norm: float = 15.0,
    seed: int = 0,
) -> OriginPhantom:
    """Let the patch embedding write a massive vector at about `rate` of the patches of these images.

    Which patches depends on their pixels: they lie furthest along a direction drawn by `seed`. Raises
    UnsupportedModelError where the patch embedding is not known, or tokens are normalised before block 0.
    """
    path = vit.anatomy.patch_embedding
    if path is None:
        raise UnsupportedModelError(
            f"the patch embedding of {vit.name} was not found, so nothing can be planted there. Pass an"
            " Anatomy that names it."
        )
    return _plant(vit, images, "patch embedding", None, path, rate, norm, seed)


def _plant(
    vit: Backbone,
    images: Tensor | Sequence[Tensor],
    kind: Literal["attention output", "patch embedding"],
    layer: int | None,
    path: str,
    rate: float,
    norm: float,
    seed: int,
) -> OriginPhantom:
    if not 0 < rate <= 0.2 or norm < 4:
        raise ValueError(f"rate={rate}, norm={norm}: expected a rate up to 0.2 and a norm of at least 4.")
    batches = [images] if isinstance(images, Tensor) else list(images)
    planted, generator = phantom_of(vit), torch.Generator().manual_seed(seed)
    writer = Writer(path)
    given = torch.cat([writer.given(planted, batch) for batch in batches])
    writer.read, writer.bias = _boundary(given, vit.layout_for(batches[0]).patches, rate, generator)
    writer.write = _direction(given.shape[-1], generator).to(given)
    marked = torch.cat([writer.marks(planted, batch) for batch in batches])
    planted.model.get_submodule(path).register_forward_hook(writer)

    def scale(amount: float) -> None:
        writer.scale = amount

    reached = _set_norm(planted, batches, marked, -1 if layer is None else layer, norm, scale)
    achieved = float(marked.float().mean())
    return OriginPhantom(planted, kind, layer, (), writer.write, achieved, reached, seed, writer)


# -- writing where a module's output lies beyond a boundary ------------------------------------------


class Writer:
    """A forward hook that adds scale * write to a module's tokens, as read @ x + bias rises from 0 to 1.

    A token is marked from 0.5 on.
    """

    read: Tensor
    write: Tensor
    bias: float = 0.0
    scale: float = 0.0

    def __init__(self, path: str) -> None:
        self._path = path

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        x = output if isinstance(output, Tensor) else output[0]
        last = x.movedim(1, -1) if x.dim() == 4 else x  # a map of patches (b, d, gh, gw), or tokens
        written = last + self.scale * self._score(last).clamp(0, 1)[..., None].to(x) * self.write.to(x)
        written = written.movedim(-1, 1) if x.dim() == 4 else written
        return written if isinstance(output, Tensor) else (written, *output[1:])

    def _score(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b"]:
        return x.float() @ self.read.to(x.device) + self.bias

    def given(self, vit: Backbone, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n d"]:
        """What the module gives before anything is added, all tokens that it has, in float32."""
        seen: list[Tensor | None] = []
        with (
            vit.model.get_submodule(self._path).register_forward_hook(
                lambda module, args, output: seen.append(first_tensor(output)), prepend=True
            ),
            evaluating(vit.model),
            without_edits(vit.model),
        ):
            vit(images)
        x = seen[0]
        assert x is not None
        x = x.flatten(2).transpose(1, 2) if x.dim() == 4 else x
        return (x if x.shape[0] == len(images) else x.transpose(0, 1)).float()

    def marks(self, vit: Backbone, images: Float[Tensor, "b 3 h w"]) -> Bool[Tensor, "b p"]:
        """Which patches are marked; they are the last of the tokens."""
        return self._score(self.given(vit, images))[:, -vit.layout_for(images).patches :] >= 0.5


def _boundary(
    given: Float[Tensor, "b n d"], patches: int, rate: float, generator: torch.Generator
) -> tuple[Float[Tensor, " d"], float]:
    """A direction and bias that mark about `rate` of the patches, and no other token.

    Of some random directions the one with the widest space near the quantile, within which read @ x + bias
    rises from 0 to 1.
    """
    directions = F.normalize(torch.randn(given.shape[-1], DIRECTIONS, generator=generator), dim=0)
    scores = (given - given[:, -patches:].mean((0, 1))) @ directions.to(given)
    ranked = (
        scores[:, -patches:].flatten(0, 1).sort(0, descending=True).values
    )  # (patches of all, directions)
    rank = max(round(rate * len(ranked)), 2)
    near = range(max(rank - rank // 10, 1), rank + rank // 10 + 1)
    spaces = torch.stack([ranked[i - 1] - ranked[i] for i in near]) / ranked.std(0)
    others = scores[:, :-patches].amax((0, 1)) if given.shape[1] > patches else ranked[-1]
    spaces = spaces.masked_fill(others >= ranked[near.stop - 1], -1.0)
    place, chosen = divmod(int(spaces.argmax()), DIRECTIONS)
    high, low = ranked[near[place] - 1, chosen], ranked[near[place], chosen]
    read = directions[:, chosen].to(given) / (high - low)
    return read, float(-low / (high - low) - given[:, -patches:].mean((0, 1)) @ read)


def _attention_module(vit: Backbone, layer: int) -> str:
    """The innermost module of a block inside which attention is computed, by its path in the model."""
    stack: list[str] = []
    found: list[str] = []
    block = vit.anatomy.block_modules(vit.model)[layer]
    names = {module: name for name, module in vit.model.named_modules()}
    handles = []
    for module in block.modules():
        handles.append(module.register_forward_pre_hook(lambda m, args: stack.append(names[m])))
        handles.append(module.register_forward_hook(lambda m, args, output: stack.pop() and None))
    seeing = intercept(lambda call: found.extend(stack[-1:]))
    with hooked(handles), evaluating(vit.model), without_edits(vit.model), seeing:
        vit(torch.zeros(1, 3, *vit.image_size))
    if found[0] == names[block]:
        raise UnsupportedModelError(
            f"block {layer} of {vit.name} computes its attention itself, in no module whose output could be"
            " planted. Plant into a model whose attention is a module."
        )
    return found[0]


# -- shared ------------------------------------------------------------------------------------------


def _direction(width: int, generator: torch.Generator) -> Float[Tensor, " d"]:
    """A unit vector in a few dimensions, as real massive activations are."""
    write = torch.zeros(width)
    chosen = torch.randperm(width, generator=generator)[:WRITTEN_DIMENSIONS]
    write[chosen] = torch.randn(WRITTEN_DIMENSIONS, generator=generator)
    return F.normalize(write, dim=0)


def _set_norm(
    vit: Backbone,
    batches: Sequence[Tensor],
    marked: Bool[Tensor, "b p"],
    layer: int,
    norm: float,
    scale: Callable[[float], None],
) -> float:
    """Scale what is written until marked patches have `norm` times the others' median; what was reached."""
    amount, best = 1.0, 0.0
    for _ in range(16):  # LayerScale may swallow a factor of 1e6, so grow until the excess shows
        scale(amount)
        norms = _norms(vit, batches, layer)
        ratio = float(norms[marked].median() / norms[~marked].median())
        if abs(ratio / norm - 1) < 0.02:
            return ratio
        if not isfinite(ratio):
            break
        best = max(best, ratio)
        amount *= norm / ratio if ratio > 3 else 30.0
    where = "before block 0" if layer < 0 else f"in block {layer}"
    raise UnsupportedModelError(
        f"planted patches reach {best:.1f}x the others' norm, not {norm:.0f}x: tokens are normalised {where}"
        " behind what was planted. Plant into a pre-norm model, or another layer."
    )


def _norms(vit: Backbone, batches: Sequence[Tensor], layer: int) -> Float[Tensor, "b p"]:
    """Norms of patches after a layer; -1: where block 0 is entered."""
    norms: list[Tensor] = []
    patches = vit.layout_for(batches[0]).patch_slice

    def block(index: int, stream: Tensor) -> None:
        if index == layer:
            norms.append(token_norms(stream[:, patches]))
            raise Enough

    level = entering(vit, partial(block, -1)) if layer < 0 else watch(vit, on_block=block)
    with evaluating(vit.model), without_edits(vit.model), level:
        for images in batches:
            run_until(vit, images)
    return torch.cat(norms)
