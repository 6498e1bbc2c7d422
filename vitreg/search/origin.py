"""What makes the outliers: MLP neurons, a position embedding, an attention output, the patch embedding?

    diagnosis = diagnose(vit, photos)
    print(find_origin(vit, photos, diagnosis))
    # the MLP of block 7 makes them: without what it writes at these patches 100% of the outliers are gone.

Two questions are asked of each candidate. *Is it needed?* It is removed at the outlier patches of the same
photos, by replacing it with what ordinary patches of the photo have, and the outliers that are left are
counted. *Does it write the excess?* The residual stream is a sum, so what sets an outlier apart, e = x - the
mean of the photo's ordinary patches, is the sum of what positions, patch embedding and the two branches of
every block add; of e, what adds a adds the share <a, e> / <e, e>, and all shares sum to 1. Removal alone
would blame triggers: without the position of a corner, or the content of a flat patch, no neuron fires there.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from vitreg.data.batches import BATCH, Batch
from vitreg.data.first_images import first_images
from vitreg.data.images import Images
from vitreg.diagnosis.result import Diagnosis
from vitreg.errors import FixError, ImageError
from vitreg.hooks.block_edit import without_edits
from vitreg.models.backbone import Backbone
from vitreg.models.probe import evaluating
from vitreg.search.register_neurons import SEARCHED
from vitreg.tracing.early_stop import Enough, run_until
from vitreg.tracing.removal import Where, entering, mean_over, without_attention, without_mlps
from vitreg.tracing.streams import token_norms, watch

OriginKind = Literal["neurons", "position embedding", "attention output", "patch embedding", "unknown"]

# A branch of a block is a candidate if it adds this share of the excess.
TRIED = 0.05
# It explains an outlier if it adds this share of that one's excess, and the outlier is gone without it; the
# origin explains this share of the outliers.
ADDS, EXPLAINS = 0.25, 0.8
# What explains less than this share of the outliers is not worth a word.
MENTIONED = 0.1
# The same removal at ordinary patches must not do this share of what it does at the outliers.
UNSPECIFIC = 0.5


class Candidate(NamedTuple):
    """One possible cause. `layers` are blocks (0-based), none for what enters block 0.

    `adds` is its share of the excess that sets outliers apart at the detect layer, `left` the share of the
    outliers that is left where it is removed, `explains` the share of those that are gone and of whose own
    excess it adds at least a quarter.
    """

    kind: OriginKind
    layers: tuple[int, ...]
    adds: float
    left: float
    explains: float

    @classmethod
    def of(
        cls, kind: OriginKind, layers: Sequence[int], adds: Float[Tensor, " k"], without: "_Pass"
    ) -> "Candidate":
        """From its share of each outlier's excess, and the pass without it."""
        explains = (adds >= ADDS) & ~without.left
        return cls(kind, tuple(layers), *(float(x.double().mean()) for x in (adds, without.left, explains)))

    @property
    def name(self) -> str:
        if self.kind in ("neurons", "attention output"):
            what = "MLP" if self.kind == "neurons" else "attention output"
            return f"the {what}{'s'[: len(self.layers) > 1]} of {_blocks(self.layers)}"
        return f"the {self.kind}"


