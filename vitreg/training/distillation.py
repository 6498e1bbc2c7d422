"""Registers for a model one already has: self-distillation from its own denoised features (PH-Reg).

The teacher is the model itself under a fix that needs no training: its patch features are the median over
shifted and flipped views (ShiftAverage), or those of any saved fix. The student is the same model with
registers; it learns to have such features in one pass. After Chen et al., Vision Transformers with
Self-Distilled Registers, 2025, whose teacher is the mean over views.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.transforms import v2

from vitreg.data.images import read_images
from vitreg.data.listing import photos_in
from vitreg.errors import DataError
from vitreg.features.framing import normalisation_of
from vitreg.fixes import Fix, ShiftAverage, load_fix
from vitreg.fixes.added_registers import add_registers
from vitreg.models.backbone import Backbone
from vitreg.models.head import find_readout, logits_of
from vitreg.models.loading import load
from vitreg.models.positions import position_table
from vitreg.models.probe import first_tensor
from vitreg.training.data import TrainingPhotos, watched
from vitreg.training.objective import Objective
from vitreg.training.recipe import Recipe
from vitreg.training.register_init import initial_registers
from vitreg.training.tuned_model import top1, write_tuned

PARTS = ("positions", "patches", "last block", "all")


@dataclass(frozen=True)
class Distillation(Recipe):
    """Self-distillation of the `pretrained` model on the photos below `data`; labels are not needed.

    teacher     "shift-average", or a folder or hub id of a saved fix, such as token splitting
    views       shifted and flipped copies of each photo that a shift-average teacher sees beside it
    train       what the student learns beside its registers
    seeded      registers start as the tokens that most often become outliers, whose positions start as
                those of their neighbours: what they were used for has a place to go
    cls, logits weights of the loss on CLS and on the prediction, which the teacher has from the photo itself
    crop_scale  the smallest share of the photo that a random crop keeps
    val         labelled photos to measure top-1 and the verdict on; without them, the verdict is on `data`
    """

    teacher: str = "shift-average"
    views: int = 8
    train: tuple[str, ...] = ("positions", "patches", "last block")
    seeded: bool = True
    cls: float = 1.0
    logits: float = 1.0
    crop_scale: float = 0.5
    val: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pretrained is None:
            raise DataError("pretrained is not set: expected the model that gets registers.")
        if odd := [part for part in self.train if part not in PARTS]:
            raise DataError(f"train={odd[0]!r}: expected some of {', '.join(PARTS)}.")

    def objective(self) -> "DistillationObjective":
        return DistillationObjective(self)


class DistillationObjective(Objective):
    """A frozen teacher and a student that starts as the same model."""

    def __init__(self, recipe: Distillation) -> None:
        super().__init__()
        assert recipe.pretrained is not None
        self.recipe = recipe
        self.before, teacher, student = (load(recipe.pretrained, size=recipe.image_size) for _ in range(3))
        paths = photos_in(Path(recipe.data))
        self.dataset = TrainingPhotos(paths, _transform(student, recipe.crop_scale))
        assert self.before.preprocess is not None
        self.photos = watched(photos_in(Path(recipe.val)) if recipe.val else paths, self.before.preprocess)
        self.vit, self.student = student.model, student
        self._prepare_student()
        self.teacher, self._target = teacher.model.requires_grad_(False), teacher
        _teacher_fix(recipe).apply(teacher)
        self.predicts = bool(find_readout(self.before).classes)

    def _prepare_student(self) -> None:
        """Registers in, and gradients for what is trained alone."""
        recipe, vit = self.recipe, self.student
        initial = (
            initial_registers(vit, list(self.photos), recipe.registers)
            if recipe.seeded and recipe.registers
            else None
        )
        vit.model.requires_grad_(False)
        for part in recipe.train:
            for parameter in _part(vit, part):
                parameter.requires_grad_(True)
        if recipe.registers:
            add_registers(vit, recipe.registers, **({} if initial is None else {"initial": initial}))

    def train(self, mode: bool = True) -> "DistillationObjective":
        """Both models stay in evaluation mode: the student learns to be a function, without dropout."""
        return super().train(False)

    def forward(self, batch: Float[Tensor, "b 3 h w"]) -> dict[str, Tensor]:
        """1 - cosine plus squared error of tokens normalised after the last block; the same of CLS."""
        recipe, layout = self.recipe, self._target.layout
        with torch.no_grad():
            wanted, truth = _last_block(self._target, batch)
        found, output = _last_block(self.student, batch)
        wanted, found = (F.layer_norm(x.float(), x.shape[-1:]) for x in (wanted, found))
        cosine = F.cosine_similarity(found, wanted, dim=-1)
        error = (found - wanted).square().mean(-1)
        distance = 1 - cosine + error  # (b, n)
        patches = distance[:, layout.patch_slice].mean()
        losses = {"patches": patches, "cosine": cosine[:, layout.patch_slice].mean().detach()}
        loss = patches
        if layout.prefix and recipe.cls:
            losses["cls"] = distance[:, layout.prefix_slice].mean()
            loss = loss + recipe.cls * losses["cls"]
        if self.predicts and recipe.logits:
            losses["logits"] = _divergence(truth, output)
            loss = loss + recipe.logits * losses["logits"]
        return {"loss": loss} | losses

    def evaluate(self) -> dict[str, float]:
        """Top-1 on `val` before and after, in per cent; nothing without labelled photos or a head."""
        if self.recipe.val is None or not self.predicts:
            return {}
        return {"top1_before": self._top1_before, "top1": top1(self.student, self.recipe.val)}

    @cached_property
    def _top1_before(self) -> float:
        """The model before the training stays as it is: measured once."""
        assert self.recipe.val is not None
        return top1(self.before, self.recipe.val)

    def finish(self, out: Path) -> dict[str, Path]:
        """Write fix/, verdict.json and model/."""
        images = read_images(self.recipe.val or self.recipe.data, self.before, workers=0)
        return write_tuned(self.before, self.student, images, out)


def _divergence(truth: Any, output: Any) -> Tensor:
    """Kullback-Leibler divergence of the student's prediction from the teacher's, mean over photos."""
    wanted, found = (logits_of(x) for x in (truth, output))
    assert wanted is not None
    assert found is not None
    return F.kl_div(found.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="batchmean")


def _transform(vit: Backbone, crop_scale: float) -> Any:
    """Random crops and flips, normalised as the model's own preprocess does."""
    crop = v2.RandomResizedCrop(vit.image_size, scale=(crop_scale, 1.0), antialias=True)
    return v2.Compose([crop, v2.RandomHorizontalFlip(), normalisation_of(vit)])


def _teacher_fix(recipe: Distillation) -> Fix:
    return ShiftAverage(views=recipe.views) if recipe.teacher == "shift-average" else load_fix(recipe.teacher)


def _part(vit: Backbone, part: str) -> list[nn.Parameter]:
    """The parameters of a part of a model."""
    anatomy, model = vit.anatomy, vit.model
    if part == "last block":
        return list(anatomy.block_modules(model)[-1].parameters())
    if part == "all":
        return list(model.parameters())
    if part == "positions":
        table = position_table(vit)
        return [] if table is None else [table.weight]
    assert anatomy.patch_embedding is not None
    return list(model.get_submodule(anatomy.patch_embedding).parameters())


def _last_block(vit: Backbone, pixels: Tensor) -> tuple[Float[Tensor, "b n d"], Any]:
    """The residual stream after the last block, behind all fixes, and the model's output."""
    seen: list[Tensor] = []

    def saw(module: nn.Module, args: Any, output: Any) -> None:
        tokens = first_tensor(output)
        assert tokens is not None
        seen.append(tokens)

    with vit.anatomy.block_modules(vit.model)[-1].register_forward_hook(saw):
        output = vit(pixels)
    return seen[-1], output
