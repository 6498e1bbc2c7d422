"""A linear head on patch tokens, for tasks that ask for a map: segmentation and depth.

    frame = Frame.of(vit, side=448)
    tokens = Tokens.of(vit, paths, frame, layers=[11], config=config)
    for i, outputs in predictions(tokens, targets, splits, loss, classes, config):    # outputs (w, p, c)
        frame.join(outputs, height, width)                                            # (c, h, w)

The head is BatchNorm and a 1x1 convolution, that is, one linear map for all patches, as in DINOv2's
evaluations. It is trained on cached tokens against what a patch's pixels sum up to (how many are of each
class, say): the loss is that of all pixels, each against its patch's output, at a fraction of the work.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Shaped
from sklearn.model_selection import GroupKFold, KFold
from torch import Tensor, nn

from vitreg.errors import DataError
from vitreg.evals.outlier_masks import unfixed_diagnosis
from vitreg.features.config import Config
from vitreg.features.extraction import Features, extract_features
from vitreg.features.framing import Framing, Windows, normalisation_of
from vitreg.fixes.base import without_fixes
from vitreg.models.backbone import Backbone

EXAMPLES = 4  # photos that a figure shows
DIAGNOSED = 32  # photos that say where the outliers begin
Fold = tuple[list[int], list[int]]  # positions of the photos to train on, and of those to predict
Loss = Callable[[Tensor, Tensor], Tensor]  # outputs (t, c) and targets (t, k) of patches -> a number


@dataclass(frozen=True)
class DenseConfig(Config):
    """`side`: pixels of the photo's shorter side (default: the model's); `layers` to concatenate, 1 or 4.

    The head is trained for `steps` of `batch` photos with AdamW, its learning rate falling to 0. `folds`: of
    the cross-validation, where the data have no split.
    """

    side: int | None = None
    layers: int = 1
    steps: int = 1000
    batch: int = 8
    learning_rate: float = 1e-3
    folds: int = 5

    def __post_init__(self) -> None:
        for name in ("layers", "steps", "batch", "bins"):  # bins: depth's
            if (value := getattr(self, name, 1)) < 1:
                raise DataError(f"setting {name}={value}: expected 1 or more.")


# -- from photo to patches and back ------------------------------------------------------------------


@dataclass(frozen=True)
class Frame:
    """A photo at the scale of the evaluation, and the windows and patches that it is cut into."""

    framing: Framing
    windows: Windows
    patch: tuple[int, int]

    @staticmethod
    def of(vit: Backbone, side: int | None) -> "Frame":
        """Windows of the model's size, 2/3 of that apart (in whole patches)."""
        size, patch = vit.image_size, vit.anatomy.patch_size
        if side is not None and side < max(size):
            raise DataError(f"setting side={side}: a window of the model takes {max(size)} pixels or more.")
        stride = tuple(max(1, round(2 / 3 * s / p)) * p for s, p in zip(size, patch, strict=True))
        framing = Framing(normalisation_of(vit), side=side or max(size))
        return Frame(framing, Windows(size, (stride[0], stride[1])), patch)

    def cut(self, values: Shaped[np.ndarray, "_ _"]) -> Shaped[Tensor, "w p pixels"]:
        """The pixels of each patch of each window, from a map of the photo; nearest neighbours."""
        rows, columns = (
            ((np.arange(new) + 0.5) * old / new).astype(int)
            for new, old in zip(self.framing.scaled_size(*values.shape), values.shape, strict=True)
        )
        scaled = torch.from_numpy(values[rows][:, columns])
        (h, w), (ph, pw) = self.windows.size, self.patch
        cells = [
            scaled[top : top + h, left : left + w].unfold(0, ph, ph).unfold(1, pw, pw).reshape(-1, ph * pw)
            for top, left in self.windows.corners(*scaled.shape)
        ]
        return torch.stack(cells)

    def join(self, outputs: Float[Tensor, "w p c"], height: int, width: int) -> Float[Tensor, "c _ _"]:
        """Outputs as one map of the photo's size: bilinear in each window, averaged where they overlap."""
        h, w = self.windows.size
        grid = (h // self.patch[0], w // self.patch[1])
        maps = F.interpolate(outputs.movedim(2, 1).unflatten(2, grid), size=(h, w), mode="bilinear")
        scaled = self.framing.scaled_size(height, width)
        total, count = maps.new_zeros(maps.shape[1], *scaled), maps.new_zeros(scaled)
        for (top, left), part in zip(self.windows.corners(*scaled), maps, strict=True):
            total[:, top : top + h, left : left + w] += part
            count[top : top + h, left : left + w] += 1
        return F.interpolate((total / count)[None], size=(height, width), mode="bilinear")[0]


@dataclass(frozen=True)
class Tokens:
    """Patch tokens of some layers, concatenated, for each photo that could be read.

    With `cls`, each patch has its window's CLS token after it. They stay on disk where there is a cache.
    """

    found: Features
    layers: tuple[int, ...]
    cls: bool
    device: torch.device

    @staticmethod
    def of(
        vit: Backbone,
        paths: Sequence[Path],
        frame: Frame,
        layers: Sequence[int],
        config: Config,
        cls: bool = False,
    ) -> "Tokens":
        """Runs the model over the photos (all of them: the caller has minded config.limit).

        Raises DataError where the model has fewer layers than are to be concatenated.
        """
        if len(layers) != len(set(layers)) or not all(0 <= layer < vit.anatomy.depth for layer in layers):
            raise DataError(f"setting layers={len(layers)}: {vit.name} has {vit.anatomy.depth}.")
        cls = cls and vit.layout.prefix > 0
        wanted = [f"{name}@{layer}" for layer in layers for name in ("patches", *["cls"][:cls])]
        found = extract_features(
            vit,
            paths,
            wanted,
            replace(config, limit=None),
            frame.framing,
            frame.windows,
            dtype=torch.float16,  # half the disk; a token's entries are far from its largest number
        )
        return Tokens(found, tuple(layers), cls, vit.device)

    @cached_property
    def row(self) -> dict[int, int]:
        """The photos that could be read: where each is in `found`, by its position in the list."""
        return {position: row for row, position in enumerate(self.found.index)}

    def __getitem__(self, position: int) -> Float[Tensor, "w p d"]:
        row = self.row[position]
        parts = [self.found.of(f"patches@{layer}", row) for layer in self.layers]
        if self.cls:
            whole = [self.found.of(f"cls@{layer}", row) for layer in self.layers]
            parts += [token[:, None].expand(-1, parts[0].shape[1], -1) for token in whole]
        return torch.cat(parts, -1).to(self.device, torch.float32)


# -- the head ----------------------------------------------------------------------------------------


def splits_of(train: int, groups: Sequence[str], k: int) -> list[Fold]:
    """The data's own split, if the first `train` photos are for training; else k folds, so that each photo is
    predicted once, by a head that has seen neither it nor another of its group. Where all are of one group,
    folds are runs of neighbours: a film's frames then meet at their edges only. Nothing is drawn at random.
    """
    n, distinct = len(groups), len(set(groups))
    if train:
        return [(list(range(train)), list(range(train, n)))]
    if n < 2 or k < 2:
        raise DataError(
            f"{n} photos in {k} folds: expected 2 or more of both, to train on some and test on others."
        )
    if distinct > 1:
        parts = GroupKFold(min(k, distinct)).split(groups, groups=groups)
    else:
        parts = KFold(min(k, n)).split(groups)
    return [(train.tolist(), test.tolist()) for train, test in parts]


def readable(splits: Sequence[Fold], tokens: Tokens) -> list[Fold]:
    """The splits without the photos that could not be read. Raises DataError if that leaves nothing."""
    kept = [
        ([i for i in train if i in tokens.row], [i for i in test if i in tokens.row])
        for train, test in splits
    ]
    if not all(train for train, _ in kept) or not any(test for _, test in kept):
        raise DataError("no photo to train the head on, or none to test it on, could be read.")
    return kept


def split_notes(splits: Sequence[Fold], groups: Sequence[str]) -> tuple[str, ...]:
    """What a reader must know of data without a split."""
    if len(splits) == 1:
        return ()
    n, scenes = len(groups), len(set(groups))
    how = "whole scenes" if scenes > 1 else "runs of neighbouring names"
    note = (
        f"The data have no split: {len(splits)}-fold cross-validation over {how}. Each photo is predicted"
        " once, by a head that has not seen it."
    )
    if scenes == 1:
        return (note,)
    return note, f"The {n} photos are of {scenes} scenes: intervals say nothing about other scenes."


def predictions(
    tokens: Tokens,
    targets: Mapping[int, Tensor],
    splits: Sequence[Fold],
    loss: Loss,
    outputs: int,
    config: DenseConfig,
) -> Iterator[tuple[int, Float[Tensor, "w p c"]]]:
    """Train a head for each split, and give its outputs on the photos to predict, with their positions."""
    for train, test in splits:
        head = trained(tokens, targets, train, loss, outputs, config)
        for i in test:
            x = tokens[i]
            with torch.no_grad():
                y = head(x.flatten(0, 1))
            yield i, y.unflatten(0, x.shape[:2]).cpu()


def trained(
    tokens: Tokens,
    targets: Mapping[int, Tensor],
    chosen: Sequence[int],
    loss: Loss,
    outputs: int,
    config: DenseConfig,
) -> nn.Module:
    """A head for the chosen photos; equal seeds make equal heads. Targets (w, p, k) may be sparse."""
    random = torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        width = tokens[chosen[0]].shape[2]
        linear = nn.Linear(width, outputs)
        nn.init.normal_(linear.weight, std=0.01)  # small, so that heads of other seeds end near each other
        nn.init.zeros_(linear.bias)
    head = nn.Sequential(nn.BatchNorm1d(width), linear).to(tokens.device)
    optimiser = torch.optim.AdamW(head.parameters(), lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, config.steps)
    for batch in _batches(chosen, config.batch, config.steps, random):
        x = torch.cat([tokens[i] for i in batch]).flatten(0, 1)
        y = torch.cat([targets[i].to_dense() for i in batch]).flatten(0, 1).to(x)
        optimiser.zero_grad()
        loss(head(x), y).backward()
        optimiser.step()
        schedule.step()
    return head.eval()


def _batches(chosen: Sequence[int], size: int, steps: int, random: torch.Generator) -> Iterator[list[int]]:
    """Photos in a new order each time that all have been seen."""
    waiting: list[int] = []
    for _ in range(steps):
        while len(waiting) < size:
            waiting += [chosen[k] for k in torch.randperm(len(chosen), generator=random).tolist()]
        yield waiting[:size]
        waiting = waiting[size:]


# -- where the artifacts were ------------------------------------------------------------------------


def former_outliers(
    vit: Backbone, paths: Sequence[Path], tested: Sequence[int], frame: Frame, config: Config
) -> dict[int, Bool[Tensor, "_ p"]]:
    """The outlier patches of the model without its fix in the tested photos; empty if it has none."""
    paths, everything = [paths[i] for i in tested], replace(config, limit=None)
    report = unfixed_diagnosis(vit, paths, replace(config, limit=DIAGNOSED))
    if not report.rule.marks_any:
        return {}
    name = f"norms@{report.rule.layer}"
    with without_fixes(vit.model):
        found = extract_features(vit, paths, [name], everything, frame.framing, frame.windows)
    rows = zip(found.index, found.each(name), strict=True)
    masks = {tested[row]: report.rule.mask(norms) for row, norms in rows}
    return masks if any(mask.any() for mask in masks.values()) else {}
