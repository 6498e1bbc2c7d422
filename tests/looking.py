"""What models do and give, seen without vitreg: tensors of an output, two outputs compared, the stream."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from catalog import images
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import vitreg
from vitreg.models.probe import first_tensor


def tensors(output: Any) -> list[Tensor]:
    """Every tensor in a model's output, in order."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = tuple(output.values())
    return [t for item in output for t in tensors(item)] if isinstance(output, tuple | list) else []


def same(one: Any, other: Any) -> bool:
    """Bit for bit, and not empty."""
    first, second = tensors(one), tensors(other)
    return len(first) == len(second) > 0 and all(map(torch.equal, first, second))


def close(one: Any, other: Any, tolerance: float = 1e-5) -> None:
    """To a tolerance relative to the largest value."""
    assert len(tensors(one)) == len(tensors(other)) > 0
    for x, y in zip(tensors(one), tensors(other), strict=True):
        largest = float(y.detach().abs().max()) if y.numel() else 0.0
        torch.testing.assert_close(x, y, rtol=0, atol=tolerance * (1 + largest))


def different(one: Any, other: Any) -> bool:
    return any(not torch.allclose(x, y, atol=1e-3) for x, y in zip(tensors(one), tensors(other), strict=True))


def footprint(model: nn.Module) -> list[Any]:
    """What instrumentation could leave behind: hooks, an instance's own forward, state."""
    kinds = [kind for kind in vars(model) if kind.endswith("_hooks")]
    modules = [
        (name, [len(getattr(module, kind)) for kind in kinds], "forward" in vars(module), module.training)
        for name, module in model.named_modules()
    ]
    return [modules, [(key, tuple(value.shape)) for key, value in model.state_dict().items()]]


@contextmanager
def removing(hooks: Iterable[Any]) -> Iterator[None]:
    hooks = list(hooks)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def image_with_and_without_a_change(vit: vitreg.Backbone, row: int, column: int) -> Tensor:
    """(2, 3, h, w): an image, and the same with one of its patches inverted."""
    both = images(vit, 1).repeat(2, 1, 1, 1)
    height, width = vit.anatomy.patch_size
    both[1, :, row * height : (row + 1) * height, column * width : (column + 1) * width] *= -1
    return both


def most_changed(one: Tensor, other: Tensor) -> int:
    """The token (n, d) that differs most."""
    return int((one - other).norm(dim=-1).argmax())


def residuals(vit: vitreg.Backbone, batch: Tensor) -> Tensor:
    """(l, b, n, d) after each block, by ordinary hooks."""
    seen: list[Tensor] = []
    blocks = vit.anatomy.block_modules(vit.model)
    hooks = [b.register_forward_hook(lambda *a: seen.append(first_tensor(a[2]).clone())) for b in blocks]
    with removing(hooks), torch.no_grad():
        vit(batch)
    return torch.stack(seen)


def activations(vit: vitreg.Backbone, layer: int, batch: Tensor) -> tuple[Tensor, Tensor]:
    """(b, n, f) before the edit, and what really enters the down-projection."""
    before: list[Tensor] = []
    after: list[Tensor] = []
    down = vit.anatomy.down_projections(vit.model)[layer]

    class Linears(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            given = [*args, *kwargs.values()]
            if func is F.linear and given[1] is down.weight:
                after.append(given[0].clone())
            return func(*args, **kwargs)

    hook = down.register_forward_pre_hook(lambda module, args: before.append(args[0].clone()), prepend=True)
    with removing([hook]), torch.no_grad(), Linears():
        vit(batch)
    return before[0], after[0]
