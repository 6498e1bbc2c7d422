"""The weights of a linear layer as the layer acts, whatever it keeps them as.

dense_weight(block.mlp.fc2)      # (d, f)

A layer's `weight` need not be what it multiplies by: a LoRA layer adds a low-rank path, a quantised one keeps
packed integers, an offloaded one keeps nothing here. Where the weight is no plain tensor of a plain layer,
the layer itself is asked: its derivative is what it multiplies by.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from vitreg.errors import UnsupportedModelError

# What rounding, to 32 or 16 bits or to fewer, may make of a sum.
ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-3}
ROUNDING_16, ROUNDING_QUANTISED = 0.02, 0.05


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer is one of PyTorch's own, with its weight at hand as an ordinary tensor."""
    if not isinstance(layer, nn.Linear) or "forward" in layer.__dict__:
        return False
    ordinary = type(layer).forward is nn.Linear.forward and is_ordinary(layer.weight)
    return ordinary and not nn.utils.parametrize.is_parametrized(layer)


def is_ordinary(tensor: Tensor) -> bool:
    """Whether a tensor holds its numbers here: no subclass of another library, nothing offloaded."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.device.type != "meta"


def is_quantised(layer: nn.Module) -> bool:
    """Whether a layer, or what it wraps, keeps its weights in fewer bits than it computes in."""
    tensors = [*layer.parameters(), *layer.buffers()]
    return not tensors or any(
        tensor.dim() >= 2 and not (is_floating(tensor) or tensor.device.type == "meta") for tensor in tensors
    )


def is_floating(tensor: Tensor) -> bool:
    """Whether a tensor's numbers are stored as they are: 16 bits or more, no packed subclass."""
    ordinary = type(tensor) in (Tensor, nn.Parameter) or is_sharded(tensor)
    return ordinary and tensor.is_floating_point() and tensor.element_size() >= 2


def weight_columns(layer: nn.Module, neurons: Int[Tensor, " k"], like: Tensor) -> Float[Tensor, "d k"]:
    """What the layer writes per unit of some neurons' activation, in the dtype and where `like` is."""
    if is_plain(layer):
        weight = layer.weight
        assert isinstance(weight, Tensor)
        return weight.index_select(1, neurons.to(weight.device)).to(like)
    inputs = torch.zeros(len(neurons) + 1, inputs_of(layer), dtype=like.dtype, device=like.device)
    rows = torch.arange(len(neurons), device=like.device)
    inputs = inputs.index_put((rows, neurons.to(like.device)), torch.ones_like(inputs[0, 0]))
    outputs = _call(layer, inputs[None])[0]
    return (outputs[:-1] - outputs[-1:]).T.to(like)


def is_affine(layer: nn.Module, inputs: int, like: Tensor) -> bool:
    """Whether f(u) + f(v) = f(u + v) + f(0) for random tokens of so many channels.

    `like` says in which dtype and where. False for a module that cannot be called with (1, tokens, channels),
    or does not give a tensor.
    """
    if is_plain(layer):
        return True
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.randn(1, 4, inputs, generator=generator).to(like) for _ in range(2))
    try:
        one, other, both, nothing = (_call(layer, x).float() for x in (u, v, u + v, torch.zeros_like(u)))
    except Exception:  # whatever a module that is no linear layer says of such inputs
        return False
    missing = (one + other - both - nothing).norm()
    return bool(missing <= _rounding(layer, like) * (both - nothing).norm())


def _call(layer: nn.Module, x: Tensor) -> Tensor:
    """What a layer makes of an input, seen by no hook.

    Parameters that are sharded over processes are gathered (every process has to call this).
    """
    parameters: dict[str, Any] = dict(layer.named_parameters())
    whole = {f"layer.{name}": p.full_tensor() for name, p in parameters.items() if is_sharded(p)}
    y: Tensor = functional_call(_Forward(layer), whole, (x,)) if whole else layer.forward(x)
    return y


class _Forward(nn.Module):
    """A layer's `forward` alone."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer.forward(x)
        return y


def is_sharded(tensor: Tensor) -> bool:
    """Whether each process holds a part of a tensor (a DTensor, as `fully_shard` makes them)."""
    return hasattr(tensor, "full_tensor")


def _rounding(layer: nn.Module, like: Tensor) -> float:
    if is_quantised(layer):
        return ROUNDING_QUANTISED
    return ROUNDING.get(like.dtype, ROUNDING_16)


def dense_weight(layer: nn.Module, rows: int | None = None) -> Float[Tensor, "r f"]:
    """The (d, f) matrix that a linear layer multiplies by, or its first rows, without history.

    Raises UnsupportedModelError where it cannot be told.
    """
    if is_plain(layer):
        weight = layer.weight
        assert isinstance(weight, Tensor)
        return weight.detach()[:rows]
    try:
        return _derivative(layer, rows)
    except Exception as error:  # what each library's layer says of a backward pass that it lacks
        raise UnsupportedModelError(
            f"the weights of a {type(layer).__name__} cannot be read ({type(error).__name__})."
        ) from error


def _derivative(layer: nn.Module, rows: int | None) -> Float[Tensor, "r f"]:
    """Row i is the gradient of output i."""
    outputs = outputs_of(layer) if rows is None else min(rows, outputs_of(layer))
    parameters = list(layer.parameters())
    floating = next((p for p in parameters if p.is_floating_point()), torch.empty(0))
    device = floating.device if floating.device.type != "meta" else torch.device("cpu")
    with torch.enable_grad():
        x = torch.zeros(1, outputs, inputs_of(layer), dtype=floating.dtype, device=device, requires_grad=True)
        y = _call(layer, x)[0, :, :outputs].diagonal().sum()
    (gradient,) = torch.autograd.grad(y, x)
    return gradient[0].detach()


def inputs_of(layer: nn.Module) -> int:
    """How many numbers a linear layer reads."""
    return _size(layer, "in_features", "nx")  # nx, nf: the Conv1D of transformers


def outputs_of(layer: nn.Module) -> int:
    """How many numbers a linear layer gives."""
    return _size(layer, "out_features", "nf")


def _size(layer: nn.Module, *names: str) -> int:
    """A size that a layer, or the layer that it wraps, states."""
    stated = (getattr(part, name, None) for part in layer.modules() for name in names)
    for size in stated:
        if isinstance(size, int):
            return size
    raise UnsupportedModelError(f"a {type(layer).__name__} does not say its {names[0]}.")
