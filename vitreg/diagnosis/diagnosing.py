"""Does a model have attention artifacts, where, from which layer on, and what do they do?

    report = diagnose(vit, photos)
    print(report)
    report.outliers(vit, batch)       # (b, gh, gw) masks

One pass over the images. Layers are 0-based: layer i is the residual stream after block i, before any
final norm. An outlier is a patch token whose norm belongs to a second population (populations.py) that other
evidence shows to be an artifact (judging.py); a model without one has no artifacts.
"""

import itertools
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import median

import numpy as np
import PIL.Image
import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from vitreg.data.batches import Batch, indices_of, pixels_of
from vitreg.data.first_images import ranks_of
from vitreg.data.images import Images
from vitreg.diagnosis.bins import PER_OCTAVE
from vitreg.diagnosis.judging import INHERITED, ONE_GROUP, Judgement, judge_layers
from vitreg.diagnosis.kinds import METERS, Context, Meter
from vitreg.diagnosis.outliers import OutlierRule
from vitreg.diagnosis.populations import detectable_ratio, quantile
from vitreg.diagnosis.result import MODERATE, SEVERE, Diagnosis, Example, LayerDiagnosis, Sink, sureness
from vitreg.diagnosis.statistics import EDGES, Collector, Statistics
from vitreg.distributed import Ranks
from vitreg.errors import ImageError
from vitreg.models.backbone import Backbone
from vitreg.models.head import find_readout
from vitreg.models.layout import TokenLayout
from vitreg.models.probe import evaluating
from vitreg.version import versions

# A value norm at outliers under this share of the others' is that of a sink that writes nothing.
NOP_SINK = 0.5


# Of layers that show outliers nearly as well as any, the first is looked at.
NEARLY = 0.9


# Populations of which a threshold misjudges less than this share of the outliers hardly overlap.
HARDLY = 0.01


# A layer between others that show outliers is no end of them if its margin is at least this.
NEARLY_ENOUGH = 0.5


# Shares of the patches for which it is said what would have been seen.
SHARES = (0.02, 0.005)


def diagnose(
    vit: Backbone,
    images: Images | Iterable[Batch] | Iterable[Tensor],
    *,
    examples: int = 12,
) -> Diagnosis:
    """Diagnose `vit` on `images` (from read_images, or any batches of (b, 3, h, w) tensors), in one pass.

    The first `examples` images are kept for figures; everything else streams, so memory does not grow
    with their number. Images that several ranks share give one diagnosis, the same on each of them. Raises
    ImageError without images, NonFiniteError for activations with NaN.
    """
    seen = collect(vit, images, examples)
    failed = [asdict(f) for f in images.failed] if isinstance(images, Images) else []
    return _conclude(vit, seen, failed)


@dataclass(frozen=True)
class Collected:
    """What one pass over the images gave: sums, for norms and for each other kind, and the first images."""

    layout: TokenLayout
    image_size: tuple[int, int]
    statistics: Statistics
    meters: tuple[Meter, ...]
    examples: list[Example]


def collect(vit: Backbone, images: Iterable[Batch] | Iterable[Tensor], examples: int) -> Collected:
    """The sums over all images in one pass, their token layout, and the first few as examples."""
    collector: Collector | None = None
    size: tuple[int, int] | None = None
    kept: list[tuple[int, Example]] = []  # with the images' places
    with ExitStack() as stack:
        stack.enter_context(evaluating(vit.model))
        for batch in images:
            pixels, names = pixels_of(batch), getattr(batch, "names", ())
            if collector is None:
                layout, size = vit.layout_for(pixels), (pixels.shape[2], pixels.shape[3])
                norm = find_readout(vit).norm if examples else None
                collector = _collector(vit, layout)
                stack.enter_context(collector.watching())
            elif vit.layout_for(pixels) != collector.layout:
                raise ImageError(
                    f"images of {tuple(pixels.shape[2:])} pixels came after images with another patch grid"
                    f" ({collector.layout.grid}); diagnose one size at a time."
                )
            collector.see(pixels)
            if len(kept) < examples:
                start = indices_of(batch, len(kept)).start
                some = pixels[: examples - len(kept)]
                kept += _examples(vit, some, names, collector, norm, start)
    return _together(vit, collector, size, kept, examples, ranks_of(images))


def _collector(vit: Backbone, layout: TokenLayout) -> Collector:
    meters = tuple(meter(vit, layout) for meter in METERS)
    return Collector(vit, Statistics.empty(vit, layout), layout, meters)


def _together(
    vit: Backbone,
    collector: Collector | None,
    size: tuple[int, int] | None,
    kept: list[tuple[int, Example]],
    examples: int,
    ranks: Ranks,
) -> Collected:
    """What all ranks have collected; one that had no image adds nothing."""
    layouts = [found for found in ranks.gather(collector and collector.layout) if found]
    if not layouts:
        raise ImageError("there are no images to diagnose; expected at least one batch.")
    if len(set(layouts)) > 1:
        grids = ", ".join(str(grid) for grid in sorted({layout.grid for layout in layouts}))
        raise ImageError(f"images have different patch grids ({grids}); diagnose one size at a time.")
    mine = collector or _collector(vit, layouts[0])
    for meter in mine.meters:
        meter.all_reduce(ranks)
    first = sorted(itertools.chain(*ranks.gather(kept)), key=lambda pair: pair[0])[:examples]
    image_size = next(filter(None, ranks.gather(size)))
    return Collected(
        layouts[0],
        image_size,
        mine.statistics.together(ranks),
        tuple(mine.meters),
        [example for _, example in first],
    )


def _examples(
    vit: Backbone,
    pixels: Tensor,
    names: Sequence[str],
    collector: Collector,
    norm: nn.Module | None,
    start: int,
) -> list[tuple[int, Example]]:
    count = len(pixels)
    assert collector.patches is not None
    patches = collector.patches[:count]
    features = patches if norm is None else norm(patches)
    features = features.float().unflatten(1, collector.layout.grid).cpu().numpy()
    norms = collector.layout.as_grid(torch.stack([x[:count] for x in collector.norms], 1)).cpu().numpy()
    shares = collector.layout.as_grid(torch.stack([x[:count] for x in collector.shares], 1)).cpu().numpy()
    photos = photos_of(vit, pixels)
    named = [*names[:count], *(f"image-{start + i}" for i in range(len(names), count))]
    maps = zip(named, photos, norms, shares, features, strict=True)
    return [(start + i, Example(*one)) for i, one in enumerate(maps)]


def photos_of(vit: Backbone, pixels: Float[Tensor, "b 3 h w"]) -> Shaped[np.ndarray, "b h w 3"]:
    """Preprocessed images as 8-bit photos again.

    Normalisation is affine per channel, so what it makes of a black and of a white image says how to
    invert it. Without preprocessing, each image is stretched to its own range.
    """
    if vit.preprocess is None:
        low, high = pixels.amin((1, 2, 3), keepdim=True), pixels.amax((1, 2, 3), keepdim=True)
    else:
        side = max(vit.image_size)
        low, high = (
            vit.preprocess(PIL.Image.new("RGB", (side, side), shade)).mean((1, 2))[:, None, None]
            for shade in ("black", "white")
        )
    unit = ((pixels.cpu().float() - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    photos: np.ndarray = (unit * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return photos


def _conclude(vit: Backbone, seen: Collected, failed: list[dict[str, str]]) -> Diagnosis:
    layout, s = seen.layout, seen.statistics
    judged = judge_layers(s)
    layers = [_layer(layer, s, judged, layout) for layer in range(len(judged))]
    detect, present = _detect(judged)
    best, thresholds = judged[detect], tuple(x.threshold for x in judged)
    threshold = best.threshold
    rule = _rule(detect, best)
    onset = _onset(judged, detect) if present else None
    return Diagnosis(
        model=vit.name,
        planted=vit.planted,
        images=s.images,
        failed_images=failed,
        image_size=seen.image_size,
        grid=layout.grid,
        prefix_tokens=layout.prefix,
        register_tokens=layout.registers,
        verdict="artifacts" if present else "no artifacts",
        reason=_reason(layers, detect, onset),
        sureness=sureness(best),
        strength=strength_of(layers, detect) if present else None,
        misjudged=layers[detect].misjudged if present else 0.0,
        detectable={} if present else _detectable(s, detect),
        rule=rule,
        threshold=threshold,
        mean_plus_3_sigma=layers[detect].mean_plus_3_sigma,
        mean_plus_3_sigma_fraction=s.fraction_beyond(detect, layers[detect].mean_plus_3_sigma),
        detect_layer=detect,
        onset_layer=onset,
        outlier_fraction=layers[detect].outlier_fraction,
        outliers_per_image=layers[detect].outlier_fraction * layout.patches,
        attention_to_outliers=layers[-1].attention_to_outliers,
        attention_queries="cls" if layout.prefix else "patches",
        position_frequency=layout.as_grid(s.position_frequency(detect, threshold)).tolist(),
        neighbour_similarity=s.neighbour_similarity(detect, threshold),
        sink=_sink(layers, detect) if present else None,
        excess_dimensions=[] if threshold is None else s.excess_dimensions(detect, threshold),
        layers=layers,
        versions=versions(),
        kinds=tuple(meter.finding(Context(s.images, thresholds)) for meter in seen.meters),
        statistics=s,
        examples=seen.examples,
    )


def _detect(judged: list[Judgement]) -> tuple[int, bool]:
    """The layer to look at, and whether it shows artifacts.

    Of those whose populations stand apart as clearly as anywhere, or nearly, the first in which outliers
    together have nearly the most norm beyond the others': several blocks may build them up, or make more of
    them, and later the bulk may drown them. Without artifacts, the layer that came closest.
    """
    standing = [layer for layer, x in enumerate(judged) if x.stands]
    if not standing:
        return max(range(len(judged)), key=lambda layer: judged[layer].margin), False
    clear = NEARLY * max(judged[layer].margin for layer in standing)
    beyond = {x: _norm_beyond(judged[x]) for x in standing if judged[x].margin >= clear or _apart(judged[x])}
    return next(layer for layer, norm in beyond.items() if norm >= NEARLY * max(beyond.values())), True


def _norm_beyond(judgement: Judgement) -> float:
    """The norm that outliers together have beyond the others', per patch and in medians of these."""
    population = judgement.population
    return population.fraction * (population.ratio - 1) if population is not None else 0.0


def _apart(judgement: Judgement) -> bool:
    """Whether hardly a patch lies between the populations."""
    population = judgement.population
    return population is not None and population.misjudged < HARDLY * population.fraction


def _rule(layer: int, judgement: Judgement) -> OutlierRule:
    """The threshold, and how likely a norm between the populations is an outlier's."""
    if judgement.threshold is None or judgement.population is None:
        return OutlierRule(layer)
    middles = (EDGES[:-1] * EDGES[1:]).sqrt().tolist()
    posterior = judgement.population.posterior
    rising = np.flatnonzero((posterior > 0.005) & (posterior < 0.995))
    if not len(rising):
        return OutlierRule(layer, judgement.threshold)
    near = range(max(int(rising[0]) - 1, 0), min(int(rising[-1]) + 2, len(posterior)))
    curve = tuple((middles[bin], float(posterior[bin])) for bin in near)
    return OutlierRule(layer, judgement.threshold, curve)


def strength_of(layers: list[LayerDiagnosis], detect: int) -> str:
    """How strong artifacts are, by the attention that they draw beyond their share, in the block with most.

    "severe" from SEVERE on, "moderate" from MODERATE on, else "mild".
    """
    beyond = [
        x.attention_to_outliers - entering.outlier_fraction
        for entering, x in pairwise(layers)
        if entering.threshold is not None
    ]
    drawn = max(beyond, default=0.0)
    return "severe" if drawn >= SEVERE else "moderate" if drawn >= MODERATE else "mild"


def _detectable(s: Statistics, layer: int) -> dict[str, float | None]:
    return {f"{share:g}": detectable_ratio(s.relative[layer], share, PER_OCTAVE) for share in SHARES}


def _layer(layer: int, s: Statistics, judged: list[Judgement], layout: TokenLayout) -> LayerDiagnosis:
    counts, judgement = s.counts[layer], judged[layer]
    mean, deviation = s.norm_moments(layer)
    bound = judged[layer - 1].threshold if layer else None
    by_head = s.attention_beyond(layer, bound)
    population = judgement.population
    return LayerDiagnosis(
        layer=layer,
        median_norm=quantile(counts, EDGES, 0.5),
        p99_norm=quantile(counts, EDGES, 0.99),
        max_norm=float(s.largest[layer]),
        mean_plus_3_sigma=mean + 3 * deviation,
        threshold=judgement.threshold,
        outlier_fraction=population.fraction if population is not None and judgement.stands else 0.0,
        ratio=population.ratio if population is not None else 1.0,
        misjudged=population.misjudged if population is not None else 0.0,
        margin=judgement.margin,
        evidence=judgement.evidence,
        attention_to_outliers=sum(by_head) / len(by_head),
        attention_by_head=by_head,
        value_norm_ratio=s.value_norm_ratio(layer, bound),
        cls_norm=float(s.special[layer, 0]) / s.images if layout.prefix else None,
        register_norm=float(s.special[layer, 1]) / s.images if layout.registers else None,
    )


def _onset(judged: list[Judgement], detect: int) -> int:
    """The first layer that shows outliers from which on, up to the detect layer, each nearly does."""
    onset = layer = detect
    while layer and (judged[layer - 1].stands or judged[layer - 1].margin >= NEARLY_ENOUGH):
        layer -= 1
        onset = layer if judged[layer].stands else onset
    return onset


def _sink(layers: list[LayerDiagnosis], detect: int) -> Sink | None:
    """The kind of sink, by the median value norm of the blocks that read outliers."""
    ratios = [x.value_norm_ratio for x in layers[detect + 1 :] if x.value_norm_ratio is not None]
    if not ratios:
        return None
    ratio = median(ratios)
    return Sink("nop" if ratio < NOP_SINK else "broadcast", ratio)


def _reason(layers: list[LayerDiagnosis], detect: int, onset: int | None) -> str:
    best = layers[detect]
    if onset is not None and best.threshold is not None:
        why = "".join(f"; {words}" for words in (best.evidence.named if best.evidence else ()))
        return (
            f"from block {onset} on, patch tokens form two populations. After block {detect},"
            f" {best.outlier_fraction:.2%} have norms of {best.threshold:.4g} or more, in the median"
            f" {best.ratio:.{0 if best.ratio >= 10 else 1}f}x the others'; {_overlap(best)}{why}."
        )
    tail = max(layers, key=lambda x: x.max_norm / x.median_norm)
    text = (
        f"in no layer do patch norms form a second population that is an artifact; the largest norm is"
        f" {tail.max_norm / tail.median_norm:.1f}x the median (block {tail.layer})."
    )
    if best.margin >= 1:
        text += f" After block {detect} the norms are not a single population, but {_against(best)}."
    return text


def _overlap(layer: LayerDiagnosis) -> str:
    if layer.misjudged < HARDLY * layer.outlier_fraction:
        return "hardly a patch lies between"
    return f"the two overlap: any threshold misjudges {layer.misjudged:.2%} of the patches"


def _against(layer: LayerDiagnosis) -> str:
    """Why what stands out is not called an artifact."""
    if layer.evidence is not None and layer.evidence.one_group > ONE_GROUP:
        return "nearly all of the larger ones lie in a few photos"
    if layer.evidence is not None and layer.evidence.inherited >= INHERITED:
        return "the larger ones differ from block 0 on: by what the photo shows there"
    return "the larger ones have no direction, dimension or attention in common"