@dataclass(frozen=True)
class Origin:
    """What `find_origin` found. Print it, or `.to_json()` it.

    `layers` are the blocks (0-based) that make the outliers together; `positions` the (row, column) of the
    patches that are outliers in at least half of the photos, where the position embedding makes them;
    `removed` the share of outliers that is gone without the cause, `adds` its share of the excess, `control`
    the share of outliers that is gone when the same is removed at as many ordinary patches. `candidates` are
    all that were tried. For "unknown" the shares are 0.
    """

    kind: OriginKind
    layers: tuple[int, ...]
    positions: tuple[tuple[int, int], ...]
    removed: float
    adds: float
    control: float
    candidates: tuple[Candidate, ...]
    images: int
    outliers: int

    @property
    def name(self) -> str:
        """The cause in words, "the MLP of block 7"."""
        return Candidate(self.kind, self.layers, self.adds, 0.0, 0.0).name

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON-ready values."""
        tried = [c._asdict() | {"name": c.name, "layers": list(c.layers)} for c in self.candidates]
        lists = {"layers": list(self.layers), "positions": [list(cell) for cell in self.positions]}
        return vars(self) | lists | {"candidates": tried, "text": str(self)}

    def __str__(self) -> str:
        if self.kind == "unknown":
            return self._nothing()
        several = len(self.layers) > 1
        without = {
            "neurons": f"without what {'they write' if several else 'it writes'} at these patches",
            "attention output": "with that of ordinary patches of the same photo",
            "patch embedding": "with that of ordinary patches of the same photo",
            "position embedding": "with that of neighbouring patches",
        }[self.kind]
        cells = f" at (row, column) {', '.join(map(str, self.positions))}" if self.positions else ""
        verb = "make" if several else "makes"
        return (
            f"{self.name} {verb} them{cells}: {without} {self.removed:.0%} of the outliers are gone"
            f" ({self.control:.0%} with the same change at as many ordinary patches)."
        )

    def _nothing(self) -> str:
        """What each kind of part explains, where none explains enough."""
        by_kind = {one.kind: one for one in sorted(self.candidates, key=lambda one: one.explains)}
        some = [one for one in reversed(by_kind.values()) if one.explains >= MENTIONED]
        if not some:
            return (
                "nothing that can be named makes them: no part of the model that was removed adds"
                f" {ADDS:.0%} of their excess and takes them away."
            )
        if some[0].explains >= EXPLAINS:
            return (
                f"nothing that can be named makes them: without {some[0].name} they are gone, but they also"
                " are when the same is removed at as many ordinary patches."
            )
        shares = "; ".join(f"{one.name}, {one.explains:.0%}" for one in some)
        return (
            f"no one part of the model makes {EXPLAINS:.0%} of them. Shares of the outliers that a part"
            f" explains (it adds {ADDS:.0%} of their excess, and without it they are gone): {shares}."
        )


def find_origin(
    vit: Backbone, images: Images | list[Batch] | list[Tensor], diagnosis: Diagnosis, *, seed: int = 0
) -> Origin:
    """What makes the outliers of a diagnosis, found by removing candidates and looking.

    `images` are the diagnosis' own, or others of the same size; the first 64 are looked at, without any fix
    that is applied to the model. Candidates are the position embedding, the patch embedding, and of the
    blocks up to the detect layer each MLP and each attention output that adds at least 5% of the excess,
    alone and together. A candidate explains an outlier if it adds at least a quarter of that one's excess,
    and the outlier is gone without it. The origin is the one that adds most, of those that explain at least
    80% of the outliers, and take away more than twice as many as when the same is removed at as many ordinary
    patches, drawn by `seed`.

    Costs one whole pass over these images, one up to block 0, and passes that end at the detect layer: 4, one
    for each block that adds 5%, and one for each attention output and group to be tried. That is 5 where the
    MLP of one block makes the outliers, 11 where those of six blocks do. The model is left as it was. Raises
    FixError for a diagnosis without artifacts, ImageError if no patch of these images is an outlier.
    """
    if not diagnosis.has_artifacts or diagnosis.threshold is None:
        raise FixError("the diagnosis found no artifacts, so nothing makes them: there is no origin to find.")
    pixels = first_images(images, SEARCHED)
    with without_edits(vit.model), evaluating(vit.model):
        passes = _Passes(vit, pixels, diagnosis, seed)
        tried = _tried(passes)
        explaining = [candidate for candidate in tried if candidate.explains >= EXPLAINS]
        for candidate in sorted(explaining, key=lambda candidate: candidate.adds, reverse=True):
            elsewhere = passes.run(candidate.kind, *candidate.layers, control=True)
            control = float((~elsewhere.left).double().mean())
            if control < UNSPECIFIC * (1 - candidate.left):
                return passes.origin(candidate, control, tried)
    return passes.origin(Candidate("unknown", (), 0.0, 1.0, 0.0), 0.0, tried)


def _tried(passes: "_Passes") -> list[Candidate]:
    """All candidates, with what they add and what is left without them."""
    plain = passes.plain
    position, patch = passes.run("position embedding"), passes.run("patch embedding")
    by_position = plain.after(-1) - position.after(-1)
    tried = [
        Candidate.of("position embedding", (), by_position, position),
        Candidate.of("patch embedding", (), plain.after(-1) - by_position, patch),
    ]
    for kind, adds in _branches(passes).items():
        tried += [Candidate.of(kind, [layer], adds[layer], passes.run(kind, layer)) for layer in adds]
        if len(adds) > 1:
            together = torch.stack(list(adds.values())).sum(0)
            tried.append(Candidate.of(kind, list(adds), together, passes.run(kind, *adds)))
    return tried


def _branches(passes: "_Passes") -> dict[OriginKind, dict[int, Float[Tensor, " k"]]]:
    """Per kind and block, the share of each outlier's excess that a branch adds, where it adds enough."""
    found: dict[OriginKind, dict[int, Tensor]] = {"neurons": {}, "attention output": {}}
    plain = passes.plain
    for layer in range(passes.detect + 1):
        block = plain.after(layer) - plain.after(layer - 1)
        if abs(float(block.mean())) < TRIED:
            continue
        mlp = plain.after(layer) - passes.run("neurons", layer).after(layer)
        branches: list[tuple[OriginKind, Tensor]] = [("neurons", mlp), ("attention output", block - mlp)]
        for kind, adds in branches:
            if float(adds.mean()) >= TRIED:
                found[kind][layer] = adds
    return found


