"""What the page shows, without the page: one model, its photos and its fix; every look is kept.

    explorer = Explorer(vit, photos)
    photo = explorer.photo("0")                        # of the gallery; or explorer.add("mine.jpg")
    explorer.look(photo), explorer.attention(photo, "CLS", explorer.fixed)

All users share the one model, so one forward pass runs at a time, with the fix that it needs applied for as
long as it runs. Nothing here belongs to one user but the photos that they add, which only they can name.
"""

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from vitreg.data.decoding import decode, reason
from vitreg.data.images import Images
from vitreg.diagnosis.diagnosing import diagnose, photos_of
from vitreg.diagnosis.figures import norm_range
from vitreg.diagnosis.one_image import Attention, ImageView, Query, inspect_image, queries
from vitreg.diagnosis.result import Diagnosis
from vitreg.errors import ImageError
from vitreg.evals.discovery import DiscoveryConfig, locate, prepared
from vitreg.features.observer import Observer
from vitreg.fixes import Fix, ShiftSink, TestTimeRegisters
from vitreg.fixes.neurons import RegisterNeuron, RegisterNeurons
from vitreg.models.backbone import Backbone
from vitreg.models.head import class_names
from vitreg.models.probe import evaluating
from vitreg.search.fix_search import build
from vitreg.search.register_neurons import find_register_neurons
from vitreg.tracing.records import trace
from vitreg.verification.measuring import verify
from vitreg.verification.verdict import Verdict

T = TypeVar("T")
Pick = tuple[int, int]  # a neuron (layer, index), or a patch (row, column)

GALLERY = 12  # photos to pick from
UPLOADS = 200  # that are remembered, of all users together
KEPT = 500  # looks that are remembered (about 2 MiB each for a ViT-L at 518 pixels)
MOST_PIXELS = 50_000_000
DISCOVERY = DiscoveryConfig(normalise=True, bias=-0.3)  # see docs/discovery-study.md
NEURONS = 12  # that can be switched


@dataclass(frozen=True, eq=False)
class Photo:
    """A photo as the model takes it, and as people see it (cropped and resized as for the model)."""

    key: str
    name: str
    pixels: Float[Tensor, "1 3 h w"]
    image: UInt8[np.ndarray, "h w 3"]


@dataclass(frozen=True, eq=False)
class ShownVersion:
    """The model with a fix, or as it is; `key` tells versions apart."""

    key: str
    fix: Fix | None


AS_IT_IS = ShownVersion("", None)


