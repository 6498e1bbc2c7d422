"""Where things are in a Vision Transformer, found by structure and checked by one forward pass.

    anatomy = find_anatomy(model, forward, image_size=(224, 224))
    layout = anatomy.layout(image_size=(224, 224))
    patches = residual[:, layout.patch_slice]

No library is named here. The block stack is the first homogeneous list of modules that hold linear
layers; the neurons of a block are what enters its MLP's down-projection; prefix tokens are those that
do not depend on the image. Layers are 0-based: layer i is the residual stream after block i, before
any final norm. Token order is always [prefix | registers | patches], and `TokenLayout` is the only
place that turns this into indices.
"""

import re
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from vitreg.carry import bare
from vitreg.errors import NonFiniteError, UnsupportedModelError
from vitreg.probe import PASS_AN_ANATOMY, Forward, Probe, count_linears, part
from vitreg.stream import Stream

_REGISTER_NAME = re.compile(r"(^|[._])(reg|register|storage)_?tokens?$")


@dataclass(frozen=True)
class TokenLayout:
    """How the tokens of one forward pass are ordered: [prefix | registers | patches].

    `prefix` counts CLS and distillation tokens, `registers` the trained register tokens, `grid` is
    (rows, columns) of patches, in row-major order.
    """

    prefix: int
    registers: int
    grid: tuple[int, int]

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        return self.prefix + self.registers + self.patches

    @property
    def prefix_slice(self) -> slice:
        return slice(0, self.prefix)

    @property
    def register_slice(self) -> slice:
        return slice(self.prefix, self.prefix + self.registers)

    @property
    def patch_slice(self) -> slice:
        return slice(self.prefix + self.registers, self.tokens)

    def patch(self, row: int, column: int) -> int:
        """Index of the token of one patch."""
        return self.prefix + self.registers + row * self.grid[1] + column

    def as_grid(self, x: Shaped[Tensor, "*b p"]) -> Shaped[Tensor, "*b gh gw"]:
        """Values per patch, laid out as the image is."""
        return x.unflatten(-1, self.grid)


