"""What all fixes have in common: a frozen configuration that is applied to a model and undone.

    with fix.applied_to(vit):            # a Backbone, or the bare module
        vit(batch)
    handle = fix.apply(model); ...; handle.undo()
    twin = fix.bake(model)               # an independent copy with the fix in it

State-dict keys and shapes never change, and outside of the blocks nothing has other shapes. Fixes stack,
and are undone in reverse order.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from vitreg.anatomy import Anatomy
from vitreg.carry import BlockEdit, edits_of, install, uninstall
from vitreg.errors import FixError
from vitreg.models import Backbone, wrap
from vitreg.neurons import RegisterNeurons

_FIXES = "_vitreg_fixes"


@dataclass(frozen=True)
class Fix(ABC):
    """A cure for attention artifacts. `neurons` are those that it edits (a mapping {layer: indices} will do)."""

    type: ClassVar[str]
    neurons: RegisterNeurons

    def __post_init__(self) -> None:
        if isinstance(self.neurons, Mapping):
            object.__setattr__(self, "neurons", RegisterNeurons.of(self.neurons))

    @abstractmethod
    def edits(self, vit: Backbone) -> dict[int, BlockEdit]:
        """What this fix does to which block of a model, {layer: edit}."""

    def apply(self, model: nn.Module | Backbone) -> "Applied":
        """Change the model in place until `undo()` of what is returned.

        Raises FixError where the model has another geometry than the one the fix was made for, or where
        this fix is already applied.
        """
        vit = backbone_of(model)
        self.check(vit.anatomy)
        if any(handle.fix == self for handle in applied(vit.model)):
            raise FixError("this fix is already applied to the model. Undo it before you apply it again.")
        handle = Applied(self, vit, self.edits(vit))
        handle.install()
        return handle

    @contextmanager
    def applied_to(self, model: nn.Module | Backbone) -> Iterator["Applied"]:
        """The fix applied for the duration of a `with` block, whatever happens in it."""
        handle = self.apply(model)
        try:
            yield handle
        finally:
            handle.undo()

    def bake(self, model: nn.Module) -> nn.Module:
        """An independent copy of the model with the fix applied; the model itself stays as it is."""
        twin = copy.deepcopy(model)
        self.apply(twin)
        return twin

    def check(self, anatomy: Anatomy) -> None:
        """Raise FixError for neurons that a model of this anatomy does not have."""
        for layer, indices in self.neurons.by_layer.items():
            if not 0 <= layer < anatomy.depth or not all(0 <= i < anatomy.neurons for i in indices):
                raise FixError(
                    f"the fix edits neurons {list(indices)[:5]} of block {layer}, but the model has"
                    f" {anatomy.depth} blocks of {anatomy.neurons} neurons. It was made for another model."
                )


class Applied:
    """A fix on a model. `undo()` brings back the model as it was, bit for bit."""

    def __init__(self, fix: Fix, vit: Backbone, edits: dict[int, BlockEdit]) -> None:
        self.fix, self.edits = fix, edits
        self._stack = vit.model.get_submodule(vit.anatomy.blocks)

    def install(self) -> None:
        blocks = list(self._stack.children())
        for layer, edit in self.edits.items():
            install(blocks[layer], edit)
        self._stack.__dict__.setdefault(_FIXES, []).append(self)

    def undo(self) -> None:
        """Raises FixError if it was undone before, or if a fix that was applied later is still there."""
        present = self._stack.__dict__.get(_FIXES, [])
        if self not in present:
            raise FixError("this fix is not applied to the model (any more): it was undone before.")
        if present[-1] is not self:
            raise FixError(
                f"fixes are undone in reverse order: undo {present[-1].fix.type!r}, applied later, first."
            )
        blocks = list(self._stack.children())
        for layer, edit in self.edits.items():
            uninstall(blocks[layer], edit)
        present.pop()
        if not present:
            del self._stack.__dict__[_FIXES]


def applied(model: nn.Module) -> list[Applied]:
    """The fixes that are applied to a model, in the order in which they were."""
    return [handle for module in model.modules() for handle in module.__dict__.get(_FIXES, [])]


def backbone_of(model: nn.Module | Backbone) -> Backbone:
    """A Backbone around a model, which may already be fixed or compiled."""
    if isinstance(model, Backbone):
        return model
    original: nn.Module = getattr(model, "_orig_mod", model)
    return wrap(original)


def first_patch(vit: Backbone, layer: int) -> int:
    """Index of the first patch token inside a block, behind what fixes applied earlier insert there."""
    block = vit.anatomy.block_modules(vit.model)[layer]
    inserted = sum(edit.inserted for edit in edits_of(block))
    return vit.anatomy.prefix + vit.anatomy.registers + inserted
