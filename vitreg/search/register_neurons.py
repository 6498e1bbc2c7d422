"""Find the MLP neurons that make the outliers: the register neurons of Jiang et al.

    report = diagnose(vit, photos)
    neurons = find_register_neurons(vit, photos, report)
    print(neurons)                    # block 7: 417 ...

A neuron's activation is the input of its MLP's down-projection. One pass after the diagnosis, which ends
at the layer where outliers are told apart; what is kept does not grow with the number of images.

The residual stream is a sum, so what sets outliers apart from ordinary patches is a sum, too: of what the
MLPs and attentions of all blocks up to there write at outliers more than elsewhere. A neuron is scored by its
part.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vitreg.data.batches import BATCH, Batch, pixels_of
from vitreg.data.first_images import First, ranks_of
from vitreg.diagnosis.outliers import OutlierRule
from vitreg.diagnosis.result import Diagnosis
from vitreg.distributed import Ranks
from vitreg.errors import FixError, UnsupportedModelError
from vitreg.fixes.neurons import RegisterNeuron, RegisterNeurons
from vitreg.hooks.weights import dense_weight
from vitreg.models.backbone import Backbone
from vitreg.models.fingerprint import Fingerprint
from vitreg.models.probe import evaluating
from vitreg.models.write_gain import write_gains
from vitreg.search.choices import Method
from vitreg.tracing.early_stop import Enough, run_until
from vitreg.tracing.streams import token_norms, watch

# A neuron that is silent has |activation| under this; one that is not silent on half of the tokens does
# ordinary work and is no register neuron (the sparsity filter).
SILENT, MIN_SILENT_SHARE = 0.5, 0.5


# Normal tokens looked at per image, spread evenly: their mean needs no more.
SAMPLED_TOKENS = 64


# Activations that one pass may hold at a time, in bytes.
HELD = 1 << 30


# Images, the first ones, on which the number of neurons is searched.
SEARCHED = 64


# Of numbers of neurons that leave so few more of the outliers than the best, the smallest is taken.
NEARLY = 0.01


# How many of the best neurons are kept with their scores.
RANKED = 256


def find_register_neurons(
    vit: Backbone,
    images: Iterable[Batch] | Iterable[Tensor],
    report: Diagnosis,
    *,
    method: Method = "contrast",
    top_k: int | Literal["auto"] = "auto",
    top_layer: int | None = None,
    target: float = 0.05,
) -> RegisterNeurons:
    """The neurons that make the outliers of a diagnosis, and how many of them to edit.

    `images` are the diagnosis' own, or others of the same size. Scores, per neuron:

    - "paper" (Jiang et al., Algorithm 1): |activation| at outlier positions, mean over the positions of an
      image, then over images. Blocks up to `top_layer` are searched, by default the onset layer.
    - "contrast": the same less the mean |activation| elsewhere, times the length of what the neuron writes
      into the residual stream, of neurons that are silent on at least half of the tokens. `top_layer` is by
      default the detect layer: several blocks may build outliers up together.

    `top_k="auto"` takes the smallest count (by doubling, then bisection) that leaves at most `target` of the
    outliers, and twice that of their excess, when they are moved to a test-time register. Where none does,
    the fewest that leave nearly as few outliers as any. Raises FixError for a diagnosis without artifacts.
    """
    if not report.has_artifacts or report.threshold is None or report.onset_layer is None:
        raise FixError("the diagnosis found no artifacts, so no neuron makes them: there is nothing to fix.")
    default = report.onset_layer if method == "paper" else report.detect_layer
    top = default if top_layer is None else top_layer
    if not 0 <= top <= report.detect_layer:
        raise ValueError(f"top_layer={top}: expected 0 to the detect layer, {report.detect_layer}.")
    sums = _ActivationSums(vit, top, report.rule)
    kept = sums.run(vit, images)  # of all ranks, which go on alike
    ranking = sums.ranked(method, _written(vit, top), report.statistics.excess(report.rule))
    found = RegisterNeurons(
        (), ranking, method, top, report.detect_layer, report.threshold, sums.images,
        fingerprint=Fingerprint.of(vit),
    )  # fmt: skip
    if top_k != "auto":
        return found.best(top_k)
    return _searched(vit, kept, found, target)


class _ActivationSums:
    """Sums over images of what neurons do at outliers and elsewhere, (l, f), in float64."""

    def __init__(self, vit: Backbone, top: int, rule: OutlierRule) -> None:
        self._top, self._rule = top, rule

        def zeros() -> Tensor:
            return torch.zeros(top + 1, vit.anatomy.neurons, dtype=torch.float64, device=vit.device)

        self.outlier, self.outlier_signed = zeros(), zeros()
        self.normal, self.normal_signed, self.silent = zeros(), zeros(), zeros()
        self.images = self.with_outliers = self.sampled = self.sampled_normal = 0
        self._held: dict[int, Tensor] = {}

    def run(self, vit: Backbone, images: Iterable[Batch] | Iterable[Tensor]) -> list[Tensor]:
        """Add all images; returns batches of the first of them."""
        kept = First(SEARCHED, images)
        with evaluating(vit.model), watch(vit, on_block=self._block, on_neurons=self._neurons) as self._watch:
            for batch in images:
                kept.add(batch)
                for part in pixels_of(batch).split(self._at_once(vit, pixels_of(batch))):
                    run_until(vit, part)
        self._put_together(ranks_of(images))
        return list(kept.together().split(BATCH))

    def _put_together(self, ranks: Ranks) -> None:
        for name in ("outlier", "outlier_signed", "normal", "normal_signed", "silent"):
            setattr(self, name, ranks.add(getattr(self, name)))
        for name in ("images", "with_outliers", "sampled", "sampled_normal"):
            setattr(self, name, sum(ranks.gather(getattr(self, name))))

    def _at_once(self, vit: Backbone, pixels: Tensor) -> int:
        tokens = vit.layout_for(pixels).tokens
        size = tokens * vit.anatomy.neurons * (self._top + 1) * vit.dtype.itemsize
        return max(HELD // size, 1)

    def _neurons(self, layer: int, activation: Tensor) -> None:
        if layer <= self._top:
            self._held[layer] = activation[:, self._watch.inner.patch_slice]

    def _block(self, layer: int, residual: Tensor) -> None:
        if layer == self._rule.layer:
            patches = self._watch.layout.patch_slice
            self._add(self._rule.mask(token_norms(residual[:, patches])))
            raise Enough

    def _add(self, outliers: Bool[Tensor, "b p"]) -> None:
        each = outliers.sum(1)
        self.images += len(outliers)
        self.with_outliers += int((each > 0).sum())
        # Mean over an image's outliers, then over images: each outlier weighs one over their number.
        weights = (outliers / each.clamp(min=1)[:, None])[outliers].double()
        stride = max(outliers.shape[1] // SAMPLED_TOKENS, 1)
        normal = ~outliers[:, ::stride]
        for layer, patches in self._held.items():
            at = patches[outliers].double()
            self.outlier[layer] += weights @ at.abs()
            self.outlier_signed[layer] += weights @ at
            few = patches[:, ::stride].float()
            some = few[normal].abs()
            self.normal[layer] += some.sum(0)
            self.normal_signed[layer] += few[normal].sum(0)
            self.silent[layer] += (few.abs() < SILENT).sum((0, 1))
        self.sampled_normal += int(normal.sum())
        self.sampled += normal.numel()
        self._held.clear()

    def ranked(
        self, method: Method, written: Float[Tensor, "l d f"], excess: Float[Tensor, " d"]
    ) -> tuple[RegisterNeuron, ...]:
        at = self.outlier / max(self.with_outliers, 1)
        signed = self.outlier_signed / max(self.with_outliers, 1)
        normal, elsewhere = self.normal / self.sampled_normal, self.normal_signed / self.sampled_normal
        silent = self.silent / self.sampled
        toward = (excess / excess.square().sum().clamp(min=1e-30)).to(written)
        along = torch.einsum("d,ldf->lf", toward, written)
        share = (signed - elsewhere) * along.to(signed)
        score = at
        if method == "contrast":
            written_length = written.norm(dim=1).to(at)
            score = torch.where(silent >= MIN_SILENT_SHARE, (at - normal) * written_length, -torch.inf)
        best = score.flatten().topk(min(RANKED, int((score > -torch.inf).sum()))).indices.tolist()
        pairs = [divmod(flat, score.shape[1]) for flat in best]
        figures = (score, signed, elsewhere, silent, torch.full_like(score, torch.nan), share)
        return tuple(
            RegisterNeuron(layer, index, *(float(x[layer, index]) for x in figures)) for layer, index in pairs
        )


def _written(vit: Backbone, top: int) -> Float[Tensor, "l d f"]:
    """What one unit of each neuron's activation writes into the residual stream, per block up to `top`."""
    layers = list(range(top + 1))
    try:
        gains: dict[int, Tensor] = write_gains(vit, layers)
    except UnsupportedModelError:  # a norm behind the MLP: what it makes of one neuron depends on the others
        gains = {}
    with evaluating(vit.model):
        downs = vit.anatomy.down_projections(vit.model)[: top + 1]
        weights = [dense_weight(down).float() for down in downs]
    return torch.stack(
        [
            weight * gains[layer][:, None] if layer in gains else weight
            for layer, weight in zip(layers, weights, strict=True)
        ]
    )


