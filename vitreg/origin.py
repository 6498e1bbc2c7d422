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

from vitreg.carry import bare
from vitreg.diagnosis import Diagnosis
from vitreg.errors import FixError, ImageError
from vitreg.images import Batch, Images, first_images
from vitreg.models import Backbone
from vitreg.neurons import BATCH, SEARCHED, Enough, run_until
from vitreg.probe import evaluating
from vitreg.removal import Where, entering, mean_over, without_attention, without_mlps
from vitreg.trace import token_norms, watch

Kind = Literal["neurons", "position embedding", "attention output", "patch embedding", "unknown"]

# A branch of a block is a candidate if it adds this share of the excess.
TRIED = 0.05
# An origin adds this share of the excess at least, and without it this share of the outliers is gone.
ADDS, GONE = 0.25, 0.8
# The same removal at ordinary patches must not do this share of what it does at the outliers.
UNSPECIFIC = 0.5


class Candidate(NamedTuple):
    """One possible cause. `layers` are blocks (0-based), none for what enters block 0.

    `adds` is its share of the excess that sets outliers apart at the detect layer, `left` the share of the
    outliers that is left where it is removed.
    """

    kind: Kind
    layers: tuple[int, ...]
    adds: float
    left: float

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

    kind: Kind
    layers: tuple[int, ...]
    positions: tuple[tuple[int, int], ...]
    removed: float
    adds: float
    control: float
    candidates: tuple[Candidate, ...]
    images: int
    outliers: int

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON-ready values."""
        tried = [c._asdict() | {"name": c.name, "layers": list(c.layers)} for c in self.candidates]
        lists = {"layers": list(self.layers), "positions": [list(cell) for cell in self.positions]}
        return vars(self) | lists | {"candidates": tried, "text": str(self)}

    def __str__(self) -> str:
        if self.kind == "unknown":
            return self._nothing()
        name = Candidate(self.kind, self.layers, self.adds, self.removed).name
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
            f"{name} {verb} them{cells}: {without} {self.removed:.0%} of the outliers are gone"
            f" ({self.control:.0%} with the same change at as many ordinary patches)."
        )

    def _nothing(self) -> str:
        most = max(self.candidates, key=lambda candidate: candidate.adds)
        return (
            f"nothing that can be named makes them: no part of the model that adds {ADDS:.0%} of their excess"
            f" takes {GONE:.0%} of them away when it is removed at these patches, and only there. Most is"
            f" added by {most.name}: {most.adds:.0%}; without it {1 - most.left:.0%} are gone."
        )


def find_origin(
    vit: Backbone, images: Images | list[Batch] | list[Tensor], diagnosis: Diagnosis, *, seed: int = 0
) -> Origin:
    """What makes the outliers of a diagnosis, found by removing candidates and looking.

    `images` are the diagnosis' own, or others of the same size; the first 64 are looked at, without any fix
    that is applied to the model. Candidates are the position embedding, the patch embedding, and of the
    blocks up to the detect layer each MLP and each attention output that adds at least 5% of the excess,
    alone and together. The origin is the one that adds most, of those that add at least a quarter and without
    which at least 80% of the outliers are gone, more than twice as many as when the same is removed at as
    many ordinary patches, drawn by `seed`.

    Costs one whole pass over these images, one up to block 0, and passes that end at the detect layer: 4, one
    for each block that adds 5%, and one for each attention output and group to be tried. That is 5 where the
    MLP of one block makes the outliers, 11 where those of six blocks do. The model is left as it was. Raises
    FixError for a diagnosis without artifacts, ImageError if no patch of these images is an outlier.
    """
    if not diagnosis.has_artifacts or diagnosis.threshold is None:
        raise FixError("the diagnosis found no artifacts, so nothing makes them: there is no origin to find.")
    pixels = first_images(images, SEARCHED)
    with bare(vit.model), evaluating(vit.model):
        passes = _Passes(vit, pixels, diagnosis, seed)
        tried = _tried(passes)
        named = sorted(
            (c for c in tried if c.adds >= ADDS and c.left <= 1 - GONE), key=lambda c: c.adds, reverse=True
        )
        for candidate in named:
            control = 1 - passes.run(candidate.kind, candidate.layers, control=True).left
            if control < UNSPECIFIC * (1 - candidate.left):
                return passes.origin(candidate, control, tried)
    return passes.origin(Candidate("unknown", (), 0.0, 1.0), 0.0, tried)


def _tried(passes: "_Passes") -> list[Candidate]:
    """All candidates, with what they add and what is left without them."""
    plain = passes.plain
    position, patch = passes.run("position embedding"), passes.run("patch embedding")
    by_position = plain.level(-1) - position.level(-1)
    tried = [
        Candidate("position embedding", (), by_position, position.left),
        Candidate("patch embedding", (), plain.level(-1) - by_position, patch.left),
    ]
    mlps, attentions = [], []
    for layer in range(passes.detect + 1):
        added = plain.level(layer) - plain.level(layer - 1)
        if abs(added) < TRIED:
            continue
        mlp = passes.run("neurons", (layer,))
        by_mlp = plain.level(layer) - mlp.level(layer)
        if by_mlp >= TRIED:
            mlps.append(Candidate("neurons", (layer,), by_mlp, mlp.left))
        if added - by_mlp >= TRIED:
            left = passes.run("attention output", (layer,)).left
            attentions.append(Candidate("attention output", (layer,), added - by_mlp, left))
    for branch in (mlps, attentions):
        tried += branch
        if len(branch) > 1:
            kind, layers = branch[0].kind, tuple(layer for one in branch for layer in one.layers)
            adds = sum(one.adds for one in branch)
            tried.append(Candidate(kind, layers, adds, passes.run(kind, layers).left))
    return tried


# -- passes ----------------------------------------------------------------------------------------


class _Pass(NamedTuple):
    """What one pass over all images showed: how much of the excess is there at each level (what enters block
    0, then the stream after each block), and the share of the outliers that is left at the last one."""

    levels: list[float]
    left: float

    def level(self, layer: int) -> float:
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
        self._positions = _Positions(vit, self._batches, torch.cat(self._masks))
        self.plain = self.run("unknown")

    def run(self, kind: Kind, layers: tuple[int, ...] = (), *, control: bool = False) -> _Pass:
        """One pass without a candidate ("unknown": nothing), at the outliers or at as many others."""
        left, sums = 0, torch.zeros(self.detect + 2, dtype=torch.float64)
        for index, batch in enumerate(self._batches):
            outliers = self._masks[index]
            at = self._others[index] if control else outliers
            where = Where(at, ~(at | outliers), self._layout.patch_slice)
            with self._without(kind, layers, where):
                levels, still = self._look(batch, outliers)
            excess = self._excess.setdefault(index, levels[-1])  # of the first, plain pass
            sums += ((levels * excess).sum(-1) / excess.square().sum(-1)).double().sum(1).cpu()
            left += still
        return _Pass((sums / self.outliers).tolist(), left / self.outliers)

    def _without(self, kind: Kind, layers: tuple[int, ...], where: Where) -> AbstractContextManager[Any]:
        if kind == "neurons":
            return without_mlps(self._vit, layers, where)
        if kind == "attention output":
            return without_attention(self._vit, layers, where)
        if kind == "position embedding":
            return entering(self._vit, lambda x: self._positions.as_neighbours(x, where))
        if kind == "patch embedding":
            return entering(self._vit, lambda x: self._positions.alone(x, where))
        return nullcontext()

    def _look(self, batch: Tensor, outliers: Bool[Tensor, "b p"]) -> tuple[Float[Tensor, "l k d"], int]:
        """What sets each outlier apart at each level, and how many of them are left at the detect layer."""
        patches, levels, left = self._layout.patch_slice, [], 0

        def level(stream: Tensor) -> None:
            here = stream[:, patches].float()
            levels.append((here - mean_over(here, ~outliers)[:, None])[outliers])

        def block(layer: int, stream: Tensor) -> None:
            nonlocal left
            level(stream)
            if layer == self.detect:
                left = int((token_norms(stream[:, patches])[outliers] >= self._threshold).sum())
                raise Enough

        with entering(self._vit, level), watch(self._vit, on_block=block):
            run_until(self._vit, batch)
        return torch.stack(levels), left

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