# -- passes ----------------------------------------------------------------------------------------


class _Pass(NamedTuple):
    """What one pass over all images showed: the share of each outlier's excess at each level (what enters
    block 0, then the stream after each block), and which outliers are left at the last one."""

    levels: Float[Tensor, "l k"]
    left: Bool[Tensor, " k"]

    def after(self, layer: int) -> Float[Tensor, " k"]:
        """The share of the excess that is there after a block; -1: what enters block 0."""
        return self.levels[layer + 1]


class _Passes:
    """Forward passes over the same images that end at the detect layer, each without one candidate."""

    def __init__(self, vit: Backbone, pixels: Tensor, diagnosis: Diagnosis, seed: int) -> None:
        assert diagnosis.threshold is not None
        self._vit, self._batches = vit, pixels.split(BATCH)
        self.detect, self._threshold = diagnosis.detect_layer, diagnosis.threshold
        self._layout = vit.layout_for(pixels)
        self._masks = [diagnosis.outliers(vit, batch).flatten(1) for batch in self._batches]
        self.images, self.outliers = len(pixels), sum(int(mask.sum()) for mask in self._masks)
        if not self.outliers:
            raise ImageError(
                f"none of these {len(pixels)} images has an outlier by this diagnosis; expected some of those"
                " that were diagnosed."
            )
        generator = torch.Generator().manual_seed(seed)
        self._others = [_as_many_others(mask, generator) for mask in self._masks]
        self._excess: dict[int, Tensor] = {}  # per batch, at the detect layer, (k, d)
        self._done: dict[tuple[OriginKind, tuple[int, ...], bool], _Pass] = {}
        self._positions = _Positions(vit, self._batches, torch.cat(self._masks))
        self.plain = self.run("unknown")

    def run(self, kind: OriginKind, *layers: int, control: bool = False) -> _Pass:
        """The pass without a candidate ("unknown": nothing), at the outliers or at as many others."""
        if (kind, layers, control) not in self._done:
            batches = range(len(self._batches))
            levels, left = zip(*(self._run(index, kind, layers, control) for index in batches), strict=True)
            self._done[kind, layers, control] = _Pass(torch.cat(levels, 1), torch.cat(left))
        return self._done[kind, layers, control]

    def _run(
        self, index: int, kind: OriginKind, layers: tuple[int, ...], control: bool
    ) -> tuple[Float[Tensor, "l k"], Bool[Tensor, " k"]]:
        outliers = self._masks[index]
        at = self._others[index] if control else outliers
        with self._without(kind, layers, Where(at, ~(at | outliers), self._layout.patch_slice)):
            levels, left = self._look(self._batches[index], outliers)
        excess = self._excess.setdefault(index, levels[-1])  # of the first, plain pass
        return (levels * excess).sum(-1) / excess.square().sum(-1), left

    def _without(
        self, kind: OriginKind, layers: tuple[int, ...], where: Where
    ) -> AbstractContextManager[Any]:
        if kind == "neurons":
            return without_mlps(self._vit, layers, where)
        if kind == "attention output":
            return without_attention(self._vit, layers, where)
        if kind == "position embedding":
            return entering(self._vit, lambda x: self._positions.as_neighbours(x, where))
        if kind == "patch embedding":
            return entering(self._vit, lambda x: self._positions.alone(x, where))
        return nullcontext()

    def _look(
        self, batch: Tensor, outliers: Bool[Tensor, "b p"]
    ) -> tuple[Float[Tensor, "l k d"], Bool[Tensor, " k"]]:
        """What sets each outlier apart at each level, and which of them are left at the detect layer."""
        patches = self._layout.patch_slice
        levels: list[Tensor] = []
        left: list[Tensor] = []

        def level(stream: Tensor) -> None:
            here = stream[:, patches].float()
            levels.append((here - mean_over(here, ~outliers)[:, None])[outliers])

        def block(layer: int, stream: Tensor) -> None:
            level(stream)
            if layer == self.detect:
                left.append(token_norms(stream[:, patches])[outliers] >= self._threshold)
                raise Enough

        with entering(self._vit, level), watch(self._vit, on_block=block):
            run_until(self._vit, batch)
        return torch.stack(levels), left[0]

    def origin(self, cause: Candidate, control: float, tried: list[Candidate]) -> Origin:
        return Origin(
            kind=cause.kind,
            layers=cause.layers,
            positions=self._positions.outlying if cause.kind == "position embedding" else (),
            removed=1 - cause.left,
            adds=cause.adds,
            control=control,
            candidates=tuple(tried),
            images=self.images,
            outliers=self.outliers,
        )


