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
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitreg.errors import FixError
from vitreg.fixes.neurons import RegisterNeurons
from vitreg.hooks.block_edit import BlockEdit, inserted_tokens, install, uninstall
from vitreg.hooks.own_tokens import narrow_output
from vitreg.hooks.torch_internals import compiled_model_of, uncompiled
from vitreg.models.backbone import Backbone, wrap
from vitreg.models.fingerprint import Fingerprint
from vitreg.models.sizes import Pair, native_size

_FIXES = "_vitreg_fixes"


@dataclass(frozen=True)
class Fix(ABC):
    """A cure for attention artifacts. `neurons` are those that it edits ({layer: indices} will do)."""

    type: ClassVar[str]
    inside_splitting: ClassVar[str] = ""  # what it would do to split tokens, for fixes that must come before
    does_not_cure: ClassVar[str] = ""  # one plain sentence, for those who read the verdict
    neurons: RegisterNeurons

    def __post_init__(self) -> None:
        if isinstance(self.neurons, Mapping):
            object.__setattr__(self, "neurons", RegisterNeurons.of(self.neurons))

    def __init_subclass__(cls, **options: Any) -> None:
        """Every kind has one short repr: a dataclass would write out its neurons' evidence and tensors."""
        super().__init_subclass__(**options)
        if "__repr__" not in vars(cls):
            cls.__repr__ = Fix.__repr__  # type: ignore[method-assign]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(_said(self))})"

    @abstractmethod
    def edits(self, vit: Backbone) -> dict[int, BlockEdit]:
        """What this fix does to which block of a model, {layer: edit}."""

    def apply(self, model: nn.Module | Backbone) -> "Applied":
        """Change the model in place until `undo()` of what is returned.

        Raises FixError where the model has another geometry than the one the fix was made for, where this
        fix is already applied, or where splitting is and this one adds tokens; warns (FixWarning) where the
        model has other weights.
        """
        made_for = self.neurons.fingerprint
        vit = backbone_of(model, None if made_for is None else made_for.image_size)
        self.check(vit)
        if any(handle.fix == self for handle in applied(vit.model)):
            raise FixError("this fix is already applied to the model. Undo it before you apply it again.")
        if self.inside_splitting and any(handle.fix.type == "splitting" for handle in applied(vit.model)):
            raise FixError(
                f"token splitting is applied to the model, and {self.type!r} {self.inside_splitting} its"
                " originals and copies. Undo it, apply this fix first, and token splitting last."
            )
        handle = self.handle(vit)
        handle.install()
        return handle

    def handle(self, vit: Backbone) -> "Applied":
        """How this fix goes onto a model and off again."""
        return Applied(self, vit, self.edits(vit))

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

    def check(self, vit: Backbone) -> None:
        """Raise FixError for a model of another geometry, warn (FixWarning) about one with other weights."""
        if self.neurons.fingerprint is not None:
            self.neurons.fingerprint.check(vit)
        anatomy = vit.anatomy
        for layer, indices in self.neurons.by_layer.items():
            if not 0 <= layer < anatomy.depth or not all(0 <= i < anatomy.neurons for i in indices):
                raise FixError(
                    f"the fix edits neurons {list(indices)[:5]} of block {layer}, but the model has"
                    f" {anatomy.depth} blocks of {anatomy.neurons} neurons. It was made for another model."
                )

    def placebo(self, vit: Backbone, seed: int = 0) -> "Fix | None":
        """Of a fix without neurons: one of its kind that does as much where nothing is wrong.

        None for kinds that have no such thing.
        """
        return None

    def made_for(self, vit: Backbone | None) -> Fingerprint | None:
        """The model that the fix belongs to: `vit` if it is given, else that of its neurons."""
        return self.neurons.fingerprint if vit is None else Fingerprint.of(vit)

    def save(
        self,
        folder: str | Path,
        *,
        vit: Backbone | None = None,
        evidence: Mapping[str, Any] | None = None,
    ) -> Path:
        """Save as a small folder that `load_fix` reads: see `vitreg.fixes.saving.save_fix`."""
        from vitreg.fixes.saving import save_fix

        return save_fix(self, folder, vit=vit, evidence=evidence)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        vit: Backbone | None = None,
        evidence: Mapping[str, Any] | None = None,
        token: str | None = None,
        private: bool = False,
        commit_message: str = "A fix for attention artifacts, by vitreg",
    ) -> str:
        """Save into a repository of the Hugging Face hub: see `vitreg.fixes.hub.push_fix`."""
        from vitreg.fixes.hub import push_fix

        return push_fix(
            self, repo_id, vit=vit, evidence=evidence, token=token, private=private,
            commit_message=commit_message,
        )  # fmt: skip


