"""Every name of torch that is not public and that vitreg needs, each with what it is needed for.

tests/hooks/test_torch_internals.py tries each of them: with a new torch it says which one moved.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from vitreg.hooks.rows import end_of_pass

__all__ = [
    "WeakTensorKeyDictionary",
    "compiled_model_of",
    "forget_hook",
    "forget_output_hooks",
    "forget_pre_hook",
    "has_hooks",
    "in_backward",
    "is_compiled",
    "is_replica",
    "pre_hooks",
    "tree_leaves",
    "tree_map_only",
    "uncompiled",
]

_COMPILED_CALL = "_compiled_call_impl"  # set by module.compile()


def in_backward() -> bool:
    """Whether autograd runs this: gradient checkpointing computes a block again, or a hook of a gradient."""
    return torch._C._current_graph_task_id() != -1


def compiled_model_of(model: nn.Module) -> nn.Module:
    """The model that torch.compile(model) was given; any other model itself."""
    original: nn.Module = getattr(model, "_orig_mod", model)
    return original


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile(module) made this module, or module.compile() was called on it."""
    return hasattr(module, "_orig_mod") or getattr(module, _COMPILED_CALL, None) is not None


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """The model without what `module.compile()` made of its parts, for as long as one looks inside."""
    calls = {m: m.__dict__.pop(_COMPILED_CALL) for m in model.modules() if _COMPILED_CALL in m.__dict__}
    try:
        yield
    finally:
        for module, call in calls.items():
            module.__dict__[_COMPILED_CALL] = call


def is_replica(module: nn.Module) -> bool:
    """Whether nn.DataParallel made this module for one of its devices, in one pass."""
    return getattr(module, "_is_replica", False)


def pre_hooks(module: nn.Module) -> list[Any]:
    """The forward pre-hooks of a module."""
    return list(module._forward_pre_hooks.values())


def has_hooks(module: nn.Module) -> bool:
    """Whether a forward hook, before or behind it, is on this module."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def forget_pre_hook(module: nn.Module, hook: Any) -> None:
    """Remove a forward pre-hook whose handle is lost: a copied module has its hooks, and no handles."""
    for key in [key for key, own in module._forward_pre_hooks.items() if own is hook]:
        del module._forward_pre_hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)


def forget_hook(module: nn.Module, hook: Any) -> None:
    """Remove a forward hook whose handle is lost."""
    for key in [key for key, own in module._forward_hooks.items() if own is hook]:
        del module._forward_hooks[key]
        module._forward_hooks_always_called.pop(key, None)


def forget_output_hooks(model: nn.Module) -> None:
    """Remove all forward hooks of a model and its parts: a copy does not show its outputs to watchers."""
    for module in model.modules():
        for hook in list(module._forward_hooks.values()):
            if hook is not end_of_pass:
                forget_hook(module, hook)
