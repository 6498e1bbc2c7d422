"""Random walks: a generated model, wrapped somewhere on the way, is fixed, undone, copied, saved and read.

`walk(seed)` compares every step with a dense, plain twin that goes the same way, and says how it ended. It
raises AssertionError for a difference, and lets any exception through that is not vitreg's own.
"""

import copy
import random
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from wrapped import WRAPPERS

import vitreg
from vitreg.fixes import AttentionBias, Fix, TestTimeRegisters, TokenSplitting, load_fix
from vitreg.fixes.base import Applied
from vitreg.fixes.neurons import RegisterNeurons
from vitreg.fixes.shift_sink import ShiftSink

NAMES = (
    "vit_tiny_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "deit3_small_patch16_224",
    "vit_base_patch16_siglip_224",
    "vit_base_patch16_clip_224",
)
STEPS = 7
KINDS = ("registers", "splitting", "bias")  # that can be saved


@dataclass
class Walker:
    """The model as the user has it, its twin, and the fixes on both, the latest last."""

    model: nn.Module
    twin: nn.Module
    size: tuple[int, int]
    close: float
    applied: list[tuple[Applied, Applied]]

    def backbones(self) -> tuple[vitreg.Backbone, vitreg.Backbone]:
        return vitreg.wrap(self.model, image_size=self.size), vitreg.wrap(self.twin, image_size=self.size)


def built(draw: random.Random) -> tuple[nn.Module, tuple[int, int]]:
    patch, size = draw.choice([8, 16]), draw.choice([(32, 32), (48, 32), (32, 64)])
    options = {"embed_dim": 32, "depth": draw.randint(2, 4), "num_heads": draw.choice([2, 4])}
    vit = timm.create_model(
        draw.choice(NAMES), img_size=size, patch_size=patch, num_classes=0, global_pool="", **options
    )
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.25)
    return vit.eval(), size


def fix_for(draw: random.Random, vit: vitreg.Backbone) -> Fix:
    a = vit.anatomy
    layers = sorted(draw.sample(range(a.depth), draw.randint(1, a.depth)))
    neurons = RegisterNeurons.of({i: draw.sample(range(a.neurons), draw.randint(1, 60)) for i in layers})
    kind = draw.choice(["registers", "splitting", "bias", "sink"])
    if kind == "registers":
        return TestTimeRegisters(
            neurons,
            registers=draw.randint(0, 3),
            initial=draw.choice(["zero", "mean", "random"]),
            peak=draw.choice(["signed", "absolute"]),
            keep_prefix=draw.random() < 0.5,
        )
    if kind == "splitting":
        marked = tuple(replace(neuron, threshold=draw.uniform(0.3, 1.5)) for neuron in neurons.chosen)
        return TokenSplitting(replace(neurons, chosen=marked), capacity=draw.uniform(0.1, 1.0))
    if kind == "bias":
        entry, channels = layers[0], a.width // a.heads
        generator = torch.Generator().manual_seed(draw.randint(0, 99))
        shape = (a.depth - entry, a.heads, channels)
        return AttentionBias(
            neurons, {name: torch.randn(shape, generator=generator) for name in ("keys", "values")}, entry
        )
    rows, columns = vit.layout.grid
    return ShiftSink(neurons, places=((draw.randrange(rows), draw.randrange(columns)),))


def outputs(walker: Walker) -> tuple[Tensor, Tensor]:
    x = torch.rand(2, 3, *walker.size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        return walker.model(x), walker.twin(x)


def compare(walker: Walker, after: str) -> None:
    found, expected = outputs(walker)
    missed = float((found - expected).abs().max() / expected.abs().max())
    assert missed <= walker.close, f"after {after}: {missed:.2e} beside the twin"


# -- steps -----------------------------------------------------------------------------------------


def apply(walker: Walker, draw: random.Random) -> str:
    one, other = walker.backbones()
    fix = fix_for(draw, other)
    with tempfile.TemporaryDirectory() as folder:
        if draw.random() < 0.3 and fix.type in KINDS:
            fix = load_fix(fix.save(Path(folder) / "fix", vit=other))
        on_twin = fix.apply(other)
        try:
            on_model = fix.apply(one)
        except vitreg.VitregError:
            on_twin.undo()
            raise
    walker.applied.append((on_model, on_twin))
    return f"{fix.type} applied"


def undo(walker: Walker, draw: random.Random) -> str:
    if walker.applied:
        for handle in walker.applied.pop():
            handle.undo()
    return "undo"


def diagnose(walker: Walker, draw: random.Random) -> str:
    for vit in walker.backbones():
        assert str(vitreg.diagnose(vit, [torch.rand(2, 3, *walker.size) * 2 - 1]))
    return "a diagnosis"


def neurons(walker: Walker, draw: random.Random) -> str:
    """What is read inside of the blocks."""
    found = []
    for vit in walker.backbones():
        with torch.no_grad(), vitreg.trace(vit, neurons=True, layers=[vit.anatomy.depth - 1]) as t:
            vit(torch.linspace(-1, 1, 6 * walker.size[0] * walker.size[1]).view(2, 3, *walker.size))
        found.append(t.neurons)
    missed = float((found[0] - found[1]).abs().max() / found[1].abs().max())
    assert missed <= 3 * walker.close, f"neurons: {missed:.2e} beside the twin"
    return "neurons"


def state(walker: Walker, draw: random.Random) -> str:
    walker.twin.load_state_dict(walker.twin.state_dict())
    return "a state dict"


STEPS_TO_DRAW = (apply, apply, apply, undo, diagnose, neurons, state)


def wrap(walker: Walker, name: str, plain: nn.Module) -> str:
    """The model wrapped with its fixes on it; a new twin, made of plain copies, gets the same ones."""
    wrapper = WRAPPERS[name]
    torch.manual_seed(0)
    walker.model = wrapper.wrap(walker.model)
    torch.manual_seed(0)
    walker.twin = wrapper.dense(wrapper.wrap(copy.deepcopy(plain)), copy.deepcopy(plain))
    walker.close = max(walker.close, 3 * wrapper.close)
    twin = vitreg.wrap(walker.twin, image_size=walker.size)
    walker.applied = [(one, one.fix.apply(twin)) for one, _ in walker.applied]
    return f"wrapping ({name})"


def walk(seed: int) -> str:
    """How a walk ended: the same throughout, and what was refused on the way."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    vit, size = built(draw)
    plain = copy.deepcopy(vit)
    walker = Walker(vit, copy.deepcopy(vit), size, 2e-5, [])
    name, wraps_at = draw.choice(list(WRAPPERS)), draw.randrange(STEPS)
    refusals = set()
    for number in range(STEPS):
        if number == wraps_at:
            compare(walker, wrap(walker, name, plain))
        try:
            done = draw.choice(STEPS_TO_DRAW)(walker, draw)
        except vitreg.VitregError as error:  # and both are as they were
            done = f"refused: {error}"
            refusals.add(str(error)[:70])
        compare(walker, done)
    while walker.applied:
        undo(walker, draw)
    compare(walker, "the last undo")
    return "the same throughout" + "".join(f"; refused: {text}" for text in sorted(refusals))
