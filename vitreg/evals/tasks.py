"""The tasks by name. Their modules are imported when they are run: each needs libraries of its own.

find_task("knn").evaluate(vit, "imagenette/", find_task("knn").config())
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitreg.errors import DataError, MissingExtraError
from vitreg.printing import one_of

if TYPE_CHECKING:  # at run time the list of tasks needs no torch
    from vitreg.evals.result import Result
    from vitreg.features.config import Config
    from vitreg.models.backbone import Backbone


@dataclass(frozen=True)
class Task:
    """A task: its name, what it measures, what its data are, what its settings' class starts with, and
    whether it draws what it found."""

    name: str
    about: str
    data: str
    title: str
    draws: bool = False

    @property
    def module(self) -> Any:
        """Raises MissingExtraError where a library of the `eval` extra is missing."""
        try:
            return import_module(f"vitreg.evals.{self.name.replace('-', '_')}")
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("vitreg"):
                raise
            raise MissingExtraError(str(error.name), "eval") from error

    @property
    def config(self) -> "type[Config]":
        """The class of its settings."""
        found: type[Config] = getattr(self.module, f"{self.title}Config")
        return found

    @property
    def load(self) -> "Callable[..., Backbone]":
        """What builds its models: vitreg.load, or the module's own where a task needs more than a ViT."""
        from vitreg.models.loading import load

        found: Callable[..., Backbone] = getattr(self.module, "load", load)
        return found

    @property
    def evaluate(self) -> "Callable[[Backbone, str | Path, Any], Result]":
        found: Callable[[Backbone, str | Path, Any], Result] = self.module.evaluate
        return found


_CLASSES = "a folder with train/CLASS/... and val/CLASS/..."
_PHOTOS = "a folder of photos"
_MASKS = "a VOC or ADE20k folder, or images/ and masks/ (in train/ and val/, if there are two)"
_VOC = "VOC, or gtsegs_ijcv.mat"

TASKS = {
    task.name: task
    for task in (
        Task("classification", "the model's own head", "photos named by WordNet ids", "Classification"),
        Task("knn", "k nearest neighbours of features", _CLASSES, "Knn"),
        Task("linear", "a linear classifier on features", _CLASSES, "Linear"),
        Task("tokens", "what single tokens know of the class", _CLASSES, "Tokens"),
        Task("position", "where a patch is, read from its token", _PHOTOS, "Position"),
        Task("reconstruction", "a patch's pixels, read from its token", _PHOTOS, "Reconstruction"),
        Task("discovery", "object discovery: LOST and TokenCut", "a VOC or COCO folder", "Discovery", True),
        Task("segmentation", "a linear segmentation head", _MASKS, "Segmentation", True),
        Task("zero-shot-segmentation", "CLS attention as a heatmap", _VOC, "Heatmap", True),
        Task("depth", "a linear depth head", "images/ and depth/, or an NYUd folder", "Depth", True),
        Task("zero-shot", "classes by open_clip's text tower", "photos named by WordNet ids", "ZeroShot"),
        Task("vlm", "attention of a language model to image tokens", _PHOTOS, "Vlm"),
    )
}  # fmt: skip


def find_task(name: str) -> Task:
    """Raises DataError for an unknown name, with the nearest."""
    if name not in TASKS:
        raise DataError(f"there is no task {name!r}. {one_of(name, TASKS)}")
    return TASKS[name]


def evaluate(task: str, vit: "Backbone", data: str | Path, config: "Config | None" = None) -> "Result":
    """Run one task on a model, with whatever fix is applied to it."""
    found = find_task(task)
    return found.evaluate(vit, data, config or found.config())
