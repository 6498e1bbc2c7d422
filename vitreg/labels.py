"""The classes of a model's head, and of photos whose names say what they show.

    class_of("val/n01440764/n01440764_10040.JPEG", wordnet_classes(1000))    # 0, a tench
    find_readout(vit)                                                        # its final norm and head

ImageNet's folders and files carry WordNet ids; timm knows which class each id is in the heads of
ImageNet-1k, -12k, -21k and -22k.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitreg.errors import DataError
from vitreg.models import Backbone
from vitreg.probe import evaluating
from vitreg.weights import dense_weight

_WORDNET_ID = re.compile(r"(?<![a-zA-Z0-9])n\d{8}(?!\d)")


def wordnet_id(name: str) -> str | None:
    """The WordNet id in a path: that of the file name, else of the nearest folder; None if two compete."""
    for part in reversed(re.split(r"[/\\]", name)):
        if found := set(_WORDNET_ID.findall(part)):
            return found.pop() if len(found) == 1 else None
    return None


@cache
def wordnet_classes(classes: int) -> Mapping[str, int]:
    """{WordNet id: class index} of an ImageNet head with so many classes; empty for any other number."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": classes})
    try:
        names = ImageNetInfo(subset).label_names() if subset else []
    except AssertionError:  # a subset that this timm names, but does not have
        names = []
    return {name: index for index, name in enumerate(names)}


def class_names(vit: Backbone) -> list[str]:
    """What the classes of the model's head are called: by its own configuration, else by ImageNet's if their
    number is that of one of its sets, else "class 0" and so on. Empty for a model without a head."""
    classes = find_readout(vit).classes
    if classes is None:
        return []
    own = (getattr(vit.model, "pretrained_cfg", None) or {}).get("label_names")
    if own and len(own) == classes and not all(map(_WORDNET_ID.fullmatch, own)):
        return list(own)
    described = getattr(getattr(vit.model, "config", None), "id2label", None) or {}
    if len(described) == classes and not str(described.get(0, "LABEL_")).startswith("LABEL_"):
        return [str(described[i]) for i in range(classes)]
    return list(_described(classes)) or [f"class {i}" for i in range(classes)]


@cache
def _described(classes: int) -> tuple[str, ...]:
    """The first of WordNet's names for each class of an ImageNet head."""
    return tuple(names[0] for names in wordnet_names(classes))


@cache
def wordnet_names(classes: int) -> tuple[tuple[str, ...], ...]:
    """All of WordNet's names for each class of an ImageNet head; empty for another number of classes."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-22k")
    described = (info.label_name_to_description(name) for name in wordnet_classes(classes))
    return tuple(tuple(name.strip() for name in text.split(",")) for text in described)


@cache
def clip_names(classes: int) -> tuple[tuple[str, ...], ...]:
    """CLIP's name for each class of ImageNet-1k's head, if open_clip is installed; else empty."""
    try:
        from open_clip import IMAGENET_CLASSNAMES
    except ImportError:
        return ()
    return tuple((name,) for name in IMAGENET_CLASSNAMES) if classes == len(IMAGENET_CLASSNAMES) else ()


def numbers_of_names(names: Sequence[str], of_classes: Sequence[Sequence[str]]) -> dict[str, int] | None:
    """Which class each name is of, if all are names of classes; None if one is of none.

    `of_classes` are the names of each class. Upper case, "_" and "-" make no difference. Raises DataError for
    a name of two classes (crane), and for two names of one class.
    """
    owners: dict[str, list[int]] = {}
    for number, called in enumerate(of_classes):
        for name in {plain(name) for name in called}:
            owners.setdefault(name, []).append(number)
    if not all(plain(name) in owners for name in names):
        return None
    found: dict[int, str] = {}
    for name in names:
        if len(own := owners[plain(name)]) > 1:
            raise DataError(
                f"{name!r} is the name of the classes {own[0]} and {own[1]}. Call its folder by the class's"
                " WordNet id (n01440764), or all folders by their classes' numbers."
            )
        if (twin := found.setdefault(own[0], name)) != name:
            raise DataError(
                f"{twin!r} and {name!r} are names of the class {own[0]}. Put its photos together."
            )
    return {name: number for number, name in found.items()}


def plain(name: str) -> str:
    """In lower case, with a single space for "_" and "-"."""
    return re.sub(r"[\s_-]+", " ", name).strip().lower()


def class_of(name: str, classes: Mapping[str, int]) -> int | None:
    """The class of a photo by its path; None where its name does not say, or the head does not know it."""
    found = wordnet_id(name)
    return None if found is None else classes.get(found)


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
    try:
        with evaluating(vit.model):
            output = vit(torch.zeros(1, 3, *vit.image_size))
    finally:
        for hook in hooks:
            hook.remove()
    return linears, norms, output
