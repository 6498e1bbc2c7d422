"""A recipe: everything that a training run depends on, as a frozen dataclass that states what to expect.

    recipe = find_recipe("supervised_small")          # or a Python file that holds `recipe = ...`
    recipe = with_settings(recipe, {"registers": "4", "data": "imagenette/"}, "this recipe")
    train(recipe, "run/")

Each regime is a subclass with fields of its own, which builds its objective.
"""

import importlib.util
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, ClassVar

from torch import nn

import vitreg.training.recipes
from vitreg.errors import DataError, VitregError
from vitreg.printing import did_you_mean
from vitreg.training.objective import Objective


@dataclass(frozen=True)
class Recipe(ABC):
    """What all regimes share. Steps are optimizer steps, counted from 1.

    about, expected, cost   in words: what is trained, what came out, and on what machine in what time
    data                    where the training data lie; what they are, the regime's `needs` says
    model, model_args       timm's name of the architecture and arguments for it
    pretrained              None, or the model to start from, as `vitreg.load` takes it
    registers               trainable register tokens
    image_size              side in pixels
    batch_size              photos for one optimizer step: over all processes, with gradients accumulated
    micro_batch             photos for one forward pass; None: as many as come to one process. What is random
                            in a forward pass (mixup, stochastic depth) is drawn for each: give it a number
                            for a run that is the same with another number of processes
    steps, warmup           all steps; those with a rising learning rate, before a half cosine to `min_lr`
    optimizer               timm's name
    clip_grad               the largest gradient norm; None: any
    *_every                 steps between two lines of the log, checkpoints, diagnoses, evaluations; 0: only
                            at the end (log, checkpoint), never (diagnosis), only at the end (evaluation)
    """

    needs: ClassVar[str] = "photos in folders"
    about: str = field(kw_only=True)
    expected: str = field(kw_only=True)
    cost: str = field(kw_only=True)
    data: str = ""
    model: str = "vit_tiny_patch16_224"
    model_args: dict[str, Any] = field(default_factory=dict)
    pretrained: str | None = None
    registers: int = 0
    image_size: int = 224
    batch_size: int = 64
    micro_batch: int | None = None
    steps: int = 1000
    warmup: int = 50
    optimizer: str = "adamw"
    lr: float = 1e-3
    min_lr: float = 1e-6
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    clip_grad: float | None = 1.0
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int = 200
    diagnose_every: int = 200
    evaluate_every: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "steps"):
            if getattr(self, name) < 1:
                raise DataError(f"{name}={getattr(self, name)}: expected 1 or more.")
        if self.micro_batch is not None and (self.micro_batch < 1 or self.batch_size % self.micro_batch):
            raise DataError(
                f"micro_batch={self.micro_batch} does not divide batch_size={self.batch_size}. Choose one"
                " that does, or leave it out."
            )
        for name in ("registers", "seed"):
            if getattr(self, name) < 0:
                raise DataError(f"{name}={getattr(self, name)}: expected 0 or more.")

    @abstractmethod
    def objective(self) -> Objective:
        """What is trained, with its data. Raises DataError where these do not hold together."""

    def build(self, classes: int = 0, **more: Any) -> nn.Module:
        """The ViT to train from scratch, in timm, with timm's own registers, which get no position.

        `classes` is the width of its head (0: none). Raises ModelLoadError for what timm does not have.
        """
        from vitreg.models.loading import build_timm

        return build_timm(
            self.model,
            **{"num_classes": classes, "img_size": self.image_size}
            | ({"reg_tokens": self.registers, "no_embed_class": True} if self.registers else {})
            | more
            | self.model_args,
        )


def bundled() -> list[str]:
    """The names of the recipes that come with vitreg."""
    return sorted(module.name for module in iter_modules(vitreg.training.recipes.__path__))


def find_recipe(name: str | Path) -> Recipe:
    """A bundled recipe by its name, or that of a Python file, which is run. Raises DataError for another."""
    path = Path(name)
    if str(name) in bundled():
        path = Path(vitreg.training.recipes.__path__[0]) / f"{name}.py"
    elif path.suffix != ".py" or not path.is_file():
        raise DataError(
            f"there is no recipe {str(name)!r}.{did_you_mean(str(name), bundled())} Expected a Python file"
            f" that holds `recipe = ...`, or one of {', '.join(bundled())}."
        )
    recipe = getattr(_run(path), "recipe", None)
    if not isinstance(recipe, Recipe):
        raise DataError(f"{path} holds no recipe. Expected `recipe = Supervised(...)` or another regime.")
    return recipe


def _run(path: Path) -> Any:
    name = f"vitreg_recipe_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look up the type hints of a regime that is defined there
    try:
        spec.loader.exec_module(module)
    except VitregError:
        raise
    except Exception as error:  # it is anybody's code
        raise DataError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    return module