def _searched(vit: Backbone, images: list[Tensor], found: RegisterNeurons, target: float) -> RegisterNeurons:
    """The smallest count that leaves at most `target` of the outliers: doubling, then bisection."""
    from vitreg.fixes.registers import TestTimeRegisters

    before = _Outliers(vit, found.rule)
    before.see(images)
    tried: dict[int, float] = {}
    registers = 0 if vit.anatomy.no_registers else 1

    def left(count: int) -> float:
        if count not in tried:
            with TestTimeRegisters(found.best(count), registers).applied_to(vit):
                tried[count] = before.left(images)
        return tried[count]

    return _smallest(found, left, target, tried)


class _Outliers:
    """The outliers of the model as it is, and what a fix leaves of them, at the rule's layer."""

    def __init__(self, vit: Backbone, rule: OutlierRule) -> None:
        self._vit, self._rule = vit, rule
        self._masks: list[Tensor] = []

    def see(self, images: list[Tensor]) -> None:
        """Look at the model as it is."""
        self._count, self._excess = self._pass(images)

    def left(self, images: list[Tensor]) -> float:
        """The share that is left: of outliers, or, if it is more, of half their excess.

        Where norms of outliers overlap with those of others, patches sink below the threshold long before
        what sets them apart is gone. The excess is the former outliers' mean less that of other patches.
        """
        count, excess = self._pass(images)
        along = float(excess @ self._excess / self._excess.square().sum().clamp(min=1e-30))
        return max(count / max(self._count, 1), along / 2)

    def _pass(self, images: list[Tensor]) -> tuple[int, Float[Tensor, " d"]]:
        """How many outliers there are now, and the excess of the former ones."""
        now: list[Tensor] = []
        former: list[Tensor] = []
        others: list[Tensor] = []

        def block(layer: int, residual: Tensor) -> None:
            if layer != self._rule.layer:
                return
            patches = residual[:, seen.layout.patch_slice].float()
            now.append(self._rule.mask(token_norms(patches)))
            mask = self._masks[len(now) - 1] if self._masks else now[-1]
            former.append(patches[mask].sum(0))
            others.append(patches[~mask].sum(0))
            raise Enough

        with evaluating(self._vit.model), watch(self._vit, on_block=block) as seen:
            for batch in images:
                run_until(self._vit, batch)
        self._masks = self._masks or now
        count = sum(int(mask.sum()) for mask in self._masks)
        rest = sum(mask.numel() for mask in self._masks) - count
        excess = torch.stack(former).sum(0) / max(count, 1) - torch.stack(others).sum(0) / max(rest, 1)
        return sum(int(mask.sum()) for mask in now), excess


def _smallest(
    found: RegisterNeurons, left: Callable[[int], float], target: float, tried: dict[int, float]
) -> RegisterNeurons:
    low, high, most = 0, 1, len(found.ranking)
    while left(high) > target and high < most:
        low, high = high, min(2 * high, most)
    reached = left(high) <= target
    if not reached:  # the fewest that do nearly as well as the best that was seen: more would only cost more
        enough = min(tried.values()) + NEARLY
        high = min(count for count, share in tried.items() if share <= enough)
        low = high - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if left(middle) <= target else (middle, high)
    search = tuple(sorted(tried.items()))
    return replace(found.best(high), search=search, reached=reached)
