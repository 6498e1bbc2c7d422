"""What `find_fix` costs, to be said before it starts."""

from collections.abc import Iterable

from torch import Tensor

from vitreg.data.batches import Batch, pixels_of
from vitreg.data.images import Images
from vitreg.search.choosing import CHOOSING_IMAGES
from vitreg.search.register_neurons import SEARCHED
from vitreg.verification.measuring import CONTROL_IMAGES

# Forward passes over all photos (two diagnoses, the neurons' activations, the model without and with a fix),
# over those of the controls, those that fixes are chosen on, and those that neurons are tried on.
_ALL, _CONTROLS, _CHOOSING, _TRYING = 5, 4, 8, 16


def expected_passes(photos: int) -> int:
    """About how many photos the model is run on, each time counted, where it has artifacts of its neurons."""
    return (
        _ALL * photos
        + _CONTROLS * min(photos, CONTROL_IMAGES)
        + _CHOOSING * min(photos, CHOOSING_IMAGES)
        + _TRYING * min(photos, SEARCHED)
    )


def expected_cost(images: Iterable[Batch] | Iterable[Tensor]) -> str:
    """The same in words."""
    photos = _count(images)
    if photos is None:
        return "about 5 forward passes over all photos, and some 30 over the first 64 to 256 of them"
    passes = expected_passes(photos)
    rounded, each = float(f"{passes:.2g}"), passes / photos
    said = f"about {rounded:,.0f} forward passes, {each:.0f} for each of {photos:,} photos"
    return f"{said} (1, if there are no artifacts)"


def _count(images: Iterable[Batch] | Iterable[Tensor]) -> int | None:
    """How many photos there are; None where only reading can tell."""
    if isinstance(images, list | tuple):
        return sum(len(pixels_of(batch)) for batch in images)
    return images.total and len(images) if isinstance(images, Images) else None
