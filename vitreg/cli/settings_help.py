"""What `vitreg eval TASK --help` and `vitreg train RECIPE --help` add: the settings, with their defaults."""

from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from typing import Any

from vitreg.cli.help import Panels
from vitreg.evals.tasks import TASKS, Task


def task_panels(typed: Sequence[str]) -> Panels:
    """The tasks; if one was typed, that one and its settings."""
    asked = next((word for word in typed if word in TASKS), None)
    if asked is None:
        return {"Tasks": [(x.name, f"{x.about}. DATA: {x.data}.") for x in TASKS.values()]}
    task = TASKS[asked]
    about = [(task.name, f"{task.about}. DATA: {task.data}.")]
    return {"The task": about, f"Settings of {task.name} (--set KEY=VALUE)": _settings(task)}


def recipe_panels(typed: Sequence[str]) -> Panels:
    """If a bundled recipe was typed: what it trains, what to expect, what it costs, and its settings."""
    from vitreg.training.recipe import bundled, find_recipe

    asked = next((word for word in typed if word in bundled()), None)
    if asked is None:
        return {}
    recipe = find_recipe(asked)
    words = ("about", "expected", "cost")
    settings = [
        (field.name, _written(getattr(recipe, field.name)))
        for field in fields(recipe)
        if field.name not in words
    ]
    said = [(word, getattr(recipe, word)) for word in words]
    return {"The recipe": said, f"Settings of {asked} (--set KEY=VALUE)": settings}


def _settings(task: Task) -> list[tuple[str, str]]:
    """Each setting of a task with its default; what the machine is told has options of its own."""
    from vitreg.features.config import Config

    shared = {field.name for field in fields(Config)} - {"seed"}
    return [(field.name, _default(field)) for field in fields(task.config) if field.name not in shared]


def _default(field: "Field[Any]") -> str:
    if field.default is MISSING:
        return "required" if field.default_factory is MISSING else _written(field.default_factory())
    return _written(field.default)


def _written(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"default: {','.join(map(str, value)) or 'none'}"
    return f"default: {'none' if value is None else value}"
