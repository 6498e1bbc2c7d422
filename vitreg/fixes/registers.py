"""Test-time registers (Jiang et al., Algorithm 2): move register neurons' activation to extra tokens.

    fix = TestTimeRegisters(neurons)
    with fix.applied_to(vit):
        vit(images)

Per image and per neuron, the largest activation over the tokens goes to the register, and the other
tokens get none. The register is carried inside the blocks: outside nobody ever sees an extra token.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from math import isfinite, isnan
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vitreg.data.batches import Batch
from vitreg.errors import FixError, UnsupportedModelError
from vitreg.fixes.base import Fix, first_patch
from vitreg.fixes.neurons import NeuronTensors, RegisterNeurons
from vitreg.hooks.block_edit import BlockEdit, Inner
from vitreg.hooks.carry import CarriedTokens
from vitreg.hooks.hooked import hooked
from vitreg.hooks.inside_block import BlockInterceptor, given_mask, padding_in, within
from vitreg.hooks.neuron_edit import edited
from vitreg.hooks.stream import Stream, as_given
from vitreg.hooks.torch_internals import uncompiled
from vitreg.models.backbone import Backbone
from vitreg.models.probe import evaluating
from vitreg.printing import one_of


@dataclass(frozen=True)
class TestTimeRegisters(Fix):
    """Algorithm 2 of Jiang et al., and its variations.

    registers    extra tokens, behind the model's own prefix and registers
    share        "copy": each register gets every neuron; "split": the neurons are dealt out among them, in
                 the order of their layers
    initial      what a register holds when it enters: "zero" (the paper), "mean" of the patches there,
                 "random" (normal, the patches' deviation), "prenorm" (what the norm before the blocks
                 makes of a zero token; zero without one), "given" (`tensors["initial"]` (r, d); see
                 `calibrate`)
    entry        the 0-based block before which registers enter
    peak         the largest "signed" activation (the paper) or the "absolute" largest
    peak_over    "tokens" (all of them, the paper) or "patches"
    scale        factor on what is moved
    left         what stays behind: "zero" (the paper), "mean" of a normal patch, or "own" where a token's
                 activation is not that of an outlier
    keep_prefix  leave the activations of CLS and trained registers as they are
    """

    __test__ = False  # pytest: no test class
    type: ClassVar[str] = "registers"
    does_not_cure: ClassVar[str] = (
        "outliers that no neuron makes, such as those of an outlying position embedding; and every token"
        " reads the register in place of them, so that predictions may change."
    )
    inside_splitting: ClassVar[str] = "would add tokens between"
    registers: int = 1
    share: Literal["copy", "split"] = "copy"
    initial: Literal["zero", "mean", "random", "prenorm", "given"] = "zero"
    entry: int = 0
    peak: Literal["signed", "absolute"] = "signed"
    peak_over: Literal["tokens", "patches"] = "tokens"
    scale: float = 1.0
    left: Literal["zero", "mean", "own"] = "zero"
    keep_prefix: bool = False
    tensors: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def calibrate(
        cls,
        vit: Backbone,
        images: Iterable[Batch] | Iterable[Tensor],
        neurons: RegisterNeurons,
        *,
        registers: int | None = None,
        feeders: bool = True,
        **options: Any,
    ) -> "TestTimeRegisters":
        """Registers that resemble the outliers they replace, learned from images (no labels).

        They enter at the first block with neurons to edit, as the mean outlier token there, and there are as
        many as an image has outliers on average (up to 8), each like those at one of the most frequent
        places. `feeders` moves the neurons that lead up to the outliers, too (see marks.py).
        """
        from vitreg.fixes.calibration import calibrate_thresholds, mean_outliers

        if feeders:
            neurons, _ = calibrate_thresholds(vit, images, neurons)
        entry = min(neurons.by_layer)
        initial = mean_outliers(vit, images, neurons, entry, registers)
        given: dict[str, Any] = {"entry": entry, "initial": "given"}
        return cls(neurons, len(initial), tensors={"initial": initial}, **(given | options))

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in get_type_hints(type(self)).items():
            if get_origin(known) is Literal and getattr(self, name) not in get_args(known):
                given = getattr(self, name)
                raise ValueError(f"{name}={given!r}: {one_of(str(given), get_args(known))}")
        if not (self.registers >= 0 and self.entry >= 0 and isfinite(self.scale)):
            raise ValueError(
                f"registers={self.registers}, entry={self.entry}, scale={self.scale}: expected a number of"
                " registers and a block of 0 or more, and a finite factor."
            )
        found = tuple(self.tensors["initial"].shape) if "initial" in self.tensors else None
        if self.initial == "given" and (found is None or found[0] != self.registers):
            raise ValueError(
                f"initial='given' with initial values of shape {found}: expected"
                f" tensors['initial'] ({self.registers}, width). Use TestTimeRegisters.calibrate(...)."
            )
        self._check_neurons()

    def _check_neurons(self) -> None:
        layers, count = self.neurons.by_layer, self.neurons.top_k
        if layers and self.entry > min(layers):
            raise ValueError(
                f"entry={self.entry}: expected at most {min(layers)}, the first block with neurons to"
                " edit. Let registers enter there or before."
            )
        if self.share == "split" and 0 < count < self.registers:
            raise ValueError(
                f"share='split' with {self.registers} registers: found {count} neurons to deal out, expected"
                f" one or more for each register. Use at most {count} registers, or share='copy'."
            )
        evidence = {"zero": (), "mean": ("elsewhere",), "own": ("elsewhere", "at_outliers")}[self.left]
        if any(isnan(getattr(neuron, name)) for neuron in self.neurons.chosen for name in evidence):
            raise ValueError(
                f"left={self.left!r} needs to know what neurons do at normal tokens and at outliers, found"
                " some without this evidence. Take them from find_register_neurons, or use left='zero'."
            )

    def check(self, vit: Backbone) -> None:
        super().check(vit)
        if self.entry >= vit.anatomy.depth:
            raise FixError(
                f"registers enter before block {self.entry}, but the model has {vit.anatomy.depth} blocks."
                " The fix was made for another model."
            )
        if self.registers and vit.anatomy.no_registers:
            raise UnsupportedModelError(
                f"{vit.name} has no room for registers: {vit.anatomy.no_registers}. Use token splitting, or"
                " registers=0, which zeroes the neurons."
            )
        if self.initial == "given" and self.tensors["initial"].shape[1] != vit.anatomy.width:
            raise FixError(
                f"initial values of width {self.tensors['initial'].shape[1]}, but the model's is"
                f" {vit.anatomy.width}. The fix was made for another model."
            )

    def edits(self, vit: Backbone) -> dict[int, BlockEdit]:
        carry: CarriedTokens[Tensor] = CarriedTokens()
        value = _initial_value(self, vit)
        layers = range(self.entry, vit.anatomy.depth)
        return {layer: RegisterEdit(self, vit, layer, carry, value) for layer in layers}


class RegisterEdit(BlockEdit):
    """Registers in, the block with its neurons' activation moved, registers out."""

    def __init__(
        self, fix: TestTimeRegisters, vit: Backbone, layer: int, carry: CarriedTokens[Tensor], value: Tensor
    ) -> None:
        self.fix, self.layer, self.carry, self.value = fix, layer, carry, value
        self.inserted = fix.registers
        self.own = vit.anatomy.prefix + vit.anatomy.registers
        self.start = first_patch(vit, layer)
        self.last = layer == vit.anatomy.depth - 1
        self.down = vit.anatomy.down_projection
        tables = vit.anatomy.position_tables
        self.masked, self.neutral_values = vit.anatomy.masked or bool(tables), tables[layer] if tables else ()
        self.stream: Stream = vit.anatomy.stream
        self.neurons = fix.neurons.tensors(layer)
        self.hooked = None if self.neurons is None else self.down
        # Neurons are dealt out through all layers, so that no register is left without.
        self.dealt = sum(len(found) for before, found in fix.neurons.by_layer.items() if before < layer)

    def run(
        self, block: nn.Module, inner: Inner, x: Float[Tensor, "b n d"], args: Any, kwargs: Any
    ) -> Float[Tensor, "b n d"]:
        start, patches = self.start, x.shape[1] - self.start
        padding = padding_in(self.own + patches, args, kwargs)
        if self.inserted:
            registers = self._registers(x, padding)
            before, after = x.split((start, patches), 1)
            x = torch.cat((before, registers, after), 1)
        tokens = self.own + patches  # of the model itself
        masked = self.inserted and (self.masked or given_mask(tokens, args, kwargs))
        run = partial(inner, x, args, kwargs)
        if masked:
            more = start + self.inserted - self.own
            mode = BlockInterceptor(x.shape[0], self.own, more, tokens, self.neutral_values)
            run = partial(within, mode, run)
        if self.neurons is not None:
            move = self.stream.on_neurons(partial(self._move, self.neurons, patches, padding))
            run = partial(edited, block, self.down, move, run)
        y = run()
        if not self.inserted:
            return y
        before, registers, after = y.split((start, self.inserted, patches), 1)
        # Copied, and after the last block without their history: neither y nor the graph stays in memory.
        registers = registers.clone()
        self.carry.leave(self.layer, registers.detach() if self.last else registers)
        return torch.cat((before, after), 1)

    def _registers(
        self, x: Float[Tensor, "b n d"], padding: Bool[Tensor, "_ m"] | None
    ) -> Float[Tensor, "b r d"]:
        """New ones at the first block, those that the block before left at others."""
        if self.layer == self.fix.entry:
            return self._enter(x, padding)
        return self.carry.take_from_before(self.layer, x).to(x)

    def _move(
        self,
        neurons: NeuronTensors,
        patches: int,
        padding: Bool[Tensor, "_ m"] | None,
        activation: Float[Tensor, "b n f"],
    ) -> Float[Tensor, "b n f"]:
        """Algorithm 2: each neuron's peak to the registers, per image; what is left behind elsewhere."""
        fix, (start, stop) = self.fix, (self.start, self.start + self.inserted)
        index = neurons.index.to(activation.device)
        values = activation.index_select(-1, index)  # (b, n, k)
        moved = self._left_behind(neurons, values)
        if fix.keep_prefix:
            moved[:, :start] = values[:, :start]
        if self.inserted:
            # Fixes applied later insert between these registers and the patches.
            peak = self._peak(values[:, -patches:] if fix.peak_over == "patches" else values, padding)
            if fix.scale != 1:
                peak = peak * fix.scale
            moved[:, start:stop] = peak if fix.share == "copy" else peak * self._dealt_out(peak)
        return activation.index_copy(-1, index, moved)

    def _peak(
        self, values: Float[Tensor, "b n k"], padding: Bool[Tensor, "_ m"] | None
    ) -> Float[Tensor, "b 1 k"]:
        """Over the tokens that are no padding. Registers, which no mask knows, stand in front of it."""
        size = values if self.fix.peak == "signed" else values.abs()
        if padding is not None:
            hidden = F.pad(padding, (max(values.shape[1] - padding.shape[1], 0), 0))[:, -values.shape[1] :]
            size = size.masked_fill(hidden[..., None], -torch.inf)
        if self.fix.peak == "signed":
            return size.amax(1, keepdim=True)
        return values.gather(1, size.argmax(1, keepdim=True))

    def _left_behind(self, neurons: NeuronTensors, values: Float[Tensor, "b n k"]) -> Float[Tensor, "b n k"]:
        if self.fix.left == "zero":
            return torch.zeros_like(values)
        normal = neurons.normal.to(values)
        if self.fix.left == "mean":
            return normal.expand_as(values).clone()
        reach = neurons.reach.to(values)
        return torch.where((values - normal).abs() < reach, values, normal)

    def _dealt_out(self, like: Tensor) -> Float[Tensor, "r k"]:
        """1 where a register gets a neuron, 0 elsewhere."""
        registers = torch.arange(self.inserted, device=like.device)[:, None]
        neurons = torch.arange(like.shape[-1], device=like.device) + self.dealt
        return (neurons % self.inserted == registers).to(like.dtype)

    def _enter(
        self, x: Float[Tensor, "b n d"], padding: Bool[Tensor, "_ m"] | None
    ) -> Float[Tensor, "b r d"]:
        shape = (x.shape[0], self.inserted, x.shape[2])  # len() would fix the batch size of an export
        patches = x[:, self.start :]
        counted = torch.ones_like(patches[..., :1])
        if padding is not None:
            counted = counted * ~padding[:, -patches.shape[1] :, None]
        if self.fix.initial == "mean":
            return ((patches * counted).sum(1, keepdim=True) / counted.sum(1, keepdim=True)).expand(shape)
        if self.fix.initial == "random":
            number = counted.sum((1, 2), keepdim=True) * x.shape[2]
            off = (patches - (patches * counted).sum((1, 2), keepdim=True) / number) * counted
            return self.value.to(x) * (off.square().sum((1, 2), keepdim=True) / (number - 1)).sqrt()
        return self.value.to(x).expand(shape)


