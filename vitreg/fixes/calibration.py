"""At which activation a register neuron marks a token: between its normal tokens and its outliers.

    neurons, most = calibrate_thresholds(vit, photos, neurons)      # each with its `threshold`

Used by token splitting, which decides token by token. Also finds the neurons that feed the register
neurons: those of the ranking that keep outliers and normal tokens apart all by themselves.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vitreg.data.batches import BATCH, Batch
from vitreg.data.first_images import first_images
from vitreg.diagnosis.outliers import OutlierRule
from vitreg.errors import FixError
from vitreg.fixes.neurons import RegisterNeuron, RegisterNeurons
from vitreg.models.backbone import Backbone
from vitreg.models.probe import evaluating
from vitreg.tracing.early_stop import Enough, run_until
from vitreg.tracing.streams import token_norms, watch

# Levels of a neuron's activation: beyond all but one in a thousand normal tokens, and the outliers' lowest
# twentieth and highest tenth.
NORMAL_HIGH, OUTLIER_LOW, OUTLIER_HIGH = 0.999, 0.05, 0.9
# A neuron marks a token from this share of the way on, from a high normal activation to a low one of
# outliers (a high one, where a neuron serves only some outliers). Near the normal end, for a copy too many
# harms nobody.
MARK = 0.1
# Outliers and normal tokens are apart if their levels differ by this factor.
APART = 2.0
SMALLEST = 1e-3  # an activation that is as good as none
# Images looked at.
IMAGES = 64


def calibrate_thresholds(
    vit: Backbone,
    images: Iterable[Batch] | Iterable[Tensor],
    neurons: RegisterNeurons,
    *,
    feeders: bool = True,
) -> tuple[RegisterNeurons, float]:
    """The chosen neurons, each with the activation from which on it marks a token, in `threshold`.

    Also the largest share of an image's patches that they mark.

    With `feeders`, also those of the ranking whose lowest outlier activations are over twice their highest
    normal ones (percentiles 5 and 99.9): they lead up to the outliers, and without them a copy is cleaner.
    Looks at the first 64 images. Raises FixError where it cannot tell outliers: for neurons without a
    search's evidence, or images without outliers; ImageError without images.
    """
    rule = _rule_of(neurons)
    candidates = list(dict.fromkeys((*neurons.chosen, *(neurons.ranking if feeders else ()))))
    values, outliers = _activations(vit, images, rule, candidates)
    if not outliers.any():
        raise FixError(
            "none of these images has an outlier to set thresholds by. Give images that have some."
        )
    levelled = [_levelled(neuron, values[..., i], outliers) for i, neuron in enumerate(candidates)]
    chosen = [neuron for neuron, _ in levelled[: len(neurons.chosen)]]
    more = [neuron for neuron, apart in levelled[len(neurons.chosen) :] if apart]
    kept = [i for i, (_, apart) in enumerate(levelled) if apart or i < len(chosen)]
    thresholds = torch.tensor([levelled[i][0].threshold for i in kept]).to(values)
    marked = (values[..., kept] / thresholds >= 1).any(-1)
    return replace(neurons, chosen=(*chosen, *more)), float(marked.float().mean(1).max())


def _rule_of(neurons: RegisterNeurons) -> OutlierRule:
    """What the search took for an outlier."""
    if neurons.threshold is None or neurons.detect_layer is None:
        raise FixError(
            "these neurons come without the norm that makes an outlier. Find them with"
            " find_register_neurons, or set threshold and detect_layer."
        )
    return neurons.rule


def _levelled(
    neuron: RegisterNeuron, values: Float[Tensor, "b p"], outliers: Bool[Tensor, "b p"]
) -> tuple[RegisterNeuron, bool]:
    """The neuron with its threshold, and whether it keeps outliers and normal tokens apart."""
    sign = -1.0 if values[outliers].mean() < values[~outliers].mean() else 1.0
    normal, outlier = (sign * values[~outliers]), (sign * values[outliers])
    high, low, top = (
        _quantile(x, q) for x, q in ((normal, NORMAL_HIGH), (outlier, OUTLIER_LOW), (outlier, OUTLIER_HIGH))
    )
    apart = low > APART * max(high, 0.0)
    level = high + MARK * max((low if apart else top) - high, 0.0)
    return replace(neuron, threshold=sign * max(level, SMALLEST)), apart


def _quantile(x: Float[Tensor, " t"], q: float) -> float:
    """torch.quantile refuses more than 16 million values."""
    return float(x.kthvalue(1 + round(q * (len(x) - 1))).values)


def _activations(
    vit: Backbone,
    images: Iterable[Batch] | Iterable[Tensor],
    rule: OutlierRule,
    candidates: list[RegisterNeuron],
) -> tuple[Float[Tensor, "b p k"], Bool[Tensor, "b p"]]:
    """Activations of the candidates on all patches of some images, and which patches are outliers."""
    columns = {
        layer: [i for i, c in enumerate(candidates) if c.layer == layer]
        for layer in {c.layer for c in candidates}
    }
    values: list[Tensor] = []
    masks: list[Tensor] = []

    def saw_neurons(layer: int, activation: Tensor) -> None:
        if layer == min(columns):
            values.append(activation.new_zeros(len(activation), seen.layout.patches, len(candidates)).float())
        if layer in columns:
            index = torch.tensor([candidates[i].index for i in columns[layer]], device=activation.device)
            patches = activation[:, -seen.layout.patches :]
            values[-1][..., columns[layer]] = patches.index_select(-1, index).float()

    def saw_block(layer: int, residual: Tensor) -> None:
        if layer == rule.layer:
            masks.append(rule.mask(token_norms(residual[:, seen.layout.patch_slice])))
            raise Enough

    with evaluating(vit.model), watch(vit, on_block=saw_block, on_neurons=saw_neurons) as seen:
        for pixels in first_images(images, IMAGES).split(BATCH):
            run_until(vit, pixels)
    return torch.cat(values), torch.cat(masks)


# More registers than this are not worth their cost.
MOST_REGISTERS = 8


def mean_outliers(
    vit: Backbone,
    images: Iterable[Batch] | Iterable[Tensor],
    neurons: RegisterNeurons,
    layer: int,
    count: int | None = None,
) -> Float[Tensor, "r d"]:
    """The mean stream of outlier tokens where it enters block `layer` (0-based, zeros for block 0).

    One row for each of the `count` most frequent places of outliers in the grid, by default as many as an
    image has on average. Looks at the first 64 images; raises FixError if none has an outlier.
    """
    rule = _rule_of(neurons)
    sums = places = torch.zeros(())
    entering: list[Tensor] = []

    def saw_block(index: int, residual: Tensor) -> None:
        nonlocal sums, places
        patches = residual[:, seen.layout.patch_slice]
        if index == layer - 1:
            entering.append(patches.double())
        if index == rule.layer:
            outliers = rule.mask(token_norms(patches)).double()
            stream = entering.pop() if entering else torch.zeros_like(patches, dtype=torch.float64)
            sums = sums + torch.einsum("bp,bpd->pd", outliers, stream)
            places = places + outliers.sum(0)
            raise Enough

    looked_at = first_images(images, IMAGES)
    with evaluating(vit.model), watch(vit, on_block=saw_block) as seen:
        for pixels in looked_at.split(BATCH):
            run_until(vit, pixels)
    if not places.any():
        raise FixError("none of these images has an outlier to learn from. Give images that have some.")
    average = round(float(places.sum()) / len(looked_at))
    count = min(max(average, 1), MOST_REGISTERS) if count is None else count
    best = places.topk(min(count, int((places > 0).sum()))).indices
    found = sums[best] / places[best, None]
    return found[torch.arange(count) % len(found)].float().cpu()
