"""Words and tables that several results print."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


PHANTOM = "a phantom: its artifacts were planted"


def called(model: str, planted: bool) -> str:
    """A model's name; a phantom, whose artifacts were planted, is called one."""
    return f"{model} ({PHANTOM})" if planted else model