def _initial_value(fix: TestTimeRegisters, vit: Backbone) -> Float[Tensor, "r d"]:
    """What the registers hold when they enter, where it is the same for every image."""
    zeros = torch.zeros(fix.registers, vit.anatomy.width)
    if fix.initial == "given":
        return fix.tensors["initial"]
    if fix.initial == "random":
        return torch.randn(zeros.shape, generator=torch.Generator().manual_seed(0))
    if fix.initial == "prenorm" and (norm := _norm_before_blocks(vit)) is not None:
        with torch.no_grad():
            return norm(zeros.to(vit.device, vit.dtype)).float().cpu()
    return zeros


def _norm_before_blocks(vit: Backbone) -> nn.Module | None:
    """The module whose output enters block 0 and is normalised: CLIP's norm before its blocks."""
    made: list[tuple[nn.Module, Tensor]] = []
    entered: list[Tensor] = []

    def saw(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and not entered:
            made.append((module, output))

    def enters(module: nn.Module, args: Any, kwargs: Any) -> None:
        entered.append(as_given(vit.anatomy.stream.of_call(args, kwargs)))

    hooks = [
        module.register_forward_hook(saw)
        for module in vit.model.modules()
        if "norm" in type(module).__name__.lower() and list(module.parameters(recurse=False))
    ]
    hooks.append(vit.anatomy.block_modules(vit.model)[0].register_forward_pre_hook(enters, with_kwargs=True))
    with hooked(hooks), evaluating(vit.model), uncompiled(vit.model):
        vit(torch.zeros(1, 3, *vit.image_size))
    start = entered[0].data_ptr()
    return next((module for module, output in made if output.data_ptr() == start), None)
