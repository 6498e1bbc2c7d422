"""Trainable register tokens for a model one already has (Darcet et al.).

    add_registers(model, 4)                    # a parameter `added_registers` (4, d)
    ...                                        # train
    twin.load_state_dict(model.state_dict())   # after add_registers(twin, 4)

They enter before block 0, after the positions, behind the model's own prefix and registers, and are carried
inside the blocks: outside nobody sees an extra token. They are part of the model, not a fix of it, so they
are added before any fix is applied. `export` makes the library's own register-aware model of the result.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitreg.errors import FixError, UnsupportedModelError
from vitreg.fixes.base import applied, backbone_of
from vitreg.fixes.neurons import RegisterNeurons
from vitreg.fixes.registers import RegisterEdit, TestTimeRegisters
from vitreg.hooks.block_edit import edits_of, install, uninstall
from vitreg.hooks.carry import CarriedTokens
from vitreg.hooks.torch_internals import compiled_model_of
from vitreg.models.backbone import Backbone

# No name that a library has for its own registers: they would be taken for these.
NAME = "added_registers"
# Of the normal distribution that new registers are drawn from, as timm draws its own tokens.
DEVIATION = 0.02


def add_registers(
    model: nn.Module | Backbone, n: int, *, initial: Float[Tensor, "n d"] | float = DEVIATION
) -> nn.Parameter:
    """Give a model `n` trainable register tokens, in place; returns the parameter (n, d).

    `initial`: the values, or the standard deviation of normal ones, drawn from torch's global generator.
    Raises ValueError for n < 1 and for values of another shape, FixError for a model that has added registers
    or an applied fix, UnsupportedModelError for what is no plain ViT.
    """
    if n < 1:
        raise ValueError(f"n={n}: expected 1 or more registers. A model without any is the model as it is.")
    vit = backbone_of(model)
    _refuse_twice(vit.model)
    if vit.anatomy.no_registers:
        raise UnsupportedModelError(f"{vit.name} has no room for registers: {vit.anatomy.no_registers}.")
    parameter = nn.Parameter(_initial(initial, n, vit))
    carry: CarriedTokens[Tensor] = CarriedTokens()
    blocks = vit.anatomy.block_modules(vit.model)
    edits = [_AddedRegistersEdit(vit, layer, n, carry) for layer in range(len(blocks))]
    vit.model.register_parameter(NAME, parameter)
    for block, edit in zip(blocks, edits, strict=True):
        install(block, edit)
    return parameter


def remove_registers(model: nn.Module | Backbone) -> Float[Tensor, "n d"]:
    """Take added registers out again and return them: the model is what it was.

    Raises FixError for a model without any, and while a fix is applied, which was put on top of them.
    """
    module = compiled_model_of(model) if isinstance(model, nn.Module) else model.model
    if not has_added_registers(module):
        raise FixError(f"found no added registers in this {type(module).__name__}: there are none to remove.")
    _refuse_applied(module)
    for block in module.modules():
        for edit in edits_of(block):
            if isinstance(edit, _AddedRegistersEdit):
                uninstall(block, edit)
    values: Tensor = getattr(module, NAME).detach()
    delattr(module, NAME)
    return values


def has_added_registers(model: nn.Module) -> bool:
    """Whether `add_registers` was called on this model."""
    return any(
        isinstance(edit, _AddedRegistersEdit) for module in model.modules() for edit in edits_of(module)
    )


def _refuse_twice(model: nn.Module) -> None:
    _refuse_applied(model)
    if has_added_registers(model):
        raise FixError(
            "this model has added registers already: remove_registers(model) first, or go on training those."
        )
    if hasattr(model, NAME):
        raise FixError(f"this {type(model).__name__} has a {NAME!r} of its own: rename that first.")


def _refuse_applied(model: nn.Module) -> None:
    if found := applied(model):
        raise FixError(
            f"a fix of type {found[-1].fix.type!r} is applied to the model. Undo it first: registers are"
            " added and removed beneath all fixes."
        )


def _initial(initial: Tensor | float, n: int, vit: Backbone) -> Float[Tensor, "n d"]:
    shape = (n, vit.anatomy.width)
    if not isinstance(initial, Tensor):
        return torch.randn(shape).mul(initial).to(vit.device, vit.dtype)
    if tuple(initial.shape) != shape:
        raise ValueError(f"initial values of shape {tuple(initial.shape)}: expected {shape}, (n, width).")
    return initial.detach().clone().to(vit.device, vit.dtype)


class _AddedRegistersEdit(RegisterEdit):
    """As that of test-time registers without neurons, with what enters block 0 looked up in the model."""

    def __init__(self, vit: Backbone, layer: int, n: int, carry: CarriedTokens[Tensor]) -> None:
        fix = TestTimeRegisters(RegisterNeurons(()), n)
        super().__init__(fix, vit, layer, carry, torch.empty(0))
        # Not its parameter, which load_state_dict(assign=True), FSDP and functional_call replace.
        self.owner = vit.model

    def _enter(self, x: Float[Tensor, "b n d"], padding: Any) -> Any:
        registers: Tensor = getattr(self.owner, NAME)
        return registers.to(x).expand(x.shape[0], self.inserted, x.shape[2])
