"""One vector per photo: the CLS token, the mean patch, both, or the register tokens.

names = poolings_of(vit, ())                  # ("cls", "mean", "cls+mean")
train = pooled(vit, photos, names, config)
train.vectors("cls+mean")                     # (n, 2 d)
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitreg.data.datasets.classes import Labelled
from vitreg.errors import DataError, UnsupportedModelError
from vitreg.features.config import Config
from vitreg.features.extraction import extract_features
from vitreg.features.observer import Observer
from vitreg.models.backbone import Backbone
from vitreg.printing import did_you_mean

_LAST_4 = ("cls", "cls@-2", "cls@-3", "cls@-4")
PARTS = {
    "cls": ("cls",),
    "mean": ("mean",),
    "cls+mean": ("cls", "mean"),
    "4cls": _LAST_4,
    "4cls+mean": (*_LAST_4, "mean"),
    "registers": ("registers",),
    "test_registers": ("test_registers",),
}  # what is joined, in order; all after the model's final norm
OF_ONE_LAYER = ("cls", "mean", "cls+mean", "registers", "test_registers")


@dataclass(frozen=True, eq=False)
class Pooled:
    """n labelled photos. `parts` are what poolings join, each (n, d); of several registers, their mean."""

    parts: dict[str, Float[Tensor, "n d"]]
    labels: Int[Tensor, " n"]
    notes: tuple[str, ...]

    def vectors(self, pooling: str, rows: Tensor | slice = slice(None)) -> Float[Tensor, "m k"]:
        """One vector for each of some photos."""
        return torch.cat([self.parts[part][rows] for part in PARTS[pooling]], 1)


def poolings_of(vit: Backbone, asked: str | Sequence[str], among: Iterable[str] = PARTS) -> tuple[str, ...]:
    """The poolings asked for; if none is, those `among` which the model, with its fixes, has.

    Raises DataError for an unknown name, UnsupportedModelError for one that this model does not have.
    """
    names = (asked,) if isinstance(asked, str) else tuple(asked)
    has = _parts_of(vit)
    for name in names:
        if name not in PARTS:
            raise DataError(
                f"no pooling is called {name!r}.{did_you_mean(name, PARTS)}"
                f" Expected some of {', '.join(PARTS)}."
            )
        if missing := [part for part in PARTS[name] if part not in has]:
            raise UnsupportedModelError(
                f"{vit.name} has no {missing[0]}, which the pooling {name} needs. It has"
                f" {', '.join(pooling for pooling in PARTS if has.issuperset(PARTS[pooling]))}."
            )
    return names or tuple(name for name in among if has.issuperset(PARTS[name]))


def _parts_of(vit: Backbone) -> set[str]:
    has = {"mean"}
    if vit.layout.prefix:
        has.update(_LAST_4[: vit.anatomy.depth])
    if vit.layout.registers:
        has.add("registers")
    try:
        Observer(vit, ["test_registers"])(torch.zeros(1, 3, *vit.image_size))
        has.add("test_registers")
    except UnsupportedModelError:  # no fix that carries any is applied
        pass
    return has


def pooled(vit: Backbone, photos: Labelled, names: Sequence[str], config: Config) -> Pooled:
    """Run the model, with whatever fix is applied, over photos, and keep what these poolings need.

    All that the model has is computed in the one pass, so that other poolings, and other tasks, find it in
    the cache. A photo without a test-time register (no token of it was split) has zeros there.
    """
    found = extract_features(vit, photos.paths, sorted(_parts_of(vit)), config)
    notes = [*photos.notes, *found.notes()]
    parts = {}
    for part in dict.fromkeys(part for name in names for part in PARTS[name]):
        tokens = found[part]
        if tokens.dim() == 3:  # registers (n, r, d)
            tokens = tokens.nanmean(1)
            if none := int(tokens.isnan().any(1).sum()):
                notes.append(f"{none} of {len(found)} photos have no {part}: zeros stand for them")
        parts[part] = tokens.nan_to_num()
    return Pooled(parts, torch.tensor(photos.labels)[list(found.index)], tuple(notes))
