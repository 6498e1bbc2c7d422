"""Which module of a block leads from the MLP's neurons back to the width: the down-projection.

It is found by what enters and leaves the modules of a block while it runs, not by their classes: an affine
module takes (b, n, f) and gives (b, n, d). Of those on the same input the outermost is meant, so that a
linear layer is found with all that wraps it (LoRA and its kin, quantisation, adapters beside it). The small
layers within an affine module are no MLP: there is no neuron between them.
"""

import re
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vitreg.hooks.weights import is_affine

Shape = tuple[int, ...]


class Call(NamedTuple):
    """A call of a module within block 0 that takes a tensor first and gives one."""

    name: str
    module: nn.Module
    given: Tensor
    output: Shape

    @property
    def neurons(self) -> int:
        return self.given.shape[-1]

    def inside(self, other: "Call") -> bool:
        return self.name.startswith(f"{other.name}.")


def is_linear(module: nn.Module) -> bool:
    """Whether a module says that it is a linear layer, of PyTorch or of a library that quantises."""
    if isinstance(module, nn.Linear):
        return True
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return all(isinstance(size, int) for size in sizes) and not any(map(is_linear, module.children()))


def leading_down(calls: list[Call], streams: set[Shape]) -> list[Call]:
    """The modules that lead from neurons (b, n, f), f not d, to the stream (b, n, d), or what it is there."""
    axes = {len(shape) for shape in streams}
    affine = [call for call in calls if call.given.dim() in axes and _is_affine(call)]
    outermost = [call for call in affine if not any(call.inside(other) for other in affine)]
    leading = [call for call in outermost if call.output in streams and call.neurons != call.output[-1]]
    return [_bare(_with_all_around(call, calls), calls) for call in leading]


def _is_affine(call: Call) -> bool:
    return any(map(is_linear, call.module.modules())) and is_affine(call.module, call.neurons, call.given)


def _with_all_around(call: Call, calls: list[Call]) -> Call:
    """The outermost module on the same input: what lies beside the layer reads the same neurons."""
    around = [other for other in calls if call.inside(other) and _same_role(other, call)]
    return min(around, key=lambda other: len(other.name), default=call)


def _bare(call: Call, calls: list[Call]) -> Call:
    """The innermost module that holds all of a module's tensors: without containers and dropout."""
    within = [other for other in calls if other.inside(call) and _same_role(other, call)]
    alike = [other for other in within if _tensors(other.module) == _tensors(call.module)]
    return max(alike, key=lambda other: len(other.name), default=call)


def _same_role(one: Call, other: Call) -> bool:
    return one.given is other.given and one.output == other.output


def _tensors(module: nn.Module) -> set[int]:
    return {id(tensor) for tensor in (*module.parameters(), *module.buffers())}


def without_attention(found: list[Call], calls: list[Call], mixed: Tensor | None) -> list[Call]:
    """Attention with its own width also leads back to d: what enters there are the mixed values (b, n, h c).

    Where something was done to them on the way (a gate, say), names tell.
    """
    if mixed is None:
        return found
    return [call for call in found if not (_takes(call, mixed) or _is_output(call, calls, mixed.shape[2]))]


def _takes(call: Call, mixed: Tensor) -> bool:
    orders = (mixed, mixed.transpose(0, 1), mixed.flatten(0, 1), mixed.flatten(0, 1)[None])
    return any(call.given.shape == x.shape and torch.allclose(call.given, x, atol=1e-4) for x in orders)


def _is_output(call: Call, calls: list[Call], width: int) -> bool:
    return call.neurons == width and _projects_queries(call, calls)


def _projects_queries(call: Call, calls: list[Call]) -> bool:
    parent = call.name.rpartition(".")[0]
    siblings = [other.name for other in calls if other.name.rpartition(".")[0] == parent]
    return any(re.search(r"qkv|q_proj|query|in_proj", name) for name in siblings)


def without_bottlenecks(found: list[Call], width: int) -> list[Call]:
    """Adapters beside or behind the MLP narrow the stream, where an MLP widens it."""
    return [call for call in found if call.neurons > width] or found
