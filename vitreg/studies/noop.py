"""The no-op test (Jiang et al., Proposition 1): does anything read what register neurons write?

    print(noop_test(vit, photos, neurons, report))

If the write direction of a register neuron lies in the null space of what reads it, the model can make
a sink and predict as before. Asked twice: of the weights, how much of the direction the head and the values
of the next block let through; and of the model, what changes when later blocks do not get the outlier
tokens, against as many random other patches of the same images.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vitreg.data.batches import Batch, pixels_of
from vitreg.diagnosis.result import Diagnosis
from vitreg.errors import FixError, ImageError
from vitreg.fixes.neurons import RegisterNeurons
from vitreg.hooks.attention import AttentionCall
from vitreg.hooks.attention_mode import AttentionMode
from vitreg.hooks.hooked import hooked
from vitreg.hooks.weights import dense_weight
from vitreg.intervals import Estimate
from vitreg.models.backbone import Backbone
from vitreg.models.head import Readout, find_readout, norm_scale
from vitreg.models.probe import evaluating
from vitreg.models.write_gain import write_gains
from vitreg.phantoms.attention_sinks import _Projections
from vitreg.printing import called
from vitreg.verification.measures import MEASURES, Reference, summarise
from vitreg.verification.resampling import Resampled

How = Literal["silenced", "removed"]
COMPARED = ("agreement", "logit_change", "cls", "patches")


@dataclass(frozen=True)
class Visibility:
    """How much of a neuron's write direction a reader lets through.

    `ratio` is the length of what the reader makes of the unit direction, over that of a random direction
    (root mean square): 0 in the null space, 1 as visible as anything. `rank` is the share of the layer's
    neurons that are less visible. The norm before the reader is taken as linear.
    """

    layer: int
    index: int
    reader: str
    ratio: float
    rank: float


@dataclass(frozen=True)
class Effect:
    """What the model does without what some tokens hand on, over images with outliers.

    `how`: "silenced" (their values are zero, they are attended to as before) or "removed" (nobody attends
    to them); `tokens`: "outliers" or "others", as many random other patches.
    """

    how: How
    tokens: str
    measures: dict[str, Estimate]


@dataclass(frozen=True)
class NoopTest:
    """What `noop_test` found. `more` is by how much silencing outliers changes the model's word more than
    silencing others does (`judged_by`: largest logit change, else how far CLS or patches turn)."""

    model: str
    planted: bool
    visibility: tuple[Visibility, ...]
    effects: tuple[Effect, ...]
    judged_by: str
    more: dict[How, Estimate]
    blocks: tuple[int, int]
    images: int
    with_outliers: int

    @property
    def reason(self) -> str:
        """The answer in a sentence: whether later blocks hear more from outliers than from other patches."""
        more = self.more["silenced"]
        low, high = more.low or 0.0, more.high or 0.0
        what = f"{MEASURES[self.judged_by].label}, outliers less others"
        found = f"{what}: {more.value:+.3g} [{low:+.3g}, {high:+.3g}]"
        if self.judged_by != "logit_change":  # a cosine: here less is more change
            low, high = -high, -low
        if low > 0:
            return f"no no-op: silencing the outliers changes more than silencing other patches ({found})."
        if high < 0:
            return f"a no-op: silencing the outliers changes less than silencing other patches ({found})."
        return f"a no-op as far as one can tell: outliers hand on no more than other patches ({found})."

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"reason": self.reason}

    def __str__(self) -> str:
        lines = [f"{called(self.model, self.planted)}: {self.reason}"]
        lines += [
            f"block {x.layer} #{x.index}: seen by {x.reader} {x.ratio:.2f}x as well as a random direction,"
            f" better than {x.rank:.0%} of its layer's neurons"
            for x in self.visibility
        ]
        lines.append(
            f"blocks {self.blocks[0]} to {self.blocks[1]}, {self.with_outliers} images with outliers:"
        )
        for effect in self.effects:
            found = [f"{MEASURES[name].label} {_written(name, x)}" for name, x in effect.measures.items()]
            lines.append(f"  {effect.tokens} {effect.how}: {'; '.join(found)}")
        return "\n".join(lines)


def _written(name: str, estimate: Estimate) -> str:
    spec = MEASURES[name].format
    return f"{estimate.value:{spec}} [{estimate.low:{spec}}, {estimate.high:{spec}}]"


def noop_test(
    vit: Backbone,
    images: Iterable[Batch] | Iterable[Tensor],
    neurons: RegisterNeurons,
    report: Diagnosis,
    *,
    seed: int = 0,
) -> NoopTest:
    """Whether the head and later blocks could do without what register neurons write.

    `report` is the diagnosis that says which tokens are outliers; they are silenced and removed in all
    blocks after its onset. Raises FixError for a diagnosis without artifacts or with an onset in the last
    block, ImageError where none of the images has an outlier.
    """
    if report.onset_layer is None or report.onset_layer + 1 >= vit.anatomy.depth:
        raise FixError(
            "no block comes after outliers, so none can do without them: there is nothing to test."
        )
    readout, first = find_readout(vit), report.onset_layer + 1
    rows: dict[str, dict[str, list[np.ndarray]]] = {}
    sample, count = None, 0
    for batch in images:
        pixels = pixels_of(batch)
        sample = pixels[:4] if sample is None else sample
        for name, measures in _effects(vit, pixels, report, readout, first, seed + count).items():
            for measure, values in measures.items():
                rows.setdefault(name, {}).setdefault(measure, []).append(values)
        count += len(pixels)
    if sample is None:
        raise ImageError("there are no images to test on; expected at least one batch.")
    numbers = {k: {m: np.concatenate(x) for m, x in measures.items()} for k, measures in rows.items()}
    judged_by = next(
        name for name in ("logit_change", "cls", "patches") if name in numbers["silenced outliers"]
    )
    affected = int((~np.isnan(numbers["silenced outliers"][judged_by])).sum())
    if not affected:
        raise ImageError("none of these images has an outlier. Test on those that were diagnosed.")
    means = Resampled(numbers, seed)
    hows: tuple[How, How] = ("silenced", "removed")
    more = {how: means.difference(f"{how} outliers", f"{how} others", judged_by) for how in hows}
    return NoopTest(
        model=vit.name,
        planted=vit.planted,
        visibility=_visibility(vit, sample, neurons, readout),
        effects=tuple(
            Effect(
                how, tokens, {m: x for m in COMPARED if (x := means.value(f"{how} {tokens}", m)) is not None}
            )
            for how in hows
            for tokens in ("outliers", "others")
        ),
        judged_by=judged_by,
        more={how: x for how, x in more.items() if x is not None},
        blocks=(first, vit.anatomy.depth - 1),
        images=count,
        with_outliers=affected,
    )


# -- of the model ----------------------------------------------------------------------------------


def _effects(
    vit: Backbone, pixels: Tensor, report: Diagnosis, readout: Readout, first: int, seed: int
) -> dict[str, dict[str, np.ndarray]]:
    """Every measure of each intervention on one batch; NaN for images without outliers."""
    layout, plain = vit.layout_for(pixels), summarise(vit, pixels, readout)
    reference = Reference(plain, report, layout)
    outliers = reference.outliers
    chosen = {"outliers": outliers, "others": _others(outliers, seed)}
    none = ~outliers.any(1)
    found = {}
    for tokens, patches in chosen.items():
        mask = torch.zeros(len(pixels), layout.tokens, dtype=torch.bool, device=patches.device)
        mask[:, layout.patch_slice] = patches
        for how in ("silenced", "removed"):
            with _Without(vit, mask, first, silenced=how == "silenced"):
                measures = reference.measure(summarise(vit, pixels, readout))
            found[f"{how} {tokens}"] = {
                name: measures[name].masked_fill(none, torch.nan).double().cpu().numpy()
                for name in COMPARED
                if name in measures
            }
    return found


def _others(outliers: Bool[Tensor, "b p"], seed: int) -> Bool[Tensor, "b p"]:
    """As many random other patches of each image; the same for an image whatever its batch."""
    chosen = torch.zeros_like(outliers)
    for row, mask in enumerate(outliers):
        order = torch.randperm(len(mask), generator=torch.Generator().manual_seed(seed + row)).to(mask.device)
        chosen[row, order[~mask[order]][: int(mask.sum())]] = True
    return chosen


class _Without(AttentionMode):
    """From block `first` on, nothing of the marked tokens reaches others: values of 0, or no keys at all."""

    def __init__(self, vit: Backbone, marked: Bool[Tensor, "b n"], first: int, silenced: bool) -> None:
        super().__init__(len(marked))
        self._marked, self._silenced = marked, silenced
        self._blocks, self._first, self._active = vit.anatomy.block_modules(vit.model), first, False

    def __enter__(self) -> "_Without":
        self._hook = self._blocks[self._first].register_forward_pre_hook(self._start)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._hook.remove()

    def _start(self, module: nn.Module, args: Any) -> None:
        self._active = True

    def attend(self, call: AttentionCall) -> Float[Tensor, "b h n e"] | None:
        if not self._active:
            return None
        reaching = ~self._marked[:, None, None, :]  # (b, 1, 1, n)
        if self._silenced:
            return call.compute(call.mask, values=lambda v: v * reaching.transpose(-2, -1))
        if call.mask is None or call.mask.dtype == torch.bool:
            return call.compute(reaching if call.mask is None else call.mask & reaching)
        return call.compute(call.mask.masked_fill(~reaching, -torch.inf))


# -- of the weights --------------------------------------------------------------------------------


def _visibility(
    vit: Backbone, images: Tensor, neurons: RegisterNeurons, readout: Readout
) -> tuple[Visibility, ...]:
    """Every neuron as the head sees it, and the values of the next block."""
    gains = write_gains(vit, list(neurons.by_layer))
    downs = vit.anatomy.down_projections(vit.model)
    found = []
    for layer, indices in neurons.by_layer.items():
        write = dense_weight(downs[layer]).float() * gains[layer].to(vit.device)[:, None]  # (d, f)
        readers = {}
        if readout.read is not None:
            readers["the head"] = _centred(readout.read, readout.norm)
        if layer + 1 < vit.anatomy.depth and (values := _value_reader(vit, images, layer + 1)) is not None:
            readers[f"the values of block {layer + 1}"] = values
        for reader, read in readers.items():
            ratio = _seen(read, write)
            found += [
                Visibility(layer, i, reader, float(ratio[i]), float((ratio < ratio[i]).float().mean()))
                for i in indices
            ]
    return tuple(found)


def _seen(read: Float[Tensor, "r d"], write: Float[Tensor, "d f"]) -> Float[Tensor, " f"]:
    """Length of read @ w for each neuron's unit direction w, over the root mean square of random ones."""
    random = read.norm() / read.shape[1] ** 0.5
    return (read @ write).norm(dim=0) / write.norm(dim=0).clamp(min=1e-30) / random


