"""Hooks of modules that are removed again, whatever happens in between.

A single handle is a context manager of its own: `with module.register_forward_hook(saw): ...`.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch.utils.hooks import RemovableHandle


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """While entered, the hooks are there. If one cannot be registered, those before it are removed too."""
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield
