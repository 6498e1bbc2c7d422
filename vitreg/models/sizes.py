"""Image sizes: what a user asks for, what a model's configuration says, what a preprocess gives of photos.

The three may disagree. What the preprocess gives is what the model will see, so it has the last word.
"""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import PIL.Image
import torch
from torch import Tensor, nn

from vitreg.errors import ModelLoadError

Preprocess = Callable[[PIL.Image.Image], Tensor]
Size = int | tuple[int, int]
Pair = tuple[int, int]  # (height, width) in pixels

FALLBACK = (224, 224)
_PHOTOS = ((1800, 1200), (1200, 1800))  # (width, height): a wide photo and a tall one, large enough for tiles
VISION_CONFIGS = ("vision_config", "backbone_config", "encoder", "encoder_config", "vision_encoder_config")


def pair(size: Any) -> Pair:
    """(height, width) of one side, or of two."""
    return (int(size), int(size)) if isinstance(size, int | float) else (int(size[0]), int(size[1]))


def parse_size(text: str) -> Pair:
    """(height, width) of "224" or "224x336" (HEIGHTxWIDTH). Raises ValueError for anything else."""
    sides = re.fullmatch(r"(\d+)(?:x(\d+))?", text.strip())
    if not sides or not all(int(side) for side in sides.groups() if side):
        raise ValueError(f"expected pixels, as 224 or 224x336 (HEIGHTxWIDTH), found {text!r}.")
    return int(sides[1]), int(sides[2] or sides[1])


def written(size: Pair) -> str:
    """HEIGHTxWIDTH."""
    return f"{size[0]}x{size[1]}"


def native_size(module: nn.Module) -> Pair | None:
    """The image size that a model's configuration names, or one of a backbone nested in it; else None."""
    for part in module.modules():
        timm_size = getattr(getattr(part, "patch_embed", None), "img_size", None)
        if timm_size:
            return pair(timm_size)
    if getattr(module, "pretrained_cfg", None):
        return pair(module.pretrained_cfg["input_size"][1:])  # type: ignore[index]
    for owner in (*_configs(getattr(module, "config", None)), module):
        size = getattr(owner, "image_size", None)
        if isinstance(size, int | tuple | list) and size:
            return pair(size)
        if hasattr(owner, "num_patches") and isinstance(getattr(owner, "patch_size", None), int):
            # SigLIP 2 takes any size; its own is the square of its positions.
            return pair(owner.patch_size * math.isqrt(owner.num_patches))
    return None


def _configs(config: Any) -> Iterator[Any]:
    """The configurations of vision models nested in one, and itself as the last: inner ones made a tower."""
    if config is not None:
        for name in VISION_CONFIGS:
            yield from _configs(getattr(config, name, None))
        yield config


def size_of_photos(preprocess: Preprocess | None) -> Pair | None:
    """(height, width) of what a preprocess makes of every photo; None where that depends on the photo, or is
    no picture (3, h, w)."""
    made = _made(preprocess, [PIL.Image.new("RGB", size, "grey") for size in _PHOTOS])
    sizes = {(pixels.shape[1], pixels.shape[2]) for pixels in made}
    return sizes.pop() if len(sizes) == 1 else None


def shows_photos(preprocess: Preprocess) -> bool:
    """Whether what it gives is a picture of the photo, and not, say, its patches in a row."""
    return all(
        _steady(pixels[0].float().mean(0)) and _steady(pixels[1].float().mean(1))
        for pixels in _made(preprocess, [_ramps()])
    )


def _made(preprocess: Preprocess | None, photos: list[PIL.Image.Image]) -> list[Tensor]:
    """What a preprocess makes of photos; nothing where that is not a picture (3, h, w) of each."""
    try:
        with torch.random.fork_rng(devices=[]):  # a random crop must not change the caller's numbers
            made = [preprocess(photo) for photo in photos] if preprocess else []
    except Exception:  # whoever reads photos with it will name it
        return []
    good = all(isinstance(pixels, Tensor) and pixels.dim() == 3 and len(pixels) == 3 for pixels in made)
    return made if good else []


def _ramps() -> PIL.Image.Image:
    """Red grows to the right, green to the bottom."""
    upright = PIL.Image.linear_gradient("L")
    return PIL.Image.merge("RGB", (upright.rotate(90), upright, PIL.Image.new("L", upright.size)))


def _steady(profile: Tensor) -> bool:
    """Whether it rises (or falls) all along."""
    places = torch.arange(len(profile), dtype=torch.float32)
    return bool(torch.corrcoef(torch.stack([profile, places]))[0, 1].abs() > 0.5)


def refuse_partial_patches(module: nn.Module, size: Pair, native: Pair | None) -> None:
    """A size that was asked for and is no multiple of the patch would be cut, padded or refused, by library.

    A model's own may be one (SigLIP so400m/14 at 384 leaves out 6 pixels).
    """
    if size == native:
        return
    for part in module.modules():
        if isinstance(part, nn.Conv2d) and part.kernel_size == part.stride and part.stride[0] > 4:
            rows, columns = part.stride
            if size[0] % rows or size[1] % columns:
                near = " or ".join(
                    written(whole)
                    for k in (0, 1)
                    if all(whole := ((size[0] // rows + k) * rows, (size[1] // columns + k) * columns))
                )
                raise ModelLoadError(
                    f"size {written(size)} is not a multiple of the patch of {rows}x{columns} pixels;"
                    f" use {near}."
                )
            return
