"""The supervised regime, as in DeiT-III: labelled photos, timm's losses, Mixup and 3-Augment.

Touvron et al., DeiT III: Revenge of the ViT, 2022.
"""

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from timm.data import Mixup, create_transform, resolve_model_data_config
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from vitreg.data.datasets.classes import by_wordnet, splits
from vitreg.data.images import read_images
from vitreg.data.listing import warn_of
from vitreg.errors import DataError
from vitreg.fixes.added_registers import add_registers
from vitreg.models.backbone import wrap
from vitreg.models.head import class_names, find_readout
from vitreg.models.loading import load
from vitreg.training.data import TrainingPhotos, watched
from vitreg.training.objective import Objective
from vitreg.training.recipe import Recipe
from vitreg.training.tuned_model import top1, write_tuned


@dataclass(frozen=True)
class Supervised(Recipe):
    """Classification of `data`/train/CLASS/*.jpg, measured on `data`/val.

    augment        "3a" (3-Augment), another policy of timm's ("rand-m9-mstd0.5"), or "" for crop and flip
    crop           "rrc" (random resized crop) or "rkrr" (with crop_scale=1 nearly DeiT-III's simple crop:
                   resize, then crop at random)
    crop_scale     the smallest share of the photo that a random resized crop keeps
    loss           "bce" (a yes or no for each class that a photo has part in, as DeiT-III on ImageNet-1k) or
                   "ce"
    drop_path      stochastic depth: the share of blocks that are skipped
    pretrained     the model to tune, with its own head; registers are then added to it
    """

    needs: ClassVar[str] = "train/CLASS/ and val/CLASS/ of photos"
    augment: str = "3a"
    color_jitter: float = 0.3
    crop: str = "rrc"
    crop_scale: float = 0.08
    mixup: float = 0.8
    cutmix: float = 1.0
    smoothing: float = 0.0
    loss: str = "ce"
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("loss", ("ce", "bce")), ("crop", ("rrc", "rkrr", "rkrc"))):
            if (found := getattr(self, name)) not in known:
                raise DataError(f"{name}={found}: expected {' or '.join(known)}.")
        if self.pretrained is not None and self.drop_path:
            raise DataError(f"drop_path={self.drop_path}: a pretrained model keeps its own. Leave it out.")

    def objective(self) -> "SupervisedObjective":
        return SupervisedObjective(self)


class SupervisedObjective(Objective):
    """A ViT with its head, and the loss of DeiT-III."""

    def __init__(self, recipe: Supervised) -> None:
        super().__init__()
        train, val = splits(recipe.data)
        self.recipe, self.classes = recipe, len(train.classes)
        self.before = load(recipe.pretrained, size=recipe.image_size) if recipe.pretrained else None
        self.vit = self._model()
        if self.before is not None and self.classes != (own := find_readout(self.before).classes):
            # Its head has other classes, ImageNet's 1000 perhaps: what the photos are called there.
            names = class_names(self.before)
            self.classes, train = own or 0, by_wordnet(Path(recipe.data) / "train", own or 0, names)
        data = resolve_model_data_config(self.vit) | {"input_size": (3, recipe.image_size, recipe.image_size)}
        transform = create_transform(
            **data,
            is_training=True,
            auto_augment=recipe.augment or None,
            color_jitter=recipe.color_jitter,
            train_crop_mode=recipe.crop,
            scale=(recipe.crop_scale, 1.0),
        )
        warn_of({**dict.fromkeys(train.notes), **dict.fromkeys(val.notes)})
        self.dataset = TrainingPhotos(train.paths, transform, train.labels)
        self.preprocess: Any = create_transform(**data, is_training=False)
        self.photos = watched(val.paths, self.preprocess)
        self.mixup = self._mixup()
        self.criterion = self._criterion()

    def _model(self) -> nn.Module:
        recipe = self.recipe
        if self.before is None:
            return recipe.build(self.classes, drop_path_rate=recipe.drop_path)
        model = deepcopy(self.before.model)
        self.before.model.requires_grad_(False)
        if recipe.registers:
            add_registers(model, recipe.registers)
        return model

    def _mixup(self) -> Mixup | None:
        recipe = self.recipe
        if not recipe.mixup and not recipe.cutmix:
            return None
        return Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.smoothing, num_classes=self.classes)

    def _criterion(self) -> nn.Module:
        if self.recipe.loss == "bce":
            # The classes of both photos of a mix are in it. Smoothed targets are above 0 everywhere.
            threshold = None if self.recipe.smoothing else 0.0
            return BinaryCrossEntropy(smoothing=self.recipe.smoothing, target_threshold=threshold)
        return (
            LabelSmoothingCrossEntropy(self.recipe.smoothing)
            if self.mixup is None
            else SoftTargetCrossEntropy()
        )

    def forward(self, batch: Any) -> dict[str, Tensor]:
        """Loss and top-1 (against the photo that has more of the mix) of (b, 3, h, w) pixels, (b,) labels."""
        pixels, labels = batch
        targets = labels
        if self.mixup is not None:
            if len(pixels) % 2:
                raise DataError(
                    f"Mixup and CutMix mix photos in pairs, found {len(pixels)} in a forward pass. Set an"
                    " even micro_batch, or mixup=0 and cutmix=0."
                )
            pixels, targets = self.mixup(pixels, labels)
        logits = self.vit(pixels)
        right = logits.argmax(-1) == (targets.argmax(-1) if targets.ndim == 2 else targets)
        return {"loss": self.criterion(logits.float(), targets), "train_top1": 100 * right.float().mean()}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Top-1 on val, in per cent."""
        vit = wrap(self.vit.eval(), self.preprocess, image_size=self.recipe.image_size)
        return {"top1": top1(vit, self.recipe.data)}

    def finish(self, out: Path) -> dict[str, Path]:
        """Write model/; of a pretrained model also fix/ and verdict.json, before and after on val."""
        if self.before is None:
            return super().finish(out)
        after = wrap(self.vit.eval(), self.preprocess, image_size=self.recipe.image_size)
        images = read_images(Path(self.recipe.data) / "val", self.before, workers=0)
        return write_tuned(self.before, after, images, out)
