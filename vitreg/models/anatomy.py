"""Where things are in a Vision Transformer, found by structure and checked by one forward pass.

    anatomy = find_anatomy(model, forward, image_size=(224, 224))
    layout = anatomy.layout(image_size=(224, 224))
    patches = residual[:, layout.patch_slice]

No library is named here. The block stack is the first homogeneous list of modules that hold linear
layers; the neurons of a block are what enters its MLP's down-projection; prefix tokens are those that
do not depend on the image. Layers are 0-based: layer i is the residual stream after block i, before
any final norm.
"""

import re
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from vitreg.errors import NonFiniteError, UnsupportedModelError
from vitreg.hooks.block_edit import without_edits
from vitreg.hooks.stream import Stream
from vitreg.hooks.torch_internals import is_compiled
from vitreg.hooks.weights import inputs_of, is_ordinary, outputs_of
from vitreg.models.block_stack import blocks_in, find_block_stack
from vitreg.models.layout import TokenLayout
from vitreg.models.mlp import find_mlp
from vitreg.models.packed import RowOfEachPass, read_rows, rows_unread
from vitreg.models.pairs import pairs_as_blocks
from vitreg.models.patches import measure_patches, prove_grid
from vitreg.models.probe import Forward, Probe, part
from vitreg.models.room import room_for_registers

_REGISTER_NAME = re.compile(r"(^|\.)registers?$|(^|[._])(reg|register|storage)_?tokens?$")


@dataclass(frozen=True)
class Anatomy:
    """Where a model keeps its blocks and neurons, and how its tokens are ordered.

    `blocks` is the dotted path of the block stack (a list of blocks, or of chunks of them),
    `down_projection` the path within a block of the MLP's last linear layer (its input is the neuron
    vector), `patch_embedding` the path of the module whose output is the patch grid before positions are
    added (None: not found, and what needs it is left out), `patch_size` (height, width) in pixels. The four
    counts are measured by the probe; those that are given must agree with it. `padding` (height, width):
    pixels that the model adds to an image before it cuts patches; without it, what does not fill a patch is
    left out.

    Also measured: `masked`, whether attention has a mask or a positional bias; `stream`, where the blocks'
    calls and outputs hold the residual stream; `position_tables`, of the tables that each block makes for a
    fixed number of tokens, what stands there for a token without a position (() where no block does);
    `no_registers`, why no token can be added inside the blocks ("" where one can); `head_error`, what the
    model raises after its last block when it is given images alone ("" if nothing).
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
    padding: tuple[int, int] = (0, 0)
    stream: Stream = field(default_factory=Stream)
    position_tables: tuple[tuple[float, ...], ...] = ()
    no_registers: str = ""
    head_error: str = ""

    def block_modules(self, model: nn.Module) -> list[nn.Module]:
        return blocks_in(model.get_submodule(self.blocks))

    def down_projections(self, model: nn.Module) -> list[nn.Module]:
        """The module of each block that the neurons enter (hooks/weights.py: what it multiplies by)."""
        return [block.get_submodule(self.down_projection) for block in self.block_modules(model)]

    def layout(self, image_size: tuple[int, int]) -> TokenLayout:
        """The token layout of a forward pass on images of (height, width) pixels."""
        (height, width), (high, wide), (below, beside) = image_size, self.patch_size, self.padding
        return TokenLayout(self.prefix, self.registers, ((height + below) // high, (width + beside) // wide))

    def pixels(self, grid: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of the images that a grid of patches covers, without any rest."""
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
    with without_edits(model), pairs_as_blocks(model), rows_unread(model):
        return _found(model, forward, image_size, given)


