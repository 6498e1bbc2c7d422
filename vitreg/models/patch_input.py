"""Vision towers of transformers that do not take images: how to run them on images of one size.

Some want an argument beside the images, others the patches of the images, padded or in one row.
"""

import inspect
from functools import lru_cache, partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vitreg.errors import UnsupportedModelError
from vitreg.models.probe import Forward
from vitreg.models.sizes import Pair

_PATCH = ("patch_size",)
_FRAMES = ("temporal_patch_size", "patch_temporal")
_MERGED = ("spatial_merge_size", "merge_size", "merge_kernel_size")


def forward_of(module: nn.Module) -> Forward | None:
    """How to run a module on images where `module(images)` would not do."""
    parameters = inspect.signature(module.forward).parameters
    if "spatial_shapes" in parameters:
        return partial(_run_on_patches, module)
    if "grid_thw" in parameters:
        return partial(_run_on_row, module)
    if "interpolate_pos_encoding" in parameters:
        return partial(module, interpolate_pos_encoding=True)
    return None


def _run_on_patches(module: nn.Module, images: Float[Tensor, "b 3 h w"]) -> Any:
    """SigLIP 2 (NaFlex) takes flattened patches, their mask and the grid of each image."""
    config: Any = module.config
    patch: int = getattr(config, "vision_config", config).patch_size
    b, _, h, w = images.shape
    rows, columns = h // patch, w // patch
    cells = images.unfold(2, patch, patch).unfold(3, patch, patch)  # (b, 3, rows, columns, patch, patch)
    pixels = cells.permute(0, 2, 3, 4, 5, 1).reshape(b, rows * columns, -1)
    mask = torch.ones(b, rows * columns, dtype=torch.long, device=images.device)
    shapes = torch.tensor([[rows, columns]] * b, device=images.device)
    return module(pixel_values=pixels, pixel_attention_mask=mask, spatial_shapes=shapes)


def _run_on_row(module: nn.Module, images: Float[Tensor, "b 3 h w"]) -> Any:
    """Qwen2-VL and its kin take the patches of all images in one row, and a table of their grids.

    Where each pixel goes is what the image processor of the model's family makes of an image of numbers.
    """
    b, _, h, w = images.shape
    patch: int = module.config.patch_size  # type: ignore[union-attr, assignment]
    kind: Any = type(module)
    pixels, beside = _arrangement(kind, (h, w), patch, _frames(module), _merged(module))
    row = images.flatten(1)[:, pixels.to(images.device)].flatten(0, 1)
    wanted = inspect.signature(module.forward).parameters
    tables = {
        name: x.repeat(b, *[1] * (x.dim() - 1)).to(images.device)
        for name, x in beside.items()
        if name in wanted
    }
    return module(row, **tables)


@lru_cache(maxsize=16)
def _arrangement(
    kind: Any, size: Pair, patch: int, frames: int, merged: int | None
) -> tuple[Int[Tensor, "n ..."], dict[str, Tensor]]:
    """Which pixel of an image (3 * h * w) stands where in the row, and what is given beside it, by name."""
    h, w = size
    processor = _processor_of(kind)
    merged = merged or next((getattr(processor, name) for name in _MERGED if hasattr(processor, name)), 1)
    side = patch * merged
    if h % side or w % side:
        raise UnsupportedModelError(
            f"{kind.__name__} merges {merged}x{merged} patches of {patch} pixels: expected images whose sides"
            f" are multiples of {side}, found {h}x{w}."
        )
    sizes = dict.fromkeys(_PATCH, patch) | dict.fromkeys(_FRAMES, frames) | dict.fromkeys(_MERGED, merged)
    settings = {name: value for name, value in sizes.items() if hasattr(processor, name)}
    numbers = torch.arange(3 * h * w, dtype=torch.float32).reshape(3, h, w)  # exact below 2**24
    untouched = dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"), False)
    made = dict(processor(numbers, return_tensors="pt", **settings, **untouched))
    pixels = made.pop("pixel_values").long()
    if not torch.equal(pixels.unique(), torch.arange(3 * h * w)):
        raise UnsupportedModelError(
            f"{type(processor).__name__}, which prepares the images of {kind.__name__}, does more than to put"
            " their pixels into a row. Wrap the model with a `forward` that says how to call it."
        )
    return pixels, {name.removeprefix("image_"): torch.as_tensor(value) for name, value in made.items()}


def _processor_of(kind: type[nn.Module]) -> Any:
    """The image processor that transformers has for the family of a tower."""
    import transformers
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    family = _family(kind)
    if family not in IMAGE_PROCESSOR_MAPPING_NAMES and family in PROCESSOR_MAPPING_NAMES:
        family = _family(getattr(transformers, PROCESSOR_MAPPING_NAMES[family]))  # whose processor it shares
    name = IMAGE_PROCESSOR_MAPPING_NAMES.get(family, {}).get("torchvision")
    if name is None:
        raise UnsupportedModelError(
            f"transformers names no image processor for {kind.__name__}, which takes the patches of images in"
            " a row: how it wants them is not known. Wrap it with a `forward` that says how to call it."
        )
    return getattr(transformers, name)()


def _family(kind: type) -> str:
    """The folder of transformers that a class is in."""
    return kind.__module__.split(".")[-2]


def _merged(module: nn.Module) -> int | None:
    """How many patches by how many are merged later, if the model's configuration says it."""
    config: Any = module.config
    sizes = [getattr(config, name) for name in _MERGED if getattr(config, name, None)]
    sides = {side for size in sizes for side in (size if isinstance(size, tuple | list) else (size,))}
    if len(sides) > 1:
        raise UnsupportedModelError(f"patches that are merged {sizes[0]} at a time are not supported.")
    return sides.pop() if sides else None


def _frames(module: nn.Module) -> int:
    """How many frames a patch has."""
    named = [getattr(module.config, name) for name in _FRAMES if hasattr(module.config, name)]
    films = [part.kernel_size[0] for part in module.modules() if isinstance(part, nn.Conv3d)]
    return next(iter((*named, *films)), 1)