@dataclass(frozen=True)
class Anatomy:
    """Where a model keeps its blocks and neurons, and how its tokens are ordered.

    `blocks` is the dotted path of the block stack, `down_projection` the path within a block of the
    MLP's last linear layer (its input is the neuron vector), `patch_embedding` the path of the module
    whose output is the patch grid before positions are added (None: not found, and what needs it is
    left out), `patch_size` (height, width) in pixels. The four counts are measured by the probe; those that
    are given must agree with it. Also measured: `masked`, whether attention has a mask or a positional bias;
    `stream`, where the blocks' calls and outputs hold the residual stream; `head_error`, what the model
    raises after its last block when it is given images alone ("" if nothing).
    """

    blocks: str
    down_projection: str
    prefix: int
    registers: int
    patch_size: tuple[int, int]
    patch_embedding: str | None = None
    depth: int = 0
    width: int = 0
    neurons: int = 0
    heads: int = 0
    masked: bool = False
    stream: Stream = field(default_factory=Stream)
    head_error: str = ""

    def block_modules(self, model: nn.Module) -> list[nn.Module]:
        return list(model.get_submodule(self.blocks).children())

    def down_projections(self, model: nn.Module) -> list[nn.Linear]:
        found = [block.get_submodule(self.down_projection) for block in self.block_modules(model)]
        return [linear for linear in found if isinstance(linear, nn.Linear)]

    def layout(self, image_size: tuple[int, int]) -> TokenLayout:
        """The token layout of a forward pass on images of (height, width) pixels."""
        grid = (image_size[0] // self.patch_size[0], image_size[1] // self.patch_size[1])
        return TokenLayout(self.prefix, self.registers, grid)

    def pixels(self, grid: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of the images whose patches fill a grid."""
        return grid[0] * self.patch_size[0], grid[1] * self.patch_size[1]


def find_anatomy(
    model: nn.Module, forward: Forward, image_size: tuple[int, int], given: Anatomy | None = None
) -> Anatomy:
    """Find the parts of `model`, or check those of `given`, by one forward pass on noise images.

    `forward` runs the model on (b, 3, h, w) images; it may run a larger model that contains `model`.
    Raises UnsupportedModelError with the reason for a model that is not a plain Vision Transformer,
    NonFiniteError for weights with NaN or infinity.
    """
    refuse_compiled(model)
    _refuse_non_finite(model)
    with bare(model):
        return _found(model, forward, image_size, given)


def _found(model: nn.Module, forward: Forward, image_size: tuple[int, int], given: Anatomy | None) -> Anatomy:
    stack = given.blocks if given else _find_block_stack(model)
    probe = Probe(model, stack, image_size, given.patch_embedding if given else None)
    probe.run(forward)
    probe.check_stream()
    heads = probe.heads()
    anatomy = given or Anatomy(
        blocks=stack,
        down_projection=probe.down_projection(),
        prefix=probe.constant_tokens() - (registers := _count_registers(model, probe.constant_tokens())),
        registers=registers,
        patch_size=probe.patch_size(),
        patch_embedding=probe.patch_embedding(),
    )
    return _measured(anatomy, model, probe, heads)


def _measured(anatomy: Anatomy, model: nn.Module, probe: Probe, heads: int) -> Anatomy:
    """The anatomy with its counts filled in; an error where it contradicts the probe."""
    layout = anatomy.layout(probe.image_size)
    if layout.tokens != probe.tokens:
        height, width = probe.image_size
        raise UnsupportedModelError(
            f"expected {layout.tokens} tokens ({layout}) for {height}x{width} pixels,"
            f" found {probe.tokens} in the blocks. Correct the Anatomy, or switch token dropping off."
        )
    linears = [part(block, anatomy.down_projection) for block in probe.blocks]
    if not all(isinstance(linear, nn.Linear) and linear.out_features == probe.width for linear in linears):
        raise UnsupportedModelError(
            f"expected a linear layer to width {probe.width} at {anatomy.down_projection!r} in each of"
            f" {probe.depth} blocks, found {linears[0]}. Correct the Anatomy."
        )
    probe.check_embedding(anatomy.patch_embedding, layout.grid)
    neurons = anatomy.down_projections(model)[0].in_features
    measured = replace(
        anatomy,
        depth=probe.depth,
        width=probe.width,
        neurons=neurons,
        heads=heads,
        masked=probe.masked,
        stream=probe.place(anatomy.down_projection),
        head_error=probe.head_error,
    )
    for name in ("depth", "width", "neurons", "heads"):
        stated, found = getattr(anatomy, name), getattr(measured, name)
        if stated not in (0, found):
            raise UnsupportedModelError(
                f"expected {name} {stated}, found {found}. Correct the Anatomy, or leave {name} out: it is"
                " measured."
            )
    return measured


def refuse_compiled(model: nn.Module) -> None:
    """Raise UnsupportedModelError where torch.compile would run a graph past every hook."""
    for name, module in model.named_modules():
        compiled = hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        if compiled:
            raise UnsupportedModelError(
                f"{name or 'the model'} is compiled with torch.compile, which hides what happens inside."
                " Give vitreg the model as it was before (compiled._orig_mod) and compile afterwards."
            )


def _refuse_non_finite(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        # The sum of finite numbers is finite (in float32 and up), and far cheaper than isfinite().all().
        if not parameter.sum(dtype=torch.float32).isfinite() and not parameter.isfinite().all():
            raise NonFiniteError(
                f"weight {name} holds NaN or infinity. The checkpoint is damaged or training diverged;"
                " load an earlier one."
            )


def _find_block_stack(model: nn.Module) -> str:
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and _is_stack(module):
            return name
    raise UnsupportedModelError(
        f"found no stack of transformer blocks in {type(model).__name__}: no ModuleList or Sequential of"
        f" at least 2 modules of one class with at least 2 linear layers each. {PASS_AN_ANATOMY}"
    )


def _is_stack(module: nn.Module) -> bool:
    children = list(module.children())
    one_class = len({type(child) for child in children}) == 1
    return len(children) >= 2 and one_class and all(count_linears(child) >= 2 for child in children)


def _count_registers(model: nn.Module, constant_tokens: int) -> int:
    """Trained registers, told from CLS and distillation tokens by the name of their parameter."""
    for name, parameter in model.named_parameters():
        if _REGISTER_NAME.search(name) and parameter.dim() >= 2 and parameter.shape[-2] <= constant_tokens:
            return parameter.shape[-2]
    return 0
