"""The weights of a linear layer as the layer acts, whatever it keeps them as.

dense_weight(block.mlp.fc2)      # (d, f)

A layer's `weight` need not be what it multiplies by: a LoRA layer adds a low-rank path, a quantised one keeps
packed integers, an offloaded one keeps nothing here. Where the weight is no plain tensor of a plain layer, the
layer itself is asked: its derivative is what it multiplies by.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vitreg.errors import UnsupportedModelError


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer is one of PyTorch's own, with its weight at hand as an ordinary tensor."""
    if not isinstance(layer, nn.Linear) or "forward" in layer.__dict__:
        return False
    ordinary = type(layer).forward is nn.Linear.forward and is_ordinary(layer.weight)
    return ordinary and not nn.utils.parametrize.is_parametrized(layer)


def is_ordinary(tensor: Tensor) -> bool:
    """Whether a tensor holds its numbers here: no subclass of another library, nothing offloaded."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.device.type != "meta"


def weight_columns(layer: nn.Module, neurons: Int[Tensor, " k"], like: Tensor) -> Float[Tensor, "d k"]:
    """What the layer writes per unit of some neurons' activation, in the dtype and on the device of `like`."""
    if is_plain(layer):
        weight = layer.weight
        assert isinstance(weight, Tensor)
        return weight.index_select(1, neurons.to(weight.device)).to(like)
    inputs = torch.zeros(len(neurons) + 1, inputs_of(layer), dtype=like.dtype, device=like.device)
    rows = torch.arange(len(neurons), device=like.device)
    inputs = inputs.index_put((rows, neurons.to(like.device)), torch.ones_like(inputs[0, 0]))
    outputs = layer.forward(inputs[None])[0]  # no hook is to see this
    return (outputs[:-1] - outputs[-1:]).T.to(like)


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
        y = layer.forward(x)[0, :, :outputs].diagonal().sum()
    (gradient,) = torch.autograd.grad(y, x)
    return gradient[0].detach()


def inputs_of(layer: nn.Module) -> int:
    return _size(layer, "in_features")


def outputs_of(layer: nn.Module) -> int:
    return _size(layer, "out_features")


def _size(layer: nn.Module, name: str) -> int:
    """A size that a layer, or the layer that it wraps, states."""
    for part in layer.modules():
        size = getattr(part, name, None)
        if isinstance(size, int):
            return size
    raise UnsupportedModelError(f"a {type(layer).__name__} does not say its {name}.")
