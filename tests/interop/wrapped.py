"""A small model, all kinds of fixes for it, and what people put around or in place of its layers.

Each way of wrapping has a dense twin: the local model with plain layers that computes the same.
"""

import copy
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.utils.prune import l1_unstructured

import vitreg
from vitreg.fixes import (
    AttentionBias,
    Fix,
    Inpainting,
    PositionRepair,
    Projection,
    ShiftAverage,
    TestTimeRegisters,
    TokenSplitting,
)
from vitreg.fixes.neurons import RegisterNeurons
from vitreg.fixes.shift_sink import ShiftSink
from vitreg.models.positions import added_positions

WIDTH, DEPTH, SIZE = 32, 3, 32
NEURONS = {1: list(range(100)), 2: list(range(1, 128, 2))}


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    vit = VisionTransformer(
        SIZE, patch_size=8, embed_dim=WIDTH, depth=DEPTH, num_heads=4, num_classes=0, global_pool=""
    )
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.25)
    return vit.eval()


def images(count: int = 2) -> Tensor:
    return torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)) * 2 - 1


def wrap(module: nn.Module) -> vitreg.Backbone:
    return vitreg.wrap(module, image_size=SIZE)


# -- fixes -----------------------------------------------------------------------------------------


def _marking() -> RegisterNeurons:
    neurons = RegisterNeurons.of(NEURONS)
    return replace(neurons, chosen=tuple(replace(n, threshold=0.4) for n in neurons.chosen))


