"""An explorer of a small phantom, whose neurons are known, on photos of a few hundred pixels."""

from pathlib import Path

from phantoms import Planted, save_crops

import vitreg
from vitreg.app.explorer import Explorer


def small_explorer(folder: Path, *, prepared: bool = True) -> Explorer:
    """Of a phantom of a random model of 4 x 5 patches, on 40 photos."""
    photos = save_crops(folder / "photos", 40)
    vit = Planted(photos).vit
    explorer = Explorer(vit, vitreg.read_images(photos, vit))
    if prepared:
        explorer.prepare()
    return explorer
