"""Photos whose flat patches are known, and what a diagnosis of them finds of one kind."""

from typing import Any

import torch
from catalog import Entry, hf_entry, timm_entry
from phantoms import crops
from torch import Tensor

import vitreg
from vitreg.diagnosis.diagnosing import collect
from vitreg.diagnosis.kinds import Context

# Models with a grid of 8 x 10: ten times an even share is half of all attention on the catalog's 4 x 5.
LARGER = (64, 80)
LARGER_GRID: dict[str, Entry] = {
    "timm vit": timm_entry("vit_small_patch16_224", size=LARGER),
    "timm deit distilled": timm_entry("deit_small_distilled_patch16_224", prefix=2, size=LARGER),
    "timm dinov2 registers": timm_entry("vit_small_patch14_reg4_dinov2", registers=4, size=LARGER),
    "timm siglip": timm_entry("vit_base_patch16_siglip_224", prefix=0, size=LARGER),
    "hf dinov2": hf_entry("Dinov2Model", "Dinov2Config", size=LARGER),
    "hf clip": hf_entry("CLIPVisionModel", "CLIPVisionConfig", size=LARGER),
}


def scenes(vit: vitreg.Backbone, count: int, seed: int, flat: int = 1) -> Tensor:
    """Noisy crops of photos, (count, 3, h, w) in -1 to 1, `flat` patches of each of one colour."""
    generator = torch.Generator().manual_seed(seed)
    photos = crops(vit, count, seed)
    photos = (photos + torch.rand(photos.shape, generator=generator) * 2 - 1) / 2
    height, width = vit.anatomy.patch_size
    for photo in photos:
        for patch in torch.randperm(vit.layout.patches, generator=generator)[:flat].tolist():
            row, column = divmod(patch, vit.layout.grid[1])
            cell = photo[:, row * height : (row + 1) * height, column * width : (column + 1) * width]
            cell.copy_(torch.rand(3, 1, 1, generator=generator).expand_as(cell) * 2 - 1)
    return photos


def findings(vit: vitreg.Backbone, images: Tensor) -> dict[str, Any]:
    """What is found of each kind, where no norm is taken for an outlier's."""
    context = Context(len(images), (None,) * vit.anatomy.depth)
    found = [meter.finding(context) for meter in collect(vit, [images], 0).meters]
    return {finding.kind: finding for finding in found}


def finding(vit: vitreg.Backbone, images: Tensor, kind: str) -> Any:
    """What is found of one kind."""
    return findings(vit, images)[kind]
