"""What works on a model, tried out on noise: reading, every kind of fix, copies and gradients.

for trial in trials(vit):
    print(trial.name, trial.works, trial.detail)

What fails is a line with its reason; the model is left as it was.
"""

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vitreg.errors import VitregError
from vitreg.fixes import (
    AttentionBias,
    Fix,
    Inpainting,
    PositionRepair,
    Projection,
    ShiftAverage,
    TestTimeRegisters,
    TokenSplitting,
    applied,
)
from vitreg.fixes.neurons import RegisterNeuron, RegisterNeurons
from vitreg.models.backbone import Backbone
from vitreg.models.positions import added_positions
from vitreg.models.probe import evaluating, first_tensor
from vitreg.tracing.records import AttentionRows, trace

Make = Callable[[Backbone, Tensor], Fix]

ROUNDING = 1e-3  # of an attention row's sum, in half precision


@dataclass(frozen=True)
class Trial:
    """One thing that was tried: whether it works, and what was seen, or why it does not."""

    name: str
    works: bool
    detail: str


def trials(vit: Backbone) -> Iterator[Trial]:
    """Try everything, one after the other."""
    noise = _noise(vit)
    yield _tried("forward pass", lambda: _described(_passed(vit, noise)))
    yield _tried("residual stream", lambda: _read_stream(vit, noise))
    yield _tried("attention rows", lambda: _read_attention(vit, noise))
    yield _tried("neurons", lambda: _read_neurons(vit, noise))
    yield _tried("another size", lambda: _another_size(vit))
    for kind, make in FIXES.items():
        yield _tried(f"fix: {kind}", partial(_made_applied_and_undone, vit, noise, make))
    yield _tried("copies", lambda: _copied(vit, noise))
    yield _tried("gradients", lambda: _differentiated(vit, noise))


def _tried(name: str, attempt: Callable[[], str]) -> Trial:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return Trial(name, True, attempt())
        except VitregError as error:
            return Trial(name, False, " ".join(str(error).split()))
        except _Wrong as wrong:
            return Trial(name, False, str(wrong))
        except Exception as error:
            line = " ".join(str(error).split())[:300]
            return Trial(name, False, f"raises {type(error).__name__}: {line or 'no message'}")


class _Wrong(Exception):  # noqa: N818 - a finding
    """Something ran, and what it gave is wrong."""


# -- reading ---------------------------------------------------------------------------------------


def _noise(vit: Backbone, size: tuple[int, int] | None = None) -> Float[Tensor, "b 3 h w"]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, 3, *(size or vit.image_size), generator=generator) * 2 - 1


def _passed(vit: Backbone, images: Tensor) -> Any:
    with evaluating(vit.model):
        return vit(images)


def _described(output: Any) -> str:
    if output is None:
        return "runs up to the head, which raises for images alone: no output of its own"
    tensor = first_tensor(output)
    shape = "no tensor" if tensor is None else f"a tensor of shape {tuple(tensor.shape)}"
    what = shape if isinstance(output, Tensor) else f"{type(output).__name__} with {shape} first"
    if tensor is not None and not tensor.isfinite().all():
        raise _Wrong(f"gives {what}, which holds NaN or infinity")
    return f"gives {what} for 2 images"


def _stream(vit: Backbone, images: Tensor) -> Float[Tensor, "b n d"]:
    """The residual stream after the last block."""
    with evaluating(vit.model), trace(vit, norms=False, residuals=True, layers=[vit.anatomy.depth - 1]) as t:
        vit(images)
    return t.residuals[0]


def _read_stream(vit: Backbone, images: Tensor) -> str:
    plain = first_tensor(_passed(vit, images))
    with evaluating(vit.model), trace(vit) as t:
        traced = first_tensor(vit(images))
    if not t.norms.isfinite().all():
        raise _Wrong("norms are NaN or infinite after some block. Use float32")
    shape = tuple(t.norms.shape)
    if plain is None or traced is None:
        return f"norms {shape} of (layers, images, tokens)"
    return (
        f"norms {shape} of (layers, images, tokens); the output {_compared(traced, plain)} while it is read"
    )


def _read_attention(vit: Backbone, images: Tensor) -> str:
    rows: AttentionRows = "cls" if vit.layout.prefix else [0]
    with evaluating(vit.model), trace(vit, norms=False, attention=rows) as t:
        vit(images)
    worst = float((t.attention.sum(-1) - 1).abs().max())
    if not worst <= ROUNDING:
        raise _Wrong(f"rows sum to 1 but for {worst:.2g}")
    return f"{tuple(t.attention.shape)} of (layers, images, heads, rows, tokens), each row sums to 1"


def _read_neurons(vit: Backbone, images: Tensor) -> str:
    with evaluating(vit.model), trace(vit, norms=False, neurons=True) as t:
        vit(images)
    silent = float((t.neurons == 0).float().mean())
    return f"{tuple(t.neurons.shape)} of (layers, images, tokens, neurons), {silent:.0%} of them 0"


