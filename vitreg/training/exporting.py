"""A model with added registers as its library's own register-aware class.

    twin = export(model)                       # after add_registers, or with a TrainedRegisters fix
    timm.models.save_for_hf(twin, "folder/")   # in transformers: twin.save_pretrained("folder/")
    vit = vitreg.load("folder/")

The new model needs nothing of vitreg. Its registers stand where they were carried, behind the model's own
prefix and registers; where positions have rows for the prefix, theirs are 0.
"""

import copy
from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitreg.errors import FixError, UnsupportedModelError
from vitreg.fixes.added_registers import has_added_registers, remove_registers
from vitreg.fixes.base import applied
from vitreg.fixes.trained import TrainedRegisters
from vitreg.hooks.torch_internals import compiled_model_of, tree_leaves
from vitreg.models.backbone import Backbone, wrap
from vitreg.models.probe import evaluating

INSTEAD = (
    "Keep the state dict, which loads after add_registers(model, n), or make a fix:"
    " TrainedRegisters.between(before, after)."
)
# Of float32, relative to the largest value.
TOLERANCE = 1e-5


def export(model: nn.Module) -> nn.Module:
    """A new model of the library's register-aware class with equal outputs; `model` stays as it is.

    Outputs that are token sequences have the registers in them. A model without registers is copied.
    transformers' Dinov2WithRegisters resamples its positions otherwise than Dinov2 does, so it is equal at
    the model's own size only. Raises FixError for a model with another fix, UnsupportedModelError where there
    is no such class, or where its outputs differ on noise (a norm before the blocks changes the registers).
    """
    original = compiled_model_of(model)
    plain, registers = _taken_apart(original)
    if len(registers):
        registers = registers.to(next(plain.parameters()))
        twin = _rebuilt(plain, registers).to(registers.device, registers.dtype).train(original.training)
        _check_equal(original, twin, len(registers))
        return twin
    return plain


def _taken_apart(model: nn.Module) -> tuple[nn.Module, Float[Tensor, "n d"]]:
    """A copy without registers and fixes but with their weights, and the registers in their order."""
    plain = copy.deepcopy(model)
    registers: list[Tensor] = []
    for handle in reversed(applied(plain)):
        fix = handle.fix
        if not isinstance(fix, TrainedRegisters):
            raise FixError(
                f"a fix of type {fix.type!r} is applied to the model, which no library's class can hold. Undo"
                " it first."
            )
        own = {name: plain.state_dict()[name].clone() for name in fix.weights}
        handle.undo()
        plain.load_state_dict(own, strict=False)
        registers.insert(0, fix.tokens)
    if has_added_registers(plain):
        registers.insert(0, remove_registers(plain).cpu())
    return plain, torch.cat(registers) if registers else torch.zeros(0, 0)


def _rebuilt(model: nn.Module, registers: Float[Tensor, "n d"]) -> nn.Module:
    """The model built anew by its library, with room for the registers, and filled."""
    if hasattr(model, "pretrained_cfg"):
        twin, place, state = _in_timm(model, len(registers))
    elif hasattr(getattr(model, "config", None), "model_type"):
        twin, place, state = _in_transformers(model, len(registers))
    else:
        raise _unsupported(model)
    own = state.get(place, registers[None, :0])
    state[place] = torch.cat([own, registers[None]], 1)
    twin.load_state_dict(state)
    return twin


def _unsupported(model: nn.Module) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"no library has a register-aware class for this {type(model).__name__}. There are timm's"
        " VisionTransformer and Eva, as timm.create_model builds them, and transformers' Dinov2WithRegisters"
        f" and DINOv3ViT. {INSTEAD}"
    )


def _in_timm(model: Any, n: int) -> tuple[nn.Module, str, dict[str, Tensor]]:
    import timm

    known = signature(type(model)).parameters
    argument = next((name for name in ("reg_tokens", "num_reg_tokens") if name in known), None)
    if argument is None:
        raise _unsupported(model)
    config: Mapping[str, Any] = model.pretrained_cfg
    own = 0 if model.reg_token is None else model.reg_token.shape[1]
    arguments = timm.models.get_model_args(model) | {argument: own + n}
    twin: nn.Module = timm.create_model(config["architecture"], pretrained_cfg=dict(config), **arguments)
    state = dict(model.state_dict())
    if "pos_embed" in state and not model.no_embed_class:
        prefix, patches = state["pos_embed"].tensor_split([model.num_prefix_tokens], 1)
        state["pos_embed"] = torch.cat([prefix, patches.new_zeros(1, n, patches.shape[2]), patches], 1)
    return twin, "reg_token", state


def _in_transformers(model: Any, n: int) -> tuple[nn.Module, str, dict[str, Tensor]]:
    import transformers

    config: Any = copy.deepcopy(model.config)
    kind: Any = type(model)
    if config.model_type == "dinov2":
        kind = getattr(transformers, kind.__name__.replace("Dinov2", "Dinov2WithRegisters"), None)
        known = transformers.Dinov2WithRegistersConfig().to_dict().keys() - {"model_type"}
        shared = {name: value for name, value in config.to_dict().items() if name in known}
        config = transformers.Dinov2WithRegistersConfig(**shared | {"num_register_tokens": 0})
    if kind is None or not hasattr(config, "num_register_tokens"):
        raise _unsupported(model)
    config.num_register_tokens += n
    twin: nn.Module = kind(config)
    old, new = (f"{each.base_model_prefix}." for each in (model, twin))
    state = {
        new + name.removeprefix(old) if name.startswith(old) else name: value
        for name, value in model.state_dict().items()
    }
    empty = twin.state_dict()
    place = next(name for name in empty if name.endswith("embeddings.register_tokens"))
    unused = {name: value for name, value in empty.items() if name.endswith("embeddings.mask_token")}
    return twin, place, unused | state


def _check_equal(model: nn.Module, twin: nn.Module, n: int) -> None:
    """Raise UnsupportedModelError where the two differ on noise, computed in float32."""
    vit = wrap(copy.deepcopy(model).float())
    other = wrap(copy.deepcopy(twin).float(), image_size=vit.image_size)
    noise = torch.rand(2, 3, *vit.image_size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found, expected = _outputs(other, noise), _outputs(vit, noise)
    start, tokens = vit.layout.patch_slice.start, other.layout.tokens
    found = [
        torch.cat([y[:, :start], y[:, start + n :]], 1) if y.dim() == 3 and y.shape[1] == tokens else y
        for y in found
    ]
    differ = [
        float((y - x).abs().max() / (1 + x.abs().max())) if y.shape == x.shape else torch.inf
        for y, x in zip(found, expected, strict=True)
    ]
    if max(differ) > TOLERANCE:
        raise UnsupportedModelError(
            f"as a {type(twin).__name__} with registers of its own the model gives other outputs (by"
            f" {max(differ):.2g} of the largest value): outside the blocks something changes or reads"
            f" registers, such as a norm before them or a pooling over all tokens. {INSTEAD}"
        )


def _outputs(vit: Backbone, images: Tensor) -> list[Tensor]:
    with evaluating(vit.model):
        output = vit(images)
    return [x.float() for x in tree_leaves(output) if isinstance(x, Tensor)]