def _centred(read: Float[Tensor, "r d"], norm: nn.Module | None) -> Float[Tensor, "r d"]:
    """A reader behind LayerNorm, which takes the mean out first (RMSNorm does not)."""
    return read - read.mean(1, keepdim=True) if isinstance(norm, nn.LayerNorm) else read


def _value_reader(vit: Backbone, images: Tensor, layer: int) -> Float[Tensor, "r d"] | None:
    """What the values of a block read of the stream, the norm before them included; None if not found."""
    value = _Projections(vit, images, layer)._value
    if value is None:
        return None
    weight, given = value
    read = weight.detach().float()
    for norm in _norms_that_made(given, vit, images, layer):
        return _centred(read * norm_scale(norm), norm)
    return read


def _norms_that_made(x: Tensor, vit: Backbone, images: Tensor, layer: int) -> list[nn.Module]:
    """The norms of a block whose output is `x`."""
    found: list[nn.Module] = []

    def saw(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.shape == x.shape and torch.allclose(output, x, atol=1e-5):
            found.append(module)

    block = vit.anatomy.block_modules(vit.model)[layer]
    hooks = [
        module.register_forward_hook(saw)
        for module in block.modules()
        if isinstance(getattr(module, "weight", None), Tensor) and "norm" in type(module).__name__.lower()
    ]
    with hooked(hooks), evaluating(vit.model):
        vit(images)
    return found
