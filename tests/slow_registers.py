"""Test-time registers by a slow reference: image by image and neuron by neuron, with ordinary hooks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from catalog import images
from looking import removing
from paired_models import Paired
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import vitreg
from vitreg.fixes import TestTimeRegisters
from vitreg.models.probe import first_tensor


def replaced(given: Any, stream: Tensor) -> Any:
    """What enters or leaves a block, with another residual stream."""
    return stream if isinstance(given, Tensor) else (stream, *given[1:])


class _Done(Exception):  # noqa: N818 - no error
    """The last block has run; what follows does not expect more tokens."""


class Reference:
    """The model with the registers of some fixes in its stream from block 0 to the last, one image at a time.

    `after_block_0` is an edit of the model's own tokens between blocks.
    """

    def __init__(
        self,
        vit: vitreg.Backbone,
        *fixes: TestTimeRegisters,
        after_block_0: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self.vit, self.fixes, self.steer = vit, fixes, after_block_0
        self.start = vit.anatomy.prefix + vit.anatomy.registers
        self.inserted = sum(fix.registers for fix in fixes)
        self.own = [
            t for t in range(vit.layout.tokens + self.inserted)
            if not self.start <= t < self.start + self.inserted
        ]  # fmt: skip

    def residuals(self, batch: Tensor) -> Tensor:
        """(l, b, n, d) after each block, of the model's own tokens."""
        return torch.cat([self._of_one(image[None]) for image in batch], 1)

    def _of_one(self, image: Tensor) -> Tensor:
        self.seen: list[Tensor] = []
        blocks = self.vit.anatomy.block_modules(self.vit.model)
        downs = self.vit.anatomy.down_projections(self.vit.model)
        hooks = [blocks[0].register_forward_pre_hook(self._enter, with_kwargs=True)]
        hooks += [down.register_forward_pre_hook(partial(self._edit, i)) for i, down in enumerate(downs)]
        hooks += [block.register_forward_hook(partial(self._leave, i)) for i, block in enumerate(blocks)]
        with (
            suppress(_Done),
            removing(hooks),
            torch.no_grad(),
            _Padded(self),
            _unrotated(blocks, self.inserted, self.own),
        ):
            self.vit(image)
        return torch.stack(self.seen)

    def _enter(self, block: nn.Module, args: Any, kwargs: Any) -> Any:
        x = first_tensor((args, kwargs))
        wide = torch.zeros(1, len(self.own) + self.inserted, x.shape[2])
        wide[:, self.own] = x
        return (wide, *args[1:]), kwargs if args else {
            name: wide if v is x else v for name, v in kwargs.items()
        }

    def _leave(self, layer: int, block: nn.Module, args: Any, output: Any) -> Any:
        y = first_tensor(output).clone()
        if layer == 0 and self.steer:
            y[:, self.own] = self.steer(y[:, self.own])
        self.seen.append(y[:, self.own])
        if layer == self.vit.anatomy.depth - 1:
            raise _Done
        return replaced(output, y)

    def _edit(self, layer: int, down: nn.Module, args: tuple[Tensor]) -> Any:
        activation, first = args[0].clone(), self.start
        for fix in self.fixes:
            for neuron in fix.neurons.by_layer.get(layer, []):
                peak = max(float(activation[0, t, neuron]) for t in range(activation.shape[1]))
                for t in range(activation.shape[1]):
                    activation[0, t, neuron] = peak if first <= t < first + fix.registers else 0.0
            first += fix.registers
        return (activation,)


MASKING = ("add", "add_", "where", "masked_fill", "baddbmm")


class _Padded(TorchFunctionMode):
    """Positional biases and masks with a 0 (or True) wherever a register stands."""

    def __init__(self, reference: Reference) -> None:
        super().__init__()
        self.own, self.inserted = reference.own, reference.inserted

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tokens = len(self.own) + self.inserted
        if func is F.interpolate and kwargs.get("size") == (tokens, tokens):
            return args[0]  # of the model's own tokens, as in the unfixed model
        if func is F.scaled_dot_product_attention and kwargs.get("attn_mask") is not None:
            mask = kwargs["attn_mask"]
            if mask.shape[-1] == len(self.own):
                wide = mask.new_full((*mask.shape[:-2], tokens, tokens), mask.dtype == torch.bool)
                for row, t in enumerate(self.own):
                    wide[..., t, self.own] = mask[..., row if mask.shape[-2] > 1 else 0, :]
                kwargs["attn_mask"] = wide
        if func.__name__ in MASKING:
            args = self._padded_masks(func.__name__, args, tokens)
        return func(*args, **kwargs)

    def _padded_masks(self, name: str, args: Any, tokens: int) -> Any:
        """The masks and biases (..., n or 1, n) of attention step by step."""
        sizes = [x.shape[-1] for x in args if isinstance(x, Tensor) and x.dim() > 1]
        if tokens not in sizes and name != "baddbmm":
            return args
        return [
            self._padded(x, tokens, name == "where")
            if isinstance(x, Tensor) and x.dim() > 1 and x.shape[-2:].numel() in (self.n**2, self.n)
            and x.shape[-1] == self.n else x
            for x in args
        ]  # fmt: skip

    @property
    def n(self) -> int:
        return len(self.own)

    def _padded(self, mask: Tensor, tokens: int, keep: bool) -> Tensor:
        rows = tokens if mask.shape[-2] > 1 else 1
        wide = mask.new_full((*mask.shape[:-2], rows, tokens), keep)
        if rows == 1:
            wide[..., self.own] = mask
            return wide
        for row, t in enumerate(self.own):
            wide[..., t, self.own] = mask[..., row, :]
        return wide


@contextmanager
def _unrotated(blocks: list[nn.Module], more: int, own: list[int]) -> Iterator[None]:
    """timm's rotary attention leaves as many of the first tokens unrotated as this integer says."""
    rotary = [
        m for block in blocks for m in block.modules() if isinstance(vars(m).get("num_prefix_tokens"), int)
    ]
    for module in rotary:
        module.num_prefix_tokens += more
    authors = [m for block in blocks for m in block.modules() if hasattr(m, "rotate")]
    for module in authors:
        module.rotate = partial(_rotated_without, module.rotate, own)
    try:
        yield
    finally:
        for module in authors:
            del module.rotate
        for module in rotary:
            module.num_prefix_tokens -= more


def _rotated_without(rotate: Callable[[Tensor], Tensor], own: list[int], x: Tensor) -> Tensor:
    """(b, h, n, c) with positions at the model's own tokens alone."""
    y = x.clone()
    y[:, :, own] = rotate(x[:, :, own])
    return y


def reference(vit: vitreg.Backbone, *fixes: TestTimeRegisters, after_block_0: Any = None) -> Tensor:
    if isinstance(vit.model, Paired):
        vit = vitreg.wrap(vit.model.joined(), image_size=vit.image_size)
    return Reference(vit, *fixes, after_block_0=after_block_0).residuals(images(vit, 3))