class Explorer:
    """A model with photos to look at. `images` are what it is diagnosed, searched and judged by.

    `fix`: one that was saved; without it, one is made where the model has artifacts (`prepare`).
    """

    def __init__(self, vit: Backbone, images: Images, fix: Fix | None = None) -> None:
        self.vit, self.images = vit, images
        self.report: Diagnosis = diagnose(vit, images, examples=0)
        self.names = class_names(vit)
        self.gallery = _gallery(vit, images)
        self.choice = "the fix that was given" if fix else ""
        self._fix = fix
        self._neurons: RegisterNeurons | None = None
        self._verdict: Verdict | None = None
        self._ready = threading.Event()
        self._failure = ""
        self._one_pass = threading.RLock()
        self._uploads: OrderedDict[str, Photo] = OrderedDict()
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()

    # -- photos ------------------------------------------------------------------------------------

    def photo(self, key: str | None) -> Photo | None:
        """One of the gallery by its number, or one that was added."""
        own = next((photo for photo in self.gallery if photo.key == key), None)
        return own or self._uploads.get(key or "")

    def add(self, path: str | Path, name: str | None = None) -> Photo:
        """A photo from a file. Raises ImageError with the reason for one that cannot be shown."""
        name = name or Path(path).name
        try:
            image = decode(str(path), MOST_PIXELS)
        except Exception as error:
            raise ImageError(f"{name} cannot be shown: {reason(error)}.") from error
        if self.vit.preprocess is None:
            raise ImageError("this model came without preprocessing, so that photos cannot be added.")
        pixels = self.vit.preprocess(image)[None]
        photo = Photo(f"upload-{_digest(pixels)}", name, pixels, photos_of(self.vit, pixels)[0])
        self._uploads[photo.key] = photo
        _forget_oldest(self._uploads, UPLOADS)
        return photo

    # -- looks -------------------------------------------------------------------------------------

    def look(self, photo: Photo, version: ShownVersion = AS_IT_IS, query: Query | None = None) -> ImageView:
        """In one forward pass, what most views show: of the model as it is, also the candidates."""
        query = query or self.queries[0]
        places = [(c.layer, c.index) for c in self.candidates] if version is AS_IT_IS else []
        key = ("look", photo.key, version.key, query)
        return self._keep(
            key, version, lambda: inspect_image(self.vit, photo.pixels, query=query, neurons=places)
        )

    def attention(self, photo: Photo, query: Query, version: ShownVersion = AS_IT_IS) -> Attention:
        return self.look(photo, version, query).attention

    def activation(self, photo: Photo, place: Pick) -> Float[np.ndarray, "gh gw"]:
        seen = self.look(photo).activations
        if place not in seen:  # looked at before the search had found it
            key = ("activations", photo.key, place)
            seen = self._keep(
                key, AS_IT_IS, lambda: inspect_image(self.vit, photo.pixels, neurons=[place]).activations
            )
        return seen[place]

    def features(self, photo: Photo, version: ShownVersion = AS_IT_IS) -> Float[Tensor, "gh gw d"]:
        """The patches' features, after the final norm."""
        return self._keep(("features", photo.key, version.key), version, lambda: self._features(photo))

    @cached_property
    def _observe(self) -> Observer:
        return Observer(self.vit, ["patches"])  # runs the model once, to see what follows its blocks

    def _features(self, photo: Photo) -> Float[Tensor, "gh gw d"]:
        rows = self._observe(photo.pixels)["patches"]
        return rows[0].unflatten(0, self.vit.layout_for(photo.pixels).grid)

    def boxes(self, photo: Photo, version: ShownVersion = AS_IT_IS) -> dict[str, Float[np.ndarray, "4"]]:
        """The boxes of LOST and TokenCut, xyxy in pixels of `photo.image`, by the last block's keys."""
        return self._keep(("boxes", photo.key, version.key), version, lambda: _boxes(self.vit, photo))

    def outliers(self, photo: Photo) -> Bool[np.ndarray, "gh gw"]:
        """The photo's outliers in the model as it is, by the diagnosis' rule."""
        rule = self.report.rule
        return rule.mask(self.look(photo).norms[rule.layer])

    @property
    def queries(self) -> list[str]:
        """The tokens, beside patches, that one can look from: those of the fix, too."""
        return queries(self.vit, getattr(self._fix, "registers", 0))

    @cached_property
    def norm_axis(self) -> tuple[float, float]:
        return norm_range(self.report)

    # -- the fix -----------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Find the neurons and make the fix, in a copy of the model: looks go on meanwhile."""
        try:
            if self.report.has_artifacts:
                with self._one_pass:  # while no fix is applied
                    model = copy.deepcopy(self.vit.model)
                vit = self.vit.with_model(model, self.vit.name)
                self._neurons = find_register_neurons(vit, self.images, self.report)
                if self._fix is None:
                    self._fix, self.choice = build(vit, self.images, [self._neurons], self.report)
        except Exception as error:  # told on the page, whatever it was
            self._failure = str(error) or type(error).__name__
        finally:
            self._ready.set()

    @property
    def ready(self) -> bool:
        """Whether `prepare` is done."""
        return self._ready.is_set()

    @property
    def fixed(self) -> ShownVersion | None:
        """The model with the fix, if there is one (yet)."""
        return None if self._fix is None else ShownVersion("fix", self._fix)

    @property
    def why_no_fix(self) -> str:
        """In words, where there is no fix to show; empty where there is one."""
        if self._fix is not None:
            return ""
        if not self.ready:
            return "Finding the register neurons and making a fix: it will appear here in a moment."
        if not self.report.has_artifacts:
            return "This model has no artifacts, so there is nothing to fix."
        return f"No fix could be made: {self._failure}"

    @property
    def candidates(self) -> Sequence[RegisterNeuron]:
        """The neurons that can be switched, the best first."""
        if self._neurons is None:
            return ()
        shown = max(NEURONS, self._neurons.top_k)
        return (self._neurons.ranking or self._neurons.chosen)[:shown]

    @property
    def chosen(self) -> Sequence[RegisterNeuron]:
        """Those of them that the search chose."""
        return () if self._neurons is None else self._neurons.chosen

    def switched(self, neurons: Iterable[Pick], registers: int) -> ShownVersion:
        """The paper's fix of some candidates (layer, index), with so many registers."""
        chosen = self._some(neurons)
        if not chosen:
            return AS_IT_IS
        peak: Any = "absolute" if any(neuron.at_outliers < 0 for neuron in chosen) else "signed"
        fix = TestTimeRegisters(RegisterNeurons(chosen), registers=registers, peak=peak)
        return ShownVersion(f"{_named(chosen)} to {registers}", fix)

    def shifted(self, neurons: Iterable[Pick], patch: Pick) -> ShownVersion:
        """Some candidates fire at one patch (row, column) and nowhere else."""
        chosen = self._some(neurons)
        if not chosen:
            return AS_IT_IS
        return ShownVersion(f"{_named(chosen)} at {patch}", ShiftSink(RegisterNeurons(chosen), (patch,)))

    def _some(self, places: Iterable[Pick]) -> tuple[RegisterNeuron, ...]:
        wanted = set(places)
        return tuple(neuron for neuron in self.candidates if (neuron.layer, neuron.index) in wanted)

    @property
    def measured(self) -> bool:
        """Whether there is a verdict by now."""
        return self._verdict is not None

    def verdict(self, progress: Callable[[str], None] | None = None) -> Verdict | None:
        """The fix against its controls on all images; measured once, and None without a fix."""
        with self._one_pass:
            if self._verdict is None and self._fix is not None:
                self._verdict = verify(
                    self.vit, self._fix, self.images, report=self.report, progress=progress
                )
            return self._verdict

    # -- what is kept ------------------------------------------------------------------------------

    def _keep(self, key: Hashable, version: ShownVersion, see: Callable[[], T]) -> T:
        with self._one_pass:
            if key not in self._kept:
                with version.fix.applied_to(self.vit) if version.fix is not None else nullcontext():
                    self._kept[key] = see()
                _forget_oldest(self._kept, KEPT)
            self._kept.move_to_end(key)
            found: T = self._kept[key]
            return found


