"""Which keys a checkpoint lacks or has too many, and whether that matters to what vitreg reads.

What the residual stream does not depend on (poolers, heads, necks, decoders) may be missing or left over: the
model loads, and a line says so. In blocks, embeddings and the final norm it is an error, since transformers
would fill in random weights.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vitreg.errors import ModelLoadError
from vitreg.models.probe import first_tensor

if TYPE_CHECKING:
    from vitreg.models.backbone import Backbone

# A key of no module that the model has is of an embedding or a final norm if its first new part is called so.
_OF_THE_STREAM = re.compile(r"norm|ln_|embed|pos|token|patch|register")

_UNUSED = ("mask_token", "position_ids")  # of training alone; numbers 0, 1, 2, ...


@dataclass(frozen=True)
class KeyMismatch:
    """What did not fit when the `whole` model was loaded: `missing` tensors by key, and `unexpected` keys."""

    checkpoint: str
    whole: nn.Module
    missing: dict[str, Tensor | None]
    unexpected: list[str]

    def judge(self, vit: "Backbone") -> str:
        """A note on what does not matter. Raises ModelLoadError for what does."""
        needed = {id(tensor) for tensor in _tensors_of_the_stream(vit)}
        blocks = f"{_path(self.whole, vit.model)}{vit.anatomy.blocks}."
        lacking = [
            key
            for key, tensor in self.missing.items()
            if tensor is None or id(tensor) in needed or key.startswith(blocks)
        ]
        left_over = [key for key in self.unexpected if self._belongs(key, blocks, needed)]
        wrong = [_named("missing keys", lacking), _named("unexpected keys", left_over)]
        if any(wrong):
            raise ModelLoadError(self._says(wrong))
        lacks, has = _named("keys", [*self.missing]), _named("keys", self.unexpected)
        said = [f"lacks {lacks}, now random" if lacks else "", f"has {has} too many, left out" if has else ""]
        return f"the checkpoint {' and '.join(filter(None, said))}; blocks, embeddings and final norm fit."

    def refuse_missing(self) -> None:
        """Raise ModelLoadError for any missing key: where text is read, too, every weight matters."""
        if self.missing:
            raise ModelLoadError(self._says([_named("missing keys", [*self.missing])]))

    def _says(self, wrong: list[str]) -> str:
        return (
            f"the checkpoint of {self.checkpoint} does not fit {type(self.whole).__name__}:"
            f" {'; '.join(filter(None, wrong))}."
        )

    def _belongs(self, key: str, blocks: str, needed: set[int]) -> bool:
        """Whether an unexpected key lies in the blocks, or where embeddings and the final norm are."""
        if key.startswith(blocks):
            return True
        modules = dict(self.whole.named_modules())
        parts = key.split(".")
        known = next(i for i in range(len(parts) - 1, -1, -1) if ".".join(parts[:i]) in modules)
        owner = ".".join(parts[:known])
        if parts[known] in _UNUSED:
            return False
        if not owner or blocks.startswith(f"{owner}."):
            return bool(_OF_THE_STREAM.search(parts[known]))
        return any(id(parameter) in needed for parameter in modules[owner].parameters())


def _named(what: str, keys: list[str]) -> str:
    shown = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
    return f"{len(keys)} {what if len(keys) > 1 else what.removesuffix('s')} ({shown})" if keys else ""


def _path(whole: nn.Module, part: nn.Module) -> str:
    """The dotted path of a part, with a dot behind it; empty for the whole."""
    return next((f"{name}." for name, module in whole.named_modules() if module is part and name), "")


def _tensors_of_the_stream(vit: "Backbone") -> Iterable[Tensor]:
    """The parameters the residual stream after the last block depends on, and those of the norm after it."""
    from vitreg.models.head import find_readout

    streams: list[Tensor] = []

    def saw(module: nn.Module, args: object, output: object) -> None:
        stream = first_tensor(output)
        assert stream is not None
        streams.append(stream)

    frozen = [p for p in vit.model.parameters() if p.is_floating_point() and not p.requires_grad]
    hook = vit.anatomy.block_modules(vit.model)[-1].register_forward_hook(saw)
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            vit(torch.zeros(1, 3, *vit.image_size))
    except Exception:  # a head that wants more than images does not concern us
        if not streams:
            raise
    finally:
        hook.remove()
        for parameter in frozen:
            parameter.requires_grad_(False)
    yield from _leaves(streams[-1])
    norm = find_readout(vit).norm
    yield from norm.parameters() if norm is not None else ()


def _leaves(tensor: Tensor) -> Iterator[Tensor]:
    """The parameters in a tensor's autograd graph."""
    todo, seen = [tensor.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        todo += [inner for inner, _ in node.next_functions]