def _found(model: nn.Module, forward: Forward, image_size: tuple[int, int], given: Anatomy | None) -> Anatomy:
    stack = given.blocks if given else find_block_stack(model)
    probe = Probe(model, stack, image_size, given.patch_embedding if given else None)
    probe.run(forward)
    probe.check_stream()
    heads = probe.heads()
    anatomy = _measured(given or _seen(model, stack, probe, forward), model, probe, heads)
    if anatomy.stream.row_axes:
        read_rows(model, row_of_each_pass(model, forward, anatomy))
    prove_grid(probe, anatomy.layout(image_size), anatomy.patch_size, forward)
    room = room_for_registers(probe, anatomy.stream, anatomy.prefix + anatomy.registers, forward)
    return replace(anatomy, position_tables=room.tables, no_registers=room.refused)


def row_of_each_pass(model: nn.Module, forward: Forward, anatomy: Anatomy) -> RowOfEachPass:
    """What reads how the images of a pass lie, of a model that packs them into a row."""
    return RowOfEachPass(forward, anatomy.block_modules(model)[0], anatomy.stream, anatomy.patch_size)


def _seen(model: nn.Module, stack: str, probe: Probe, forward: Forward) -> Anatomy:
    registers = _count_registers(model, probe.constant_tokens())
    patches = measure_patches(probe, forward)
    return Anatomy(
        blocks=stack,
        down_projection=find_mlp(probe),
        prefix=probe.constant_tokens() - registers,
        registers=registers,
        patch_size=patches.size,
        patch_embedding=patches.embedding,
        padding=patches.padding,
    )


def _measured(anatomy: Anatomy, model: nn.Module, probe: Probe, heads: int) -> Anatomy:
    """The anatomy with its counts filled in; an error where it contradicts the probe."""
    layout = anatomy.layout(probe.image_size)
    if layout.tokens != probe.tokens:
        height, width = probe.image_size
        raise UnsupportedModelError(
            f"expected {layout.tokens} tokens ({layout}) for {height}x{width} pixels,"
            f" found {probe.tokens} in the blocks. Correct the Anatomy, or switch token dropping off."
        )
    neurons = _count_neurons(anatomy.down_projection, probe)
    probe.check_embedding(anatomy.patch_embedding, layout.grid)
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


def _count_neurons(down: str, probe: Probe) -> int:
    """The neurons of each block: what the modules at `down` take. An error where they are no such modules."""
    modules = [part(block, down) for block in probe.blocks]
    try:
        sizes = {(inputs_of(module), outputs_of(module)) for module in modules}
    except UnsupportedModelError:
        sizes = set()
    if len(sizes) != 1 or {size[1] for size in sizes} != {probe.width}:
        raise UnsupportedModelError(
            f"expected a linear layer to width {probe.width} at {down!r} in each of {probe.depth} blocks,"
            f" found {modules[0]}. Correct the Anatomy."
        )
    return sizes.pop()[0]


def refuse_compiled(model: nn.Module) -> None:
    """Raise UnsupportedModelError where torch.compile would run a graph past every hook."""
    for name, module in model.named_modules():
        if is_compiled(module):
            raise UnsupportedModelError(
                f"{name or 'the model'} is compiled with torch.compile, which hides what happens inside."
                " Give vitreg the model as it was before (compiled._orig_mod) and compile afterwards."
            )


def _refuse_non_finite(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not is_ordinary(parameter) or not parameter.is_floating_point():
            continue  # offloaded, sharded or packed: the probe sees what they compute
        # The sum of finite numbers is finite (in float32 and up), and far cheaper than isfinite().all().
        if not parameter.sum(dtype=torch.float32).isfinite() and not parameter.isfinite().all():
            raise NonFiniteError(
                f"weight {name} holds NaN or infinity. The checkpoint is damaged or training diverged;"
                " load an earlier one."
            )


def _count_registers(model: nn.Module, constant_tokens: int) -> int:
    """Trained registers, told from CLS and distillation tokens by the name of their parameter."""
    for name, parameter in model.named_parameters():
        if _REGISTER_NAME.search(name) and parameter.dim() >= 2 and parameter.shape[-2] <= constant_tokens:
            return parameter.shape[-2]
    return 0
