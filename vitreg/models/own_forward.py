"""A model that is run by another function than its own call.

    run = own_forward(model, model.forward_features)          # a method of the model, or of a part of it
    run = own_forward(model, lambda model, images: ...)       # a function of the model and the images
    run(images); run.on(copy)(images)

Both can run a copy of the model as well. A function of the images alone cannot: nobody knows which model it
runs.
"""

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from vitreg.models.probe import Forward

OfModel = Callable[[nn.Module, Tensor], Any]


class ModelForward:
    """A function of a model and of images (b, 3, h, w), with the model that it runs."""

    def __init__(self, function: OfModel, model: nn.Module) -> None:
        self._function, self._model = function, model

    def __call__(self, images: Tensor) -> Any:
        return self._function(self._model, images)

    def on(self, model: nn.Module) -> "ModelForward":
        """The same function of another instance of the model."""
        return ModelForward(self._function, model)


def own_forward(model: nn.Module, forward: Forward | OfModel | None) -> Forward | None:
    """What runs the model, as a ModelForward where it can run copies, too."""
    if forward is None:
        return None
    owner = getattr(forward, "__self__", None)
    paths = [name for name, part in model.named_modules() if part is owner]
    if paths:
        method = forward.__name__
        return ModelForward(lambda copy, images: getattr(copy.get_submodule(paths[0]), method)(images), model)
    return ModelForward(forward, model) if _takes_two(forward) else forward  # type: ignore[arg-type, return-value]


def _takes_two(function: Any) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    needed = [x for x in parameters if x.default is x.empty and x.kind <= x.POSITIONAL_OR_KEYWORD]
    return len(needed) == 2
