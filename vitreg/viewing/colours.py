"""The colours of patch features: the same axes in all versions of a model, matched between models."""

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from vitreg.plots.principal import PrincipalColours, foreground_of

if TYPE_CHECKING:
    from vitreg.viewing.result import Look, LookVersion

# Patches that are not shown: the background.
HIDDEN = 240

Pictures = list[UInt8[np.ndarray, "gh gw 3"]]  # one for each photo


def feature_colours(look: "Look", *, together: bool, foreground: bool) -> list[Pictures]:
    """For each version and each photo a picture with one colour for a patch.

    The axes are those of the first version's patches that are no artifacts, photo by photo or of all photos
    `together`: artifacts must not choose the colours of everything else.
    """
    photos = list(range(len(look.names)))
    drawn: list[Pictures] = [[] for _ in look.versions]
    for group in [photos] if together else [[photo] for photo in photos]:
        for version, pictures in zip(drawn, _of_group(look, group, foreground), strict=True):
            version.extend(pictures)
    return drawn


def _of_group(look: "Look", group: list[int], foreground: bool) -> list[Pictures]:
    """Pictures of some photos that share their axes, for each version."""
    axes: dict[str, tuple[PrincipalColours, Bool[Tensor, "b gh gw"]]] = {}
    first: tuple[PrincipalColours, LookVersion] | None = None
    pictures = []
    for version in look.versions:
        features = version.last[group]
        if version.model not in axes:
            normal = ~torch.from_numpy(np.stack([version.outliers(photo) for photo in group]))
            shown = foreground_of(features, normal) if foreground else torch.ones_like(normal)
            colours = PrincipalColours.of_most(features, normal & shown, normal)
            if first is not None:
                colours = colours.matched(features.flatten(0, 2), _scores_on(first, group, features))
            axes[version.model] = colours, shown
        first = first or (axes[version.model][0], version)
        colours, shown = axes[version.model]
        picture = colours(features)
        picture[~shown] = HIDDEN
        pictures.append(list(picture.numpy()))
    return pictures


def _scores_on(
    first: "tuple[PrincipalColours, LookVersion]", group: list[int], like: Float[Tensor, "b gh gw d"]
) -> Float[Tensor, "n 3"]:
    """The first model's scores at the places of another model's patches."""
    colours, version = first
    scores = colours.scores(version.last[group]).movedim(-1, 1)
    resized = F.interpolate(scores, like.shape[1:3], mode="bilinear", align_corners=False)
    return resized.movedim(1, -1).flatten(0, 2)


def layer_colours(
    version: "LookVersion", photo: int, layers: list[int]
) -> dict[int, UInt8[np.ndarray, "gh gw 3"]]:
    """One photo's features in each of these layers that was kept, if all were: the last in its own colours,
    each before it turned to be like the one after."""
    if not version.features:
        return {}
    normal = ~torch.from_numpy(version.outliers(photo))
    pictures: dict[int, np.ndarray] = {}
    later: Float[Tensor, "n 3"] | None = None
    for layer in reversed(layers):
        features = version.features[layer][photo]
        colours = PrincipalColours.of_most(features, normal)
        if later is not None:
            colours = colours.matched(features.flatten(0, 1), later)
        later = colours.scores(features.flatten(0, 1))
        pictures[layer] = colours(features).numpy()
    return dict(sorted(pictures.items()))
