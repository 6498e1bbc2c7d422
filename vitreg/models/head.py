"""What follows the blocks of a model: its final norm, its head, and what its classes are called.

find_readout(vit)    # the final norm and the head
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitreg.data.imagenet import WORDNET_ID, wordnet_names
from vitreg.hooks.hooked import hooked
from vitreg.hooks.weights import dense_weight
from vitreg.models.backbone import Backbone
from vitreg.models.probe import evaluating


def class_names(vit: Backbone) -> list[str]:
    """What the classes of the model's head are called: by its own configuration, else by ImageNet's if their
    number is that of one of its sets, else "class 0" and so on. Empty for a model without a head."""
    classes = find_readout(vit).classes
    if classes is None:
        return []
    own = (getattr(vit.model, "pretrained_cfg", None) or {}).get("label_names")
    if own and len(own) == classes and not all(map(WORDNET_ID.fullmatch, own)):
        return list(own)
    described = getattr(getattr(vit.model, "config", None), "id2label", None) or {}
    if len(described) == classes and not str(described.get(0, "LABEL_")).startswith("LABEL_"):
        return [str(described[i]) for i in range(classes)]
    return list(_described(classes)) or [f"class {i}" for i in range(classes)]


@cache
def _described(classes: int) -> tuple[str, ...]:
    """The first of WordNet's names for each class of an ImageNet head."""
    return tuple(names[0] for names in wordnet_names(classes))


@dataclass(frozen=True)
class Readout:
    """What follows the blocks: the final norm, and the number of classes of which the output is logits.

    `read` (r, d) is what the head's linear layer reads of the residual stream, the scale of the final norm
    included (r = classes, or a multiple where several pooled tokens are joined). Each is None where there
    is none, `read` also where the head is more than one linear layer.
    """

    norm: nn.Module | None
    classes: int | None
    read: Float[Tensor, "r d"] | None


def logits_of(output: Any) -> Float[Tensor, "b c"] | None:
    """The logits in a model's output, a (b, c) tensor itself or its `.logits`, of more than one class."""
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(found, Tensor) or found.dim() != 2 or found.shape[1] < 2:
        return None
    return found.float()


def find_readout(vit: Backbone) -> Readout:
    """What follows the blocks, by what runs after the last one in a forward pass on one grey image.

    A (b, c) output may also be a pooled feature. It is taken for logits where a linear layer outside of
    the blocks maps one vector per image to c numbers.
    """
    linears, norms, output = _after_blocks(vit)
    norm = norms[0] if norms else None
    logits = logits_of(output)
    if logits is None:
        return Readout(norm, None, None)
    classes = logits.shape[1]
    linear = next((linear for linear in reversed(linears) if linear.out_features == classes), None)
    if linear is None:
        return Readout(norm, None if isinstance(output, Tensor) else classes, None)
    if linear.in_features % vit.anatomy.width:
        return Readout(norm, classes, None)
    read = dense_weight(linear).float().unflatten(1, (-1, vit.anatomy.width)).flatten(0, 1)
    return Readout(norm, classes, read if norm is None else read * norm_scale(norm))


def norm_scale(norm: nn.Module) -> Float[Tensor, " d"]:
    """What a norm multiplies each channel with."""
    assert isinstance(norm.weight, Tensor)
    return norm.weight.detach().float()


def _after_blocks(vit: Backbone) -> tuple[list[nn.Linear], list[nn.Module], Any]:
    """The linear layers that map (1, k) vectors, and the norms over the width, that run after the last
    block, in order; and the model's output."""
    linears: list[nn.Linear] = []
    norms: list[nn.Module] = []

    def left_blocks(module: nn.Module, args: Any, output: Any) -> None:
        linears.clear()
        norms.clear()

    def saw(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(module, nn.Linear):
            if output.dim() == 2:
                linears.append(module)
        elif "norm" in type(module).__name__.lower():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.shape == (vit.anatomy.width,):
                norms.append(module)

    hooks = [module.register_forward_hook(saw) for module in vit.model.modules()]
    hooks.append(vit.anatomy.block_modules(vit.model)[-1].register_forward_hook(left_blocks))
    with hooked(hooks), evaluating(vit.model):
        output = vit(torch.zeros(1, 3, *vit.image_size))
    return linears, norms, output
