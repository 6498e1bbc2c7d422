"""Edit a block's neurons, which are what enters the module at the MLP's down-projection.

    y = edited(block, "mlp.fc2", lambda activation: activation * 0, partial(block.forward, x))

A hook of that module asks, in its own thread, which edits run now. So whatever the module is (a linear layer,
one with a low-rank path, a quantised or an offloaded one, a compiled one), all of it sees the edited neurons.
The hook is there for as long as a fix is on the block, and costs next to nothing while no edit runs.
"""

import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitreg.errors import UnsupportedModelError
from vitreg.hooks.torch_internals import forget_pre_hook, in_backward, pre_hooks

NeuronEdit = Callable[[Float[Tensor, "b n f"]], Float[Tensor, "b n f"]]

_LISTENS = "_vitreg_listens"
_BASE = "_vitreg_listening_base"


class _Edits:
    """The edits that run in one thread, the innermost last.

    A plain object in a thread-local: Dynamo drops what a compiled region writes to a thread-local itself.
    """

    def __init__(self) -> None:
        self.running: list[_Editing] = []


class _Thread(threading.local):
    def __init__(self) -> None:
        self.edits = _Edits()


_this_thread = _Thread()


class _Editing:
    """One edit that runs, of the neurons that enter one module."""

    def __init__(self, module: nn.Module, edit: NeuronEdit) -> None:
        self.module, self.edit, self.seen = module, edit, False

    def of(self, module: nn.Module, activation: Tensor) -> Tensor:
        """What enters `module` in place of an activation."""
        if module is not self.module:
            return activation
        self.seen = True
        return self.edit(activation)


def edited(
    block: nn.Module, down: str, edit: NeuronEdit, run: Callable[[], Float[Tensor, "b n d"]]
) -> Float[Tensor, "b n d"]:
    """What `run` returns while a block's neurons are edited, in this thread.

    `edit` maps what enters the module at `down`, a dotted path within the block, (b, n, f), to something
    else, out of place. Raises UnsupportedModelError if `run` did not call the module.
    """
    module = listen(block, down)  # again, for another may have taken its place since (PEFT does that)
    editing, running = _Editing(module, edit), _this_thread.edits.running
    running.append(editing)
    # No context manager of our own: where Dynamo breaks a graph it would leave and enter it again.
    try:
        y = run()
    finally:
        running.pop()
    if not editing.seen:
        raise UnsupportedModelError(
            f"the block did not call its {type(module).__name__} that leads down from the neurons (a fused"
            " kernel does the MLP in one step, perhaps), so that they cannot be edited. Switch that kernel"
            " off."
        )
    return y


def listen(block: nn.Module, down: str) -> nn.Module:
    """Let the module at a path within a block, which is returned, ask for edits from now on.

    Dynamo does not guard a graph by hooks, but by classes. So the module's parent, whose graph it is, gets a
    subclass of its own class of the same name (a block has one already).
    """
    module = _module_at(block, down)
    if _LISTENS in module.__dict__:
        return module
    module.__dict__[_LISTENS] = True
    if _ask not in pre_hooks(module):  # PyTorch's quantisation copies hooks alone
        module.register_forward_pre_hook(_ask, with_kwargs=True)
    parent = block.get_submodule(down.rpartition(".")[0])
    if parent is not block and not hasattr(parent, _BASE):
        parent.__class__ = _noticed(type(parent))  # type: ignore[arg-type]  # mypy: no hash
    return module


def _module_at(block: nn.Module, path: str) -> nn.Module:
    """As `get_submodule`, which checks more at each step: this is asked in every pass."""
    module: nn.Module | None = block
    for name in path.split("."):
        module = module._modules.get(name) if module is not None else None
    return module if module is not None else block.get_submodule(path)


def stop_listening(block: nn.Module) -> None:
    """No module of a block asks for edits any more."""
    for module in block.modules():
        if module.__dict__.pop(_LISTENS, False):
            forget_pre_hook(module, _ask)
        if _BASE in vars(type(module)):
            module.__class__ = getattr(type(module), _BASE)


@cache
def _noticed(base: Any) -> Any:
    """A subclass that does nothing but to be another class."""

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        return _restore, (base,), self.__dict__

    body = {"__reduce_ex__": reduce, "__module__": base.__module__, "__doc__": base.__doc__, _BASE: base}
    return type(base.__name__, (base,), body)


def _restore(base: Any) -> Any:
    return base.__new__(_noticed(base))


def _ask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
    running = _this_thread.edits.running
    if not running:
        _refuse_recomputing()
        return None
    for edit in reversed(running):
        if args:
            args = (edit.of(module, args[0]), *args[1:])
        elif kwargs:
            name = next(iter(kwargs))
            kwargs = kwargs | {name: edit.of(module, kwargs[name])}
    return args if kwargs is None else (args, kwargs)


def recomputing() -> bool:
    """Whether a backward pass is computing this again."""
    return not torch.compiler.is_compiling() and in_backward()


def _refuse_recomputing() -> None:
    """Gradient checkpointing inside of a block runs the MLP again, but not the block around it."""
    if recomputing():
        raise UnsupportedModelError(
            "the MLP of a fixed block is computed again on its own: gradient checkpointing within the block."
            " Checkpoint whole blocks."
        )
