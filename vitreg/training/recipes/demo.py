"""The ViT of `vitreg demo`, from nothing but drawn photos.

    vitreg train demo -o run/ --precision bf16-mixed

No data are needed. The folder run/model/ is what vitreg/phantoms/bundled/ holds.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import build_sincos2d_pos_embed
from timm.models import save_for_hf
from torch import Tensor, nn
from torchvision.transforms.functional import normalize, to_tensor

from vitreg.data.shapes import CLASSES, draw
from vitreg.models.backbone import wrap
from vitreg.phantoms.bundled import HELD_OUT, measure, scenes
from vitreg.training.objective import Objective
from vitreg.training.recipe import Recipe

HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Shapes(Recipe):
    """Classification of drawn shapes, by the CLS token and, beside it, by every patch.

    photos         drawn photos in an epoch; each epoch draws new ones
    patch_loss     weight of the cross-entropy of patches, which learn what they lie on: one of the shapes,
                   or the ground
    patch_drop     share of the patches that are left out in training, which saves as much time
    held_out       photos for the evaluation
    """

    needs: ClassVar[str] = ""
    photos: int = 100_000
    patch_loss: float = 1.0
    patch_drop: float = 0.5
    held_out: int = 500

    def objective(self) -> "ShapesObjective":
        return ShapesObjective(self)


class Drawn:
    """Items (pixels (3, h, w), label, mask (h, w)), drawn by a seed from numpy's global generator."""

    def __init__(self, length: int, size: int) -> None:
        self.length, self.size = length, size

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, int, Tensor]:
        scene = draw(int(np.random.randint(2**31)), self.size)
        return _pixels(scene.photo), scene.label, torch.from_numpy(scene.mask)


def _pixels(photo: Any) -> Tensor:
    return normalize(to_tensor(photo), HALF, HALF)


class ShapesObjective(Objective):
    """A ViT with its head, and a head for patches that is thrown away after training."""

    def __init__(self, recipe: Shapes) -> None:
        super().__init__()
        self.recipe = recipe
        vit: Any = recipe.build(len(CLASSES))
        vit.patch_drop = self.dropped = _Dropped(recipe.patch_drop, vit.num_prefix_tokens)
        self.vit, self.grid = vit, vit.patch_embed.grid_size
        places = build_sincos2d_pos_embed(list(self.grid), vit.embed_dim, interleave_sin_cos=False)
        with torch.no_grad():  # places known from the start; they are trained on
            vit.pos_embed[0, -vit.patch_embed.num_patches :] = 0.3 * places.flatten(0, -2)
        self.patch_head = nn.Linear(vit.embed_dim, len(CLASSES) + 1)
        self.dataset = Drawn(recipe.photos, recipe.image_size)
        shown = [_pixels(scene.photo) for scene in scenes(64)]
        self.photos = list(torch.stack(shown).split(32))

    def forward(self, batch: Any) -> dict[str, Tensor]:
        """Losses and top-1 of (b, 3, h, w) pixels, (b,) labels and (b, h, w) masks."""
        pixels, labels, masks = batch
        vit: Any = self.vit
        tokens = vit.forward_features(pixels)
        logits = vit.forward_head(tokens).float()
        loss = F.cross_entropy(logits, labels)
        cover = F.adaptive_avg_pool2d(masks[:, None].float(), self.grid).flatten(1)
        classes = torch.where(cover > 0.4, labels[:, None], len(CLASSES))
        if self.dropped.kept is not None:
            classes = classes.gather(1, self.dropped.kept)
        patches = self.patch_head(tokens[:, vit.num_prefix_tokens :]).float()
        patch_loss = F.cross_entropy(patches.flatten(0, 1), classes.flatten())
        return {
            "loss": loss + self.recipe.patch_loss * patch_loss,
            "cls_loss": loss,
            "patch_loss": patch_loss,
            "train_top1": 100 * (logits.argmax(-1) == labels).float().mean(),
        }

    def evaluate(self) -> dict[str, float]:
        """Top-1 and the share of CLS attention on the object, in per cent, on held-out photos."""
        vit = wrap(self.vit, _pixels, image_size=self.recipe.image_size)
        found = measure(vit, scenes(self.recipe.held_out, HELD_OUT))
        return {"top1": 100 * found.top1, "attention_on_object": 100 * found.on_object}

    def finish(self, out: Path) -> dict[str, Path]:
        """The ViT in timm's folder format, in float16, with the shapes' names."""
        config = {
            "label_names": CLASSES,
            "pretrained_cfg": {"tag": "vitreg_demo"},
        }  # not that of timm's weights
        data = {"crop_pct": 1.0, "mean": HALF, "std": HALF}
        save_for_hf(self.vit.half(), out / "model", config, safe_serialization=True, data_config=data)
        return {"model": out / "model"}


class _Dropped(nn.Module):
    """In training keeps a random share of the patches, and notes which, (b, k); else all, and None.

    The `prefix` tokens stay. timm's own says which in some of its versions only.
    """

    kept: Tensor | None = None

    def __init__(self, share: float, prefix: int) -> None:
        super().__init__()
        self.share, self.prefix = share, prefix

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            self.kept = None
            return x
        photos, patches = x.shape[0], x.shape[1] - self.prefix
        order = torch.rand(photos, patches, device=x.device).argsort(1)
        self.kept = order[:, : patches - int(self.share * patches)]
        chosen = self.kept[:, :, None].expand(-1, -1, x.shape[2])
        return torch.cat([x[:, : self.prefix], x[:, self.prefix :].gather(1, chosen)], 1)


recipe = Shapes(
    about="ViT (width 128, depth 6, patch 8) on drawn photos of 12 shapes at 96 px",
    expected="top-1 on 500 other drawn photos 89.6% (chance 8%), 31% of the CLS attention on the object,"
    " which is 15% of the area; no outliers",
    cost="under an hour of one CPU core, and of another for the drawing (EPYC, bf16-mixed)",
    model="vit_tiny_patch16_224",
    model_args={"patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4},
    image_size=96,
    batch_size=32,
    steps=10_000,
    warmup=200,
    lr=1e-3,
    betas=(0.9, 0.98),
    log_every=100,
    diagnose_every=1000,
    evaluate_every=1000,
    checkpoint_every=500,
)
