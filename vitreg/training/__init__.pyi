from .exporting import export
from .loop import Machine, Run, train
from .objective import Objective
from .recipe import Recipe, find_recipe

__all__ = [
    "Machine",
    "Objective",
    "Recipe",
    "Run",
    "export",
    "find_recipe",
    "train",
]