def _bias(**more: Any) -> AttentionBias:
    generator = torch.Generator().manual_seed(2)
    tensors = {
        name: torch.randn(DEPTH - 1, 4, WIDTH // 4, generator=generator) for name in ("keys", "values")
    }
    return AttentionBias(RegisterNeurons.of(NEURONS), tensors, entry=1, **more)


def _positions() -> Fix:
    """The shortest rows become their neighbours' mean (a long one may be left as it is)."""
    vit = wrap(model())
    shortest = added_positions(vit).table.norm(dim=1).argsort()[:6].tolist()
    return PositionRepair.calibrate(vit, patches=shortest)


def _inpainting() -> Fix:
    """Of the patches that no rounding takes across the threshold, which is in the widest gap of norms."""
    vit = wrap(model())
    with torch.no_grad(), vitreg.trace(vit, layers=[1]) as t:
        vit(images())
    norms = t.norms[0][:, t.layout.patch_slice].flatten().sort().values[4:-4]
    widest = int(norms.diff().argmax())
    return Inpainting(layer=1, threshold=float(norms[widest : widest + 2].mean()))


FIXES: dict[str, Callable[[], Fix]] = {
    "registers": lambda: TestTimeRegisters(RegisterNeurons.of(NEURONS), registers=2),
    "splitting": lambda: TokenSplitting(_marking(), capacity=0.5),
    "bias": _bias,
    "sink": lambda: ShiftSink(RegisterNeurons.of(NEURONS), places=((0, 1), (2, 2))),
    "shift-average": lambda: ShiftAverage(views=2),
    "positions": _positions,
    "inpainting": _inpainting,
    "projection": lambda: Projection(RegisterNeurons(()), torch.eye(1, WIDTH), torch.zeros(WIDTH)),
}


# -- what people do to layers ----------------------------------------------------------------------


@dataclass(frozen=True)
class Wrapper:
    """`wrap(model)` returns what the user has afterwards, which may be another object around the model.

    `dense(wrapped, twin)` makes of a copy of the model, as it was before, the plain model that computes the
    same, to `close` (of the largest output).
    """

    wrap: Callable[[nn.Module], nn.Module]
    dense: Callable[[nn.Module, nn.Module], nn.Module]
    close: float = 1e-5


class LowRank(nn.Linear):
    """As loralib and many repositories do it: a linear layer with a low-rank path."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, self.one), self.other)


class Beside(nn.Module):
    """A layer with a module of its own kind beside it, on the same input."""

    def __init__(self, layer: nn.Linear, activation: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.path = nn.Sequential(
            nn.Linear(layer.in_features, 4), activation, nn.Linear(4, layer.out_features)
        )
        _random(self.path)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x) + self.path(x)
        return y


class Sequence(nn.Module):
    """An MLP with a bottleneck of its own behind it (Houlsby et al.)."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp, self.down, self.up = mlp, nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)
        _random(self)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(x)
        z: Tensor = y + self.up(F.gelu(self.down(y)))
        return z


def _random(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def _low_rank(vit: nn.Module) -> nn.Module:
    for block in vit.blocks:
        layer = block.mlp.fc2
        layer.__class__ = LowRank
        layer.one = nn.Parameter(torch.empty(4, layer.in_features))
        layer.other = nn.Parameter(torch.empty(layer.out_features, 4))
        _random(nn.ParameterList([layer.one, layer.other]))
    return vit


def _merged_low_rank(vit: nn.Module, twin: nn.Module) -> nn.Module:
    for block, own in zip(twin.blocks, vit.blocks, strict=True):
        own = own.mlp.fc2
        block.mlp.fc2.weight.data += (own.other @ own.one).detach()
    return twin


def _peft(kind: str = "LoraConfig", **options: Any) -> Wrapper:
    def wrap(vit: nn.Module) -> nn.Module:
        import peft

        around = peft.get_peft_model(vit, getattr(peft, kind)(**options)).eval()
        torch.manual_seed(4)
        for name, parameter in around.named_parameters():
            if "lora_B" in name or "ia3" in name:  # made to do nothing at first
                nn.init.normal_(parameter, std=0.2)
        return around

    return Wrapper(wrap, lambda around, twin: copy.deepcopy(around).merge_and_unload())


def _weight_norm(vit: nn.Module) -> nn.Module:
    for block in vit.blocks:
        nn.utils.parametrizations.weight_norm(block.mlp.fc2)
        block.mlp.fc2.parametrizations.weight.original0.data *= 1.3
    return vit


def _computed(vit: nn.Module, twin: nn.Module) -> nn.Module:
    for block, own in zip(twin.blocks, vit.blocks, strict=True):
        block.mlp.fc2.weight.data = own.mlp.fc2.weight.detach().clone()
    return twin


def _pruned(vit: nn.Module) -> nn.Module:
    for block in vit.blocks:
        l1_unstructured(block.mlp.fc2, "weight", 0.3)
    return vit


def _beside(activation: Callable[[], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def wrap(vit: nn.Module) -> nn.Module:
        for block in vit.blocks:
            block.mlp.fc2 = Beside(block.mlp.fc2, activation())
        return vit

    return wrap


def _merged_beside(vit: nn.Module, twin: nn.Module) -> nn.Module:
    for block, own in zip(twin.blocks, vit.blocks, strict=True):
        one, _, other = own.mlp.fc2.path
        block.mlp.fc2.weight.data += (other.weight @ one.weight).detach()
        block.mlp.fc2.bias.data += (other(one.bias)).detach()
    return twin


def _behind(vit: nn.Module) -> nn.Module:
    for block in vit.blocks:
        block.mlp = Sequence(block.mlp)
    return vit


def _offloaded(vit: nn.Module) -> nn.Module:
    from accelerate import cpu_offload

    return cpu_offload(vit, torch.device("cpu"))


def _offloaded_to_disk(vit: nn.Module) -> nn.Module:
    from accelerate import disk_offload

    folder = TemporaryDirectory()
    vit = disk_offload(vit, folder.name, execution_device=torch.device("cpu"))
    weakref.finalize(vit, folder.cleanup)
    return vit


def _dispatched(vit: nn.Module) -> nn.Module:
    from accelerate import dispatch_model

    devices = {"": "cpu"} | {f"blocks.{i}": "cpu" for i in range(len(vit.blocks))}
    return dispatch_model(vit, devices, main_device="cpu", force_hooks=True)


def _hooked(vit: nn.Module) -> nn.Module:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    for block in vit.blocks:
        add_hook_to_module(block, AlignDevicesHook(execution_device="cpu", io_same_device=True))
        add_hook_to_module(block.mlp.fc2, AlignDevicesHook(execution_device="cpu"))
    return vit


def _torchao(vit: nn.Module) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(vit, Int8WeightOnlyConfig())
    return vit


def _dequantised(vit: nn.Module, twin: nn.Module) -> nn.Module:
    for name, layer in vit.named_modules():
        with suppress(AttributeError):
            twin.get_submodule(name).weight.data = layer.weight.dequantize()
    return twin


def _dynamic(vit: nn.Module) -> nn.Module:
    """PyTorch's own: layers of other classes, which quantise their inputs too."""
    return torch.ao.quantization.quantize_dynamic(vit, {nn.Linear}, dtype=torch.qint8, inplace=True)


def _dynamic_dense(vit: nn.Module, twin: nn.Module) -> nn.Module:
    for name, layer in vit.named_modules():
        if isinstance(layer, torch.ao.nn.quantized.dynamic.Linear):
            twin.get_submodule(name).weight.data = layer.weight().dequantize()
    return twin


def _replaced(vit: nn.Module, make: Callable[[nn.Linear], nn.Linear]) -> nn.Module:
    """As bitsandbytes does it: layers of its own classes, which quantise their weights once moved."""
    linears = [name for name, layer in vit.named_modules() if type(layer) is nn.Linear]
    for name in linears:
        parent, _, own = name.rpartition(".")
        setattr(vit.get_submodule(parent), own, make(vit.get_submodule(name)))
    return vit.to("cpu")


def _bits8(layer: nn.Linear) -> nn.Linear:
    import bitsandbytes as bnb

    quantised = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False)
    quantised.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    quantised.bias = layer.bias
    return quantised


def _bits4(layer: nn.Linear) -> nn.Linear:
    import bitsandbytes as bnb

    quantised = bnb.nn.LinearNF4(layer.in_features, layer.out_features, compute_dtype=torch.float32)
    quantised.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
    quantised.bias = layer.bias
    return quantised


def _dense_of_bits(vit: nn.Module, twin: nn.Module) -> nn.Module:
    from bitsandbytes.functional import dequantize_4bit

    for name, layer in vit.named_modules():
        weight = getattr(layer, "weight", None)
        if hasattr(weight, "quant_state"):
            twin.get_submodule(name).weight.data = dequantize_4bit(weight.data, weight.quant_state)
        elif hasattr(weight, "SCB"):  # absolute maxima of the rows; a pass moves them to the layer
            largest = layer.state.SCB if weight.SCB is None else weight.SCB
            twin.get_submodule(name).weight.data = weight.data.float() * largest[:, None] / 127
    return twin


def _quanto(vit: nn.Module) -> nn.Module:
    from optimum.quanto import freeze, qint8, quantize

    quantize(vit, weights=qint8)
    freeze(vit)
    return vit


def _plain(_: nn.Module, twin: nn.Module) -> nn.Module:
    return twin


ALL_LINEAR = ["qkv", "proj", "fc1", "fc2"]
WRAPPERS = {
    "a subclass with a low-rank path": Wrapper(_low_rank, _merged_low_rank),
    "LoRA on attention": _peft(target_modules=["qkv", "proj"], r=4),
    "LoRA everywhere": _peft(target_modules=ALL_LINEAR, r=4),
    "DoRA on the MLP": _peft(target_modules=["fc1", "fc2"], r=4, use_dora=True),
    "IA3": _peft("IA3Config", target_modules=["qkv", "fc2"], feedforward_modules=["fc2"]),
    "weight norm": Wrapper(_weight_norm, _computed),
    "pruned": Wrapper(_pruned, _computed),
    "a linear path beside": Wrapper(_beside(nn.Identity), _merged_beside),
    "offloaded": Wrapper(_offloaded, _plain),
    "offloaded to disk": Wrapper(_offloaded_to_disk, _plain),
    "dispatched": Wrapper(_dispatched, _plain),
    "hooked": Wrapper(_hooked, _plain),
    "torchao": Wrapper(_torchao, _dequantised, 1e-3),
    "quanto": Wrapper(_quanto, _dequantised, 1e-3),
    "bitsandbytes, 4 bits": Wrapper(partial(_replaced, make=_bits4), _dense_of_bits, 1e-3),
    "bitsandbytes, 8 bits": Wrapper(partial(_replaced, make=_bits8), _dense_of_bits, 0.05),
    "PyTorch's dynamic quantisation": Wrapper(_dynamic, _dynamic_dense, 0.05),
}