def _another_size(vit: Backbone) -> str:
    rows, columns = vit.layout.grid
    size = vit.anatomy.pixels((rows + 1, columns + 1))
    with evaluating(vit.model), trace(vit) as t:
        vit(_noise(vit, size))
    return f"images of {size[0]}x{size[1]} px make a grid of {t.layout.grid[0]}x{t.layout.grid[1]}"


def _compared(x: Tensor, y: Tensor) -> str:
    if torch.equal(x, y):
        return "stays the same bit for bit"
    return f"changes by up to {float((x - y).abs().max()):.1g}"


# -- fixes -----------------------------------------------------------------------------------------


def _strongest(vit: Backbone, images: Tensor) -> RegisterNeurons:
    """The neuron with the largest activation at a patch of the middle block; half of it is the threshold."""
    layer = vit.anatomy.depth // 2
    with evaluating(vit.model), trace(vit, norms=False, neurons=True, layers=[layer]) as t:
        vit(images)
    peaks = t.neurons[0][:, t.inner.patch_slice].amax((0, 1))
    index = int(peaks.argmax())
    return RegisterNeurons((RegisterNeuron(layer, index, threshold=float(peaks[index]) / 2),))


def _in_painting(vit: Backbone, images: Tensor) -> Fix:
    layer = vit.anatomy.depth // 2
    with evaluating(vit.model), trace(vit, layers=[layer]) as t:
        vit(images)
    return Inpainting(layer=layer, threshold=float(t.norms[0][:, t.layout.patch_slice].float().quantile(0.9)))


def _position_repair(vit: Backbone, images: Tensor) -> Fix:
    """Of the shortest row: it becomes its neighbours' mean, whereas a long one may be left as it is."""
    shortest = int(added_positions(vit).table.norm(dim=1).argmin())
    return PositionRepair.calibrate(vit, patches=[shortest])


def _projection(vit: Backbone, images: Tensor) -> Fix:
    width = vit.anatomy.width
    return Projection(RegisterNeurons(()), torch.eye(1, width), torch.zeros(width))


FIXES: dict[str, Make] = {
    "registers": lambda vit, images: TestTimeRegisters(_strongest(vit, images)),
    "splitting": lambda vit, images: TokenSplitting(_strongest(vit, images), capacity=0.2),
    "bias": lambda vit, images: AttentionBias.calibrate(vit, [images], _strongest(vit, images)),
    "shift-average": lambda vit, images: ShiftAverage(views=1),
    "positions": _position_repair,
    "inpainting": _in_painting,
    "projection": _projection,
}


def _made_applied_and_undone(vit: Backbone, images: Tensor, make: Make) -> str:
    fix = make(vit, images)
    before, present = _stream(vit, images), applied(vit.model)
    keys = list(vit.model.state_dict())
    handle = fix.apply(vit)
    try:
        fixed = _stream(vit, images)
        same_keys = list(vit.model.state_dict()) == keys
    finally:
        handle.undo()
    after = _stream(vit, images)
    if not fixed.isfinite().all():
        raise _Wrong("the stream holds NaN or infinity while it is applied")
    if fixed.shape != before.shape or not same_keys:
        raise _Wrong("the stream has another shape, or the weights other names, while it is applied")
    if torch.equal(fixed, before):
        raise _Wrong("it runs and changes nothing on noise, where it should")
    if not torch.equal(after, before) or applied(vit.model) != present:
        raise _Wrong(f"undone, the stream {_compared(after, before)}")
    return "applied and undone, bit for bit"


# -- copies and gradients ----------------------------------------------------------------------------


def _copied(vit: Backbone, images: Tensor) -> str:
    before, fix = _stream(vit, images), TestTimeRegisters(_strongest(vit, images))
    twin = vit.with_model(copy.deepcopy(vit.model), vit.name)
    if not torch.equal(_stream(twin, images), before):
        raise _Wrong("a deep copy computes something else")
    with fix.applied_to(twin):
        fixed = _stream(twin, images)
        baked = twin.with_model(copy.deepcopy(twin.model), vit.name)
    if not torch.equal(_stream(baked, images), fixed):
        raise _Wrong("a deep copy of the fixed model computes something else than the fixed model")
    return "a deep copy computes the same bits, with and without a fix"


def _differentiated(vit: Backbone, images: Tensor) -> str:
    weights = [p for p in vit.model.parameters() if p.requires_grad and p.is_floating_point()]
    if not weights:
        return "all weights are frozen"
    stream: list[Tensor] = []
    last = vit.anatomy.block_modules(vit.model)[-1]
    with last.register_forward_hook(lambda m, args, y: stream.append(vit.anatomy.stream.of_output(y))):
        fix = TestTimeRegisters(_strongest(vit, images))
        with evaluating(vit.model), fix.applied_to(vit), torch.enable_grad():
            vit(images)
            found = torch.autograd.grad(stream[-1].float().square().mean(), weights, allow_unused=True)
    reached = [gradient for gradient in found if gradient is not None]
    if not reached:
        raise _Wrong("no gradient reaches a weight")
    if not all(gradient.isfinite().all() for gradient in reached):
        raise _Wrong("gradients are NaN or infinite with a fix applied")
    return f"reach {len(reached)} of {len(weights)} weights through the blocks, with a fix applied"