def _named(neurons: Sequence[RegisterNeuron]) -> str:
    return " ".join(f"{neuron.layer}:{neuron.index}" for neuron in neurons)


def _gallery(vit: Backbone, images: Images) -> list[Photo]:
    photos: list[Photo] = []
    for batch in images:
        pixels = batch.pixels[: GALLERY - len(photos)]
        for name, one, image in zip(batch.names, pixels, photos_of(vit, pixels), strict=False):
            photos.append(Photo(str(len(photos)), Path(name).name, one[None], image))
        if len(photos) == GALLERY:
            break
    return photos


def _boxes(vit: Backbone, photo: Photo) -> dict[str, Float[np.ndarray, "4"]]:
    last = vit.anatomy.depth - 1
    with evaluating(vit.model), trace(vit, norms=False, qkv=True, layers=[last]) as t:
        vit(photo.pixels)
    keys = t.k[0, 0, :, t.inner.patch_slice].transpose(0, 1).flatten(1).cpu()
    found = locate(prepared(keys, DISCOVERY), t.layout.grid, DISCOVERY, float(DISCOVERY.bias))
    high, wide = (side / cells for side, cells in zip(photo.image.shape[:2], t.layout.grid, strict=True))
    return {name: np.array(one.box) * (wide, high, wide, high) for name, one in found.items()}


def _digest(pixels: Tensor) -> str:
    return sha256(pixels.numpy().tobytes()).hexdigest()[:24]


def _forget_oldest(kept: OrderedDict[Any, Any], most: int) -> None:
    while len(kept) > most:
        kept.popitem(last=False)
