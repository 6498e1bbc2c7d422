"""From a photo to pixels, as timm's transforms and transformers' processors do: one picture of each photo.

Some processors cut a photo into tiles, keep its ratio, or want boxes. There, a model's tower gets one view of
each photo, and a note says which.
"""

from typing import Any

import PIL.Image
from jaxtyping import Float
from torch import Tensor, nn

from vitreg.models.sizes import FALLBACK, Pair, Preprocess, shows_photos, size_of_photos, written

Colours = tuple[float, ...]  # one number per colour

_HALF = (0.5, 0.5, 0.5)
_INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # by Pillow's numbers


def timm_preprocess(module: nn.Module, size: Pair) -> Preprocess | None:
    """The evaluation transform that a timm model's own configuration describes."""
    if not hasattr(module, "pretrained_cfg"):
        return None
    from timm.data import create_transform, resolve_model_data_config

    config = resolve_model_data_config(module) | {"input_size": (3, *size)}
    transform: Preprocess = create_transform(**config, is_training=False)
    return transform


def plain_preprocess(
    size: Pair, mean: Any = _HALF, std: Any = _HALF, interpolation: str = "bicubic", whole: bool = False
) -> Preprocess:
    """Resize, crop the centre (or, to keep the `whole` photo, squeeze it), normalise."""
    from timm.data import create_transform

    transform: Preprocess = create_transform(
        (3, *size), is_training=False, mean=mean, std=std, crop_pct=1.0, interpolation=interpolation,
        crop_mode="squash" if whole else "center",
    )  # fmt: skip
    return transform


class HfPreprocess:
    """A transformers image processor as a function of one image (a class: workers unpickle it)."""

    def __init__(self, processor: Any, overrides: dict[str, Any]) -> None:
        self.processor, self.overrides = processor, overrides

    def __call__(self, image: PIL.Image.Image) -> Tensor:
        """(3, h, w), or more dimensions where the processor makes several pictures of one."""
        pixels: Tensor = self.processor(image, return_tensors="pt", **self.overrides)["pixel_values"]
        return pixels[0] if len(pixels) == 1 else pixels


def hf_preprocess(processor: Any, size: Pair | None, native: Pair | None) -> tuple[Preprocess, str]:
    """What a processor makes of a photo, or one view of it where that is no one picture; and a note on it.

    The picture is of `size` if that is asked for, else of the size that the processor gives, else (a view) of
    the `native` size of the model's tower.
    """
    own = HfPreprocess(processor, _sized(processor, size) if size else {})
    given = size_of_photos(own)
    if given and size in (None, given) and shows_photos(own):
        return own, ""
    target, tiles = size or native or FALLBACK, _cuts_tiles(processor)
    colours = _normalisation(processor)
    resample = _INTERPOLATIONS.get(int(getattr(processor, "resample", None) or 3), "bicubic")
    view = plain_preprocess(target, *(colours or (_HALF, _HALF)), resample, whole=tiles)
    if hasattr(processor, "max_num_patches") and not tiles:  # SigLIP 2: cut into patches, not into views
        return view, ""
    does = f"gives no picture of {written(size)}" if size else "gives no picture of one size"
    does = "cuts a photo into several pictures" if tiles else does
    which = "the whole photo, squeezed to" if tiles else "the photo's centre, scaled to"
    guesses = [] if size or native else ["the size"]
    guesses += [] if colours else ["the normalisation"]
    guessed = f" ({' and '.join(guesses)} guessed: no file says it)" if guesses else ""
    name = type(processor).__name__
    return view, f"its {name} {does}; one view is read: {which} {written(target)}{guessed}."


def _sized(processor: Any, size: Pair) -> dict[str, Any]:
    """Arguments that make a processor yield `size`, keeping its ratio of resize to crop."""
    exact = {"height": size[0], "width": size[1]}
    cropped = getattr(processor, "do_center_crop", False) and getattr(processor, "crop_size", None)
    if not cropped or not cropped["height"]:
        return {"size": exact}
    resized = getattr(processor, "size", None) or {}
    shortest = resized.get("shortest_edge") or resized.get("height") or cropped["height"]
    # The resized photo must cover the crop in both directions, whatever its own ratio.
    return {"size": {"shortest_edge": round(max(size) * shortest / cropped["height"])}, "crop_size": exact}


def _cuts_tiles(processor: Any) -> bool:
    """Whether a large photo becomes several pictures (n, 3, h, w)."""
    try:
        pixels = HfPreprocess(processor, {})(PIL.Image.new("RGB", (1800, 1200)))
    except Exception:
        return False
    return pixels.dim() > 3 and pixels.shape[-3] == 3


def _normalisation(processor: Any) -> tuple[Colours, Colours] | None:
    """Mean and standard deviation that make of pixels in 0..1 what the processor makes of those in 0..255.

    None where neither its settings nor its pixels say them.
    """
    mean: Colours = (0.0,) * 3
    std: Colours = (1.0,) * 3
    if getattr(processor, "do_normalize", True):
        if getattr(processor, "image_mean", None) is None:
            return _measured_normalisation(processor)
        mean, std = _of_colours(processor.image_mean), _of_colours(processor.image_std)
    largest = 255.0
    if getattr(processor, "do_rescale", True):
        largest *= getattr(processor, "rescale_factor", None) or 1 / 255
    return tuple(x / largest for x in mean), tuple(x / largest for x in std)


def _measured_normalisation(processor: Any) -> tuple[Colours, Colours] | None:
    """The same of a processor that does not say it, by what it makes of a black and a white picture."""
    try:
        black, white = (_middle(processor, colour) for colour in ("black", "white"))
    except Exception:  # a processor that wants more than a photo
        return None
    return tuple((black / (black - white)).tolist()), tuple((1 / (white - black)).tolist())


def _middle(processor: Any, colour: str) -> Float[Tensor, "3"]:
    """The median of each channel, which no padding changes."""
    pixels = HfPreprocess(processor, {})(PIL.Image.new("RGB", (512, 512), colour))
    return pixels.movedim(-3, 0).flatten(1).median(1).values


def _of_colours(values: Any) -> Colours:
    """One value per colour; some processors have one for all."""
    return (float(values),) * 3 if isinstance(values, int | float) else tuple(values)
