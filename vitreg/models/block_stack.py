"""Where a model keeps its blocks: the first list of modules of one class that hold linear layers."""

from torch import nn

from vitreg.errors import UnsupportedModelError
from vitreg.models.down_projection import is_linear

PASS_AN_ANATOMY = "Pass an Anatomy to override."


def find_block_stack(model: nn.Module) -> str:
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
    for least in (2, 1):  # one block alone is rare, and many things are lists of one
        for name, module in lists:
            if _is_stack(module, least):
                return name
    raise UnsupportedModelError(
        f"found no stack of transformer blocks in {type(model).__name__}: no ModuleList or Sequential of"
        f" modules of one class with at least 2 linear layers each. {PASS_AN_ANATOMY}"
    )


def _is_stack(module: nn.Module, least: int) -> bool:
    children = list(module.children())
    # By name: of blocks of one class, FSDP or a fix may have given some a subclass of that name.
    one_class = len({type(child).__name__ for child in children}) == 1
    return len(children) >= least and one_class and all(count_linears(child) >= 2 for child in children)


def blocks_in(stack: nn.Module) -> list[nn.Module]:
    """The blocks of a stack: its children, or those of its chunks, which are lists of blocks themselves.

    Chunks of sharded training hold nothing in the places of the blocks before theirs.
    """
    children = list(stack.children())
    chunks = [[part for part in child.children() if type(part) is not nn.Identity] for child in children]
    blocks = [block for chunk in chunks for block in chunk]
    chunked = all(isinstance(child, nn.ModuleList | nn.Sequential) for child in children) and all(chunks)
    one_class = len({type(block).__name__ for block in blocks}) == 1
    # Four linear layers at least: q, k, v (or all in one), out, up, down.
    return blocks if chunked and one_class and min(map(count_linears, blocks)) >= 4 else children


def count_linears(module: nn.Module) -> int:
    """How many linear layers are in a module."""
    return sum(map(is_linear, module.modules()))


def holds_blocks(module: nn.Module) -> bool:
    """Whether a module of the stack is itself a stage: a list of things with attention and an MLP."""
    stacks = [m for m in module.modules() if isinstance(m, nn.ModuleList | nn.Sequential) and len(m) > 1]
    # Four linear layers at least: q, k, v (or all in one), out, up, down.
    return any(min(map(count_linears, stack.children())) >= 4 for stack in stacks)
