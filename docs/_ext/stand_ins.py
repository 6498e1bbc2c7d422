"""What the pages' code finds when it is run: small phantoms for models, and folders with drawn photos."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

import vitreg
import vitreg.models.loading
import vitreg.phantoms.bundled
from vitreg.data.shapes import CLASSES

PHOTOS = 24


@dataclass(frozen=True)
class Workshop:
    """A folder with all that pages name, and the models that stand in for those of the hubs."""

    folder: Path

    @classmethod
    def made(cls, folder: Path) -> "Workshop":
        """Plant a phantom, draw photos, find a fix: once for all pages."""
        vit, scenes = vitreg.example(PHOTOS)
        (folder / "photos").mkdir()
        for i, scene in enumerate(scenes):
            scene.photo.save(folder / "photos" / f"{i:02}.png")
            for split in ("train", "val"):
                place = folder / "classes" / split / CLASSES[scene.label]
                place.mkdir(parents=True, exist_ok=True)
                scene.photo.save(place / f"{i:02}.png")
        photos = vitreg.read_images(folder / "photos", vit)
        phantom = vitreg.plant(vit, [batch.pixels for batch in photos], 3)
        save_planted(phantom.vit.model, folder / "my-model")
        report = vitreg.diagnose(phantom.vit, photos)
        neurons = vitreg.find_register_neurons(phantom.vit, photos, report)
        fix = vitreg.TokenSplitting.calibrate(phantom.vit, photos, neurons)
        fix.save(folder / "my-fix", vit=phantom.vit)
        return cls(folder)

    def stand_in(self, patch: pytest.MonkeyPatch) -> None:
        """Names of hub models give the phantom, until `patch` is undone."""
        load, create = vitreg.models.loading.load, timm.create_model

        def loaded(name: str, **options: Any) -> vitreg.Backbone:
            if options.get("random_weights") or not name.startswith(("timm:", "hf:", "open_clip:")):
                return load(name, **options)
            options.pop("size", None)
            return load("my-model", **options)

        def created(name: str, pretrained: bool = False, **options: Any) -> torch.nn.Module:
            if pretrained and not name.startswith("local-dir:"):
                return create("local-dir:my-model", pretrained=True)
            return create(name, pretrained=pretrained, **options)

        patch.setattr(vitreg.models.loading, "load", loaded)
        patch.setattr(vitreg, "load", loaded)
        patch.setattr(timm, "create_model", created)


def save_planted(model: torch.nn.Module, folder: Path) -> None:
    """The bundled example's folder with other weights, as `vitreg.load` reads it."""
    shutil.copytree(
        vitreg.phantoms.bundled.__path__[0], folder, ignore=shutil.ignore_patterns("*.py*", "__*")
    )
    save_file(model.state_dict(), folder / "model.safetensors")
