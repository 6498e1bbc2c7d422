"""A few photos as one or more models see them: norms, features, attention, and which patches are artifacts.

    seen = look(vit, "photo.jpg", fix=load_fix("my-fix/"))
    print(seen)                            # a line for each version
    seen.figure().savefig("look.png")      # photo, patch norms, feature PCA, CLS attention; a row each
    seen.similar((3, 4))                   # which patches are like this one

One photo has too few patches to tell faint artifacts from chance. So it is judged beside bundled photos, up
to JUDGED in all, and what is said is said of the photo. `diagnose` judges a model.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vitreg.data.batches import Batch
from vitreg.data.images import Images, demo_photos, read_images
from vitreg.data.photo_sources import Source
from vitreg.diagnosis.diagnosing import diagnose
from vitreg.diagnosis.one_image import inspect_image
from vitreg.diagnosis.result import Diagnosis
from vitreg.features.observer import Observer
from vitreg.fixes.base import Fix
from vitreg.models.backbone import Backbone
from vitreg.viewing.patches import PatchName, query_of, title_of
from vitreg.viewing.result import Look, LookVersion

# Photos that a model's patches are judged in; where there are fewer, bundled ones stand beside them.
JUDGED = 8

# The most photos in one picture.
SHOWN = 8


def look(
    vit: Backbone | Sequence[Backbone],
    photos: Source | Images,
    *,
    fix: Fix | None = None,
    queries: Sequence[PatchName] = (),
    layers: bool = False,
) -> Look:
    """Look at a photo, or at the first eight of a folder, with one or more models.

    `photos` is whatever `read_images` reads: a path, a folder, PIL images, preprocessed tensors. `fix` adds
    the same model with the fix as a second version; it is taken off again. `queries` asks where tokens look
    in the last block: "CLS", "register 0", or a patch as (row, column), "outlier" or "centre". `layers` keeps
    the features of all layers, for `Look.by_layer`.

    Raises ImageError without a readable photo, ValueError for a fix with several models or for a token that a
    model does not have, and what `diagnose` raises.
    """
    models = [vit] if isinstance(vit, Backbone) else list(vit)
    if not models or (fix is not None and len(models) > 1):
        raise ValueError(f"found {len(models)} models, expected one or more, and one where there is a fix.")
    own = [_Photos.read(photos, model) for model in models]
    versions: list[LookVersion] = []
    for model, shown in zip(models, own, strict=True):
        for name, applied in _versions(model, fix):
            with applied:
                first = versions[0] if versions else None
                seen = _look_once(replace(model, name=name), shown, queries, layers, first)
                versions.append(replace(seen, model=model.name))
    return Look(tuple(versions), own[0].beside, own[0].failed)


def _versions(vit: Backbone, fix: Fix | None) -> Iterator[tuple[str, AbstractContextManager[object]]]:
    """The model as it is, and with the fix."""
    yield vit.name, nullcontext()
    if fix is not None:
        yield f"{vit.name}, fixed ({fix.type})", fix.applied_to(vit)


@dataclass(frozen=True)
class _Photos:
    """The photos as one model takes them, (b, 3, h, w), and bundled ones to judge them with."""

    pixels: Float[Tensor, "b 3 h w"]
    names: tuple[str, ...]
    bundled: Float[Tensor, "c 3 h w"]
    failed: tuple[dict[str, str], ...]

    @property
    def beside(self) -> int:
        return len(self.bundled)

    @classmethod
    def read(cls, source: Source | Images, vit: Backbone) -> "_Photos":
        images = source if isinstance(source, Images) else read_images(source, vit, workers=0)
        images = images.first(SHOWN)
        batches = list(images)
        pixels = torch.cat([batch.pixels for batch in batches])
        names = tuple(name for batch in batches for name in batch.names)
        failed = tuple(asdict(one) for one in images.failed)
        return cls(pixels, names, _bundled(vit, pixels, names), failed)

    @property
    def batches(self) -> list[Batch]:
        """All of them, the photos first."""
        bundled = Batch(self.bundled, tuple(f"bundled photo {i}" for i in range(self.beside)))
        return [Batch(self.pixels, self.names), *([bundled] if self.beside else [])]


def _bundled(
    vit: Backbone, pixels: Float[Tensor, "b 3 h w"], names: Sequence[str]
) -> Float[Tensor, "c 3 h w"]:
    """Bundled photos that fill up to JUDGED, none that is among the photos; none where photos came as tensors
    of another size than the model's preprocessing gives."""
    own = {os.path.realpath(name) for name in names}
    others = [path for path in demo_photos() if os.path.realpath(path) not in own]
    wanted = min(JUDGED - len(pixels), len(others))
    if vit.preprocess is None or wanted < 1:
        return pixels[:0]
    read = torch.cat([batch.pixels for batch in read_images(others[:wanted], vit, workers=0)])
    return read if read.shape[1:] == pixels.shape[1:] else pixels[:0]


def _look_once(
    vit: Backbone, photos: _Photos, queries: Sequence[PatchName], layers: bool, first: LookVersion | None
) -> LookVersion:
    """One version of a model, with whatever fix is applied to it."""
    diagnosis = diagnose(vit, photos.batches, examples=len(photos.names))
    features = _features_by_layer(vit, photos.pixels, diagnosis) if layers else {}
    seen = LookVersion(vit.name, vit.name, diagnosis, features, {}, {})
    return _attending(vit, photos.pixels, queries, first or seen, seen)


def _features_by_layer(
    vit: Backbone, pixels: Float[Tensor, "b 3 h w"], diagnosis: Diagnosis
) -> dict[int, Float[Tensor, "b gh gw d"]]:
    """Of each layer the patches' features, after the final norm."""
    observe = Observer(vit, [f"patches@{layer}" for layer in range(len(diagnosis.layers))])
    rows = observe(pixels).items()
    return {int(name.partition("@")[2]): values.unflatten(1, diagnosis.grid) for name, values in rows}


def _attending(
    vit: Backbone,
    pixels: Float[Tensor, "b 3 h w"],
    queries: Sequence[PatchName],
    first: LookVersion,
    seen: LookVersion,
) -> LookVersion:
    """With the maps of where the tokens look in the last block. Patches are named in the first version, so
    that all versions are asked of the same place."""
    tokens = {
        title_of(name): [query_of(name, i, first, seen) for i in range(len(pixels))] for name in queries
    }
    attended = {
        title: np.stack(
            [inspect_image(vit, pixels[i : i + 1], query=q).attention.of(-1) for i, q in enumerate(of_photos)]
        )
        for title, of_photos in tokens.items()
    }
    asked = {
        title: [None if isinstance(query, str) else query for query in of_photos]
        for title, of_photos in tokens.items()
    }
    return replace(seen, attended=attended, asked=asked)
