"""Shift the sink at will: the papers' causal test that register neurons, and nothing else, place outliers.

    with ShiftSink(neurons, [(6, 6), (6, 7)]).applied_to(vit):
        vit(images)                  # the outliers are now at these patches, in every image

As in Algorithm 2 of Jiang et al., each neuron's largest activation is moved, per image; here it goes to
patches of one's choice instead of to a register.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitreg.errors import FixError
from vitreg.fixes.base import Fix, first_patch
from vitreg.hooks.block_edit import BlockEdit, Inner
from vitreg.hooks.neuron_edit import edited
from vitreg.hooks.stream import Stream
from vitreg.models.backbone import Backbone

GridPosition = tuple[int, int]


@dataclass(frozen=True)
class ShiftSink(Fix):
    """Register neurons fire at `places` and nowhere else: with each image's own peak, times `scale`.

    `places` are patches as (row, column) from the top left. A mask (gh, gw) will do.
    """

    type: ClassVar[str] = "shift"
    inside_splitting: ClassVar[str] = "would move a sink among"
    places: tuple[GridPosition, ...] = ()
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.places.nonzero().tolist() if isinstance(self.places, Tensor) else self.places
        object.__setattr__(self, "places", tuple((int(row), int(column)) for row, column in given))
        if not self.places:
            raise ValueError("there are no places; expected one or more (row, column) of patches.")

    def check(self, vit: Backbone) -> None:
        super().check(vit)
        rows, columns = vit.layout.grid
        outside = [(r, c) for r, c in self.places if not (0 <= r < rows and 0 <= c < columns)]
        if outside:
            raise FixError(
                f"patches {outside[:5]} lie outside of the model's grid of {rows}x{columns} patches. Choose"
                " others, or wrap the model with the image_size that they were chosen for."
            )

    def edits(self, vit: Backbone) -> dict[int, BlockEdit]:
        return {layer: _ShiftEdit(self, vit, layer) for layer in self.neurons.by_layer}


class _ShiftEdit(BlockEdit):
    """One block whose register neurons fire at the chosen patches alone."""

    def __init__(self, fix: ShiftSink, vit: Backbone, layer: int) -> None:
        self.scale, self.patches, self.start = fix.scale, vit.layout.patches, first_patch(vit, layer)
        self.hooked = vit.anatomy.down_projection
        self.down, self.index = vit.anatomy.down_projection, torch.tensor(fix.neurons.by_layer[layer])
        columns = vit.layout.grid[1]
        self.tokens = torch.tensor([self.start + row * columns + column for row, column in fix.places])

    def run(self, block: nn.Module, inner: Inner, x: Tensor, args: Any, kwargs: Any) -> Tensor:
        if x.shape[1] - self.start != self.patches:
            raise FixError(
                f"the places were chosen on a grid of {self.patches} patches, and an image has"
                f" {x.shape[1] - self.start}. Wrap the model with the image_size of these images."
            )
        move = (self.stream or Stream()).on_neurons(self._move)
        return edited(block, self.down, move, partial(inner, x, args, kwargs))

    def _move(self, activation: Float[Tensor, "b n f"]) -> Float[Tensor, "b n f"]:
        index, tokens = (i.to(activation.device) for i in (self.index, self.tokens))
        values = activation.index_select(-1, index)
        peak = values.amax(1, keepdim=True) * self.scale  # per image and per neuron
        moved = torch.zeros_like(values).index_copy(1, tokens, peak.expand(-1, len(tokens), -1))
        return activation.index_copy(-1, index, moved)