def _said(fix: Fix) -> Iterator[str]:
    """What tells a fix from others of its kind: its neurons, and the fields that are not as by default."""
    if fix.neurons.chosen:
        yield repr(fix.neurons.by_layer) if fix.neurons.top_k <= 8 else fix.neurons.in_words
    for field in fields(fix):
        value = getattr(fix, field.name)
        if field.name == "neurons" or value is field.default:
            continue
        if isinstance(value, str | int | float) and value != field.default:
            yield f"{field.name}={value!r}"
        elif isinstance(value, Tensor):
            yield f"{field.name}={tuple(value.shape)}"


def same_values(fix: Fix, other: object) -> bool:
    """Whether two fixes are of one kind with the same fields, tensors among them by their values."""
    return type(fix) is type(other) and all(
        torch.equal(mine, theirs) if isinstance(mine, Tensor) else mine == theirs
        for mine, theirs in zip(vars(fix).values(), vars(other).values(), strict=True)
    )


class Applied:
    """A fix on a model. `undo()` brings back the model as it was, bit for bit."""

    def __init__(self, fix: Fix, vit: Backbone, edits: dict[int, BlockEdit]) -> None:
        self.fix, self.edits = fix, edits
        self._model, self._heads = vit.model, vit.anatomy.heads
        self._stack = vit.model.get_submodule(vit.anatomy.blocks)
        blocks = vit.anatomy.block_modules(vit.model)
        # The modules themselves: others may take their place in the stack, around them.
        self._edited: list[tuple[nn.Module, BlockEdit]] = [(blocks[i], edit) for i, edit in edits.items()]
        for edit in edits.values():
            edit.stream = vit.anatomy.stream

    @property
    def carried(self) -> Any:
        """What came out of the last block in this thread's latest pass: registers (b, r, d), or a Fork.

        None before a pass, and for a fix that carries nothing.
        """
        carry = getattr(next(reversed(self.edits.values()), None), "carry", None)
        return None if carry is None else carry.latest

    def install(self) -> None:
        for module, edit in self._edited:
            install(module, edit)
        self._narrowing = self._model.register_forward_hook(partial(narrow_output, self._heads))
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
        for module, edit in self._edited:
            uninstall(module, edit)
        self._narrowing.remove()
        present.pop()
        if not present:
            del self._stack.__dict__[_FIXES]


def applied(model: nn.Module) -> list[Applied]:
    """The fixes that are applied to a model, in the order in which they were."""
    return [handle for module in model.modules() for handle in module.__dict__.get(_FIXES, [])]


@contextmanager
def without_fixes(model: nn.Module) -> Iterator[None]:
    """The model as it is without the fixes that are applied to it, for as long as one looks at it."""
    handles = applied(model)
    for handle in reversed(handles):
        handle.undo()
    try:
        yield
    finally:
        for handle in handles:
            handle.install()


def backbone_of(model: nn.Module | Backbone, size: Pair | None = None) -> Backbone:
    """A Backbone around a model, which may already be fixed or compiled.

    `size` is the (height, width) of its images where the model's configuration names none.
    """
    if isinstance(model, Backbone):
        return model
    original = compiled_model_of(model)
    with uncompiled(original):
        return wrap(original, image_size=native_size(original) or size)


def first_patch(vit: Backbone, layer: int) -> int:
    """Index of the first patch token inside a block, behind what fixes applied earlier insert there."""
    block = vit.anatomy.block_modules(vit.model)[layer]
    return vit.anatomy.prefix + vit.anatomy.registers + inserted_tokens(block)