class _Positions:
    """What enters block 0, taken apart into a constant for each position and the photo's own content.

    The constant is the mean over images of what is added to the patch embedding (where a norm lies behind the
    sum, of what that makes of it).
    """

    def __init__(self, vit: Backbone, batches: Sequence[Tensor], outliers: Bool[Tensor, "b p"]) -> None:
        self._layout = vit.layout_for(batches[0])
        self._often = outliers.float().mean(0)
        self._own = self._measured(vit, batches)
        self._excess = self._own - self._around()

    def _measured(self, vit: Backbone, batches: Sequence[Tensor]) -> Float[Tensor, "p d"]:
        sums: list[Tensor] = []
        embedding: list[Tensor] = []

        def enter(stream: Tensor) -> None:
            here = stream[:, self._layout.patch_slice].float()
            if embedding and embedding[-1].shape == here.shape:
                here = here - embedding[-1].float()
            sums.append(here.sum(0))
            raise Enough

        def embedded(patches: Tensor) -> None:
            embedding.append(patches.clone())  # some models add positions to this very tensor

        with entering(vit, enter), watch(vit, on_embedding=embedded):
            for batch in batches:
                run_until(vit, batch)
        return torch.stack(sums).sum(0) / sum(map(len, batches))

    def _around(self) -> Float[Tensor, "p d"]:
        """The mean constant of the up to 8 neighbours of each position, which count less the more often they
        are outliers themselves."""
        weight = self._layout.as_grid(1 - self._often)[None]
        planes = torch.cat([self._layout.as_grid(self._own.T) * weight, weight])[None]
        around = 9 * F.avg_pool2d(planes, 3, 1, 1) - planes
        around = around + 1e-6 * planes.mean((2, 3), keepdim=True)  # where all neighbours are outliers
        return (around[0, :-1] / around[0, -1:]).flatten(1).T

    @property
    def outlying(self) -> tuple[tuple[int, int], ...]:
        """(row, column) of the positions that are outliers in at least half of the images."""
        cells = self._layout.as_grid(self._often >= 0.5).nonzero().tolist()
        return tuple((row, column) for row, column in cells)

    def as_neighbours(self, x: Float[Tensor, "b n d"], where: Where) -> Float[Tensor, "b n d"]:
        """What enters block 0 with the position of their neighbours at some patches."""
        return where.replaced(x, x[:, where.patches] - self._excess)

    def alone(self, x: Float[Tensor, "b n d"], where: Where) -> Float[Tensor, "b n d"]:
        """What enters block 0 with the content of ordinary patches at some patches."""
        content = mean_over(x[:, where.patches] - self._own, where.ordinary)
        return where.replaced(x, content[:, None] + self._own)


def _as_many_others(mask: Bool[Tensor, "b p"], generator: torch.Generator) -> Bool[Tensor, "b p"]:
    """In each image, as many patches drawn from those outside of the mask as there are in it."""
    order = torch.rand(mask.shape, generator=generator).to(mask.device).masked_fill(mask, 2.0)
    rank = order.argsort(1).argsort(1)
    return (rank < mask.sum(1, keepdim=True)) & ~mask


def _blocks(layers: tuple[int, ...]) -> str:
    """As in "block 7", "blocks 5 to 10", "blocks 2, 4 and 5"."""
    if len(layers) == 1:
        return f"block {layers[0]}"
    if len(layers) > 2 and layers[-1] - layers[0] == len(layers) - 1:
        return f"blocks {layers[0]} to {layers[-1]}"
    return f"blocks {', '.join(map(str, layers[:-1]))} and {layers[-1]}"
