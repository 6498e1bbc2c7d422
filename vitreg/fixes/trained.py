"""Trained registers: what a training run made of a pretrained model, as a fix of that model.

    fix = TrainedRegisters.between(before, after)     # after: add_registers(copy, 4), and trained
    with fix.applied_to(vit):
        vit(images)

The fix holds the registers and the new values of all weights that differ. While it is applied these values
stand in the model's own tensors, and the registers are carried inside the blocks: keys and shapes of the
state dict never change, and undoing brings back the weights bit for bit.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from vitreg.errors import FixError
from vitreg.fixes.base import Applied, Fix, applied, backbone_of
from vitreg.fixes.neurons import RegisterNeurons
from vitreg.fixes.registers import TestTimeRegisters
from vitreg.hooks.block_edit import BlockEdit
from vitreg.hooks.torch_internals import compiled_model_of
from vitreg.models.backbone import Backbone
from vitreg.models.fingerprint import Fingerprint


@dataclass(frozen=True, eq=False)
class TrainedRegisters(Fix):
    """Registers that enter before block 0, and new weights.

    neurons   none; its fingerprint is that of the model before the training
    tokens    the registers (n, d); n may be 0
    weights   new values of parameters and buffers, by their names in the model's state dict, and so in the
              library that it was trained in
    """

    type: ClassVar[str] = "trained"
    does_not_cure: ClassVar[str] = (
        "what the training did not teach: how many outliers are left is for the verdict to say, and these"
        " weights are no longer those of the original model."
    )
    inside_splitting: ClassVar[str] = "would add tokens between"
    tokens: Tensor = field(repr=False)
    weights: dict[str, Tensor] = field(repr=False)

    @classmethod
    def between(cls, before: nn.Module | Backbone, after: nn.Module | Backbone) -> "TrainedRegisters":
        """What makes `after`, which may have added registers, of `before`, which has none.

        Raises FixError for models that are no two versions of one, that do not differ, or that have a fix.
        """
        from vitreg.fixes.added_registers import NAME

        vit, trained = backbone_of(before), _module(after)
        for model in (vit.model, trained):
            if found := applied(model):
                raise FixError(f"a fix of type {found[-1].fix.type!r} is applied to a model. Undo it first.")
        old, new = vit.model.state_dict(), trained.state_dict()
        if NAME in old:
            raise FixError("`before` has added registers: expected the model before they were added.")
        tokens = new.pop(NAME, torch.zeros(0, vit.anatomy.width))
        _refuse_other_keys(old, new)
        _refuse_other_shapes(new, old)
        new = {name: value.to(old[name]) for name, value in new.items()}
        weights = {name: _kept(value) for name, value in new.items() if not torch.equal(value, old[name])}
        if not weights and not len(tokens):
            raise FixError("the two models do not differ: there is nothing that a fix could hold.")
        return cls(RegisterNeurons((), fingerprint=Fingerprint.of(vit)), _kept(tokens), weights)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.neurons.chosen or self.tokens.dim() != 2:
            raise ValueError(
                f"found {len(self.neurons.chosen)} neurons and registers of shape {tuple(self.tokens.shape)}:"
                " expected no neurons, and (n, width). Use TrainedRegisters.between(before, after)."
            )

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, TrainedRegisters)
            and self.weights.keys() == other.weights.keys()
            and torch.equal(self.tokens, other.tokens)
            and all(torch.equal(value, other.weights[name]) for name, value in self.weights.items())
        )

    def __hash__(self) -> int:
        return hash((self.registers, frozenset(self.weights)))

    @property
    def registers(self) -> int:
        """How many there are."""
        return len(self.tokens)

    def check(self, vit: Backbone) -> None:
        """As every fix. On a model that has this fix the weights were checked before theirs were changed."""
        if not any(handle.fix == self for handle in applied(vit.model)):
            super().check(vit)
        self._tokens_alone().check(vit)
        own = vit.model.state_dict()
        if unknown := [name for name in self.weights if name not in own]:
            raise FixError(
                f"the fix has a new value for {unknown[0]!r}{_and_more(unknown)}, but this"
                f" {type(vit.model).__name__} has no weight of that name. Its weights have the names of the"
                f" library that it was trained in: load the model from there{_named(self.neurons)}."
            )
        _refuse_other_shapes(self.weights, own)

    def edits(self, vit: Backbone) -> dict[int, BlockEdit]:
        return self._tokens_alone().edits(vit)

    def handle(self, vit: Backbone) -> Applied:
        return _AppliedWeights(self, vit)

    def made_for(self, vit: Backbone | None) -> Fingerprint | None:
        """The model before the training, whatever weights stand in `vit` now."""
        return self.neurons.fingerprint or super().made_for(vit)

    def _tokens_alone(self) -> TestTimeRegisters:
        none = RegisterNeurons(())
        return TestTimeRegisters(none, self.registers, initial="given", tensors={"initial": self.tokens})


class _AppliedWeights(Applied):
    """The registers by edits of the blocks, and the weights in the place of the model's own."""

    def __init__(self, fix: TrainedRegisters, vit: Backbone) -> None:
        super().__init__(fix, vit, fix.edits(vit))
        self._model, self._weights = vit.model, fix.weights
        self._own: dict[str, Tensor] = {}

    def install(self) -> None:
        super().install()
        state = self._model.state_dict()
        self._own = {name: state[name].clone() for name in self._weights}
        _put(self._model, self._weights)

    def undo(self) -> None:
        super().undo()
        _put(self._model, self._own)
        self._own = {}


@torch.no_grad()
def _put(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """In place, so that optimizers, compiled graphs and tied weights see it."""
    state = model.state_dict()
    for name, value in weights.items():
        state[name].copy_(value)


def _module(model: nn.Module | Backbone) -> nn.Module:
    return model.model if isinstance(model, Backbone) else compiled_model_of(model)


def _kept(value: Tensor) -> Tensor:
    """A copy that shares memory with no other weight, nor with a model that goes on training."""
    return value.detach().cpu().clone()


def _refuse_other_keys(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> None:
    if other := sorted(old.keys() ^ new.keys()):
        raise FixError(
            f"expected two versions of one model, but {other[0]!r}{_and_more(other)} is a weight of only one"
            " of them. Give the model before and after its training."
        )


def _refuse_other_shapes(values: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        if value.shape != own[name].shape:
            raise FixError(
                f"the new value of {name!r} has shape {tuple(value.shape)}, but the model's is"
                f" {tuple(own[name].shape)}. Load the model as it was trained: the same architecture, image"
                " size and number of classes."
            )


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _named(neurons: RegisterNeurons) -> str:
    name = neurons.fingerprint.base_model if neurons.fingerprint else None
    return f" ({name})" if name else ""
