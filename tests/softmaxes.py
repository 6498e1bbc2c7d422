"""What a model's own attention computes, seen from outside of vitreg."""

from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode


class Softmaxes(TorchFunctionMode):
    """Keeps what each softmax of a model gives."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.__name__ == "softmax":
            self.results.append(result)
        return result
