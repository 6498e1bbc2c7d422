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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from vitreg.attention import AttentionCall, intercept
from vitreg.errors import NonFiniteError, UnsupportedModelError

Forward = Callable[[Tensor], Any]

_REGISTER_NAME = re.compile(r"(^|[._])(reg|register|storage)_?tokens?$")
_PASS_AN_ANATOMY = "Pass an Anatomy to override."
NO_ATTENTION_SEEN = (
    "made no attention call that can be seen. If the model computes attention step by step, select a fused"
    " kernel: model.set_attn_implementation('sdpa') in transformers, timm.layers.set_fused_attn(True) before"
    " building in timm. Attention that is no scaled dot product is not supported"
)


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
    are given must agree with it.
    """

    blocks: str
    down_projection: str
    prefix: int
    registers: int
    patch_size: tuple[int, int]
    patch_embedding: str | None = None
    depth: int = field(default=0)
    width: int = field(default=0)
    neurons: int = field(default=0)
    heads: int = field(default=0)

    def block_modules(self, model: nn.Module) -> list[nn.Module]:
        return list(model.get_submodule(self.blocks).children())

    def down_projections(self, model: nn.Module) -> list[nn.Linear]:
        found = [block.get_submodule(self.down_projection) for block in self.block_modules(model)]
        return [linear for linear in found if isinstance(linear, nn.Linear)]

    def layout(self, image_size: tuple[int, int]) -> TokenLayout:
        """The token layout of a forward pass on images of (height, width) pixels."""
        grid = (image_size[0] // self.patch_size[0], image_size[1] // self.patch_size[1])
        return TokenLayout(self.prefix, self.registers, grid)


def find_anatomy(
    model: nn.Module, forward: Forward, image_size: tuple[int, int], given: Anatomy | None = None
) -> Anatomy:
    """Find the parts of `model`, or check those of `given`, by one forward pass on two noise images.

    `forward` runs the model on (b, 3, h, w) images; it may run a larger model that contains `model`.
    Raises UnsupportedModelError with the reason for a model that is not a plain Vision Transformer,
    NonFiniteError for weights with NaN or infinity.
    """
    refuse_compiled(model)
    _refuse_non_finite(model)
    stack = given.blocks if given else _find_block_stack(model)
    probe = _Probe(model, stack, image_size, given.patch_embedding if given else None)
    probe.run(forward)
    probe.check_stream()
    anatomy = given or Anatomy(
        blocks=stack,
        down_projection=probe.down_projection(),
        prefix=probe.constant_tokens() - (registers := _count_registers(model, probe.constant_tokens())),
        registers=registers,
        patch_size=probe.patch_size(),
        patch_embedding=probe.patch_embedding(),
    )
    return _measured(anatomy, model, probe)


def _measured(anatomy: Anatomy, model: nn.Module, probe: "_Probe") -> Anatomy:
    """The anatomy with its counts filled in; an error where it contradicts the probe."""
    layout = anatomy.layout(probe.image_size)
    if layout.tokens != probe.tokens:
        height, width = probe.image_size
        raise UnsupportedModelError(
            f"expected {layout.tokens} tokens ({layout}) for {height}x{width} pixels,"
            f" found {probe.tokens} in the blocks. Correct the Anatomy, or switch token dropping off."
        )
    linears = [_part(block, anatomy.down_projection) for block in probe.blocks]
    if not all(isinstance(linear, nn.Linear) and linear.out_features == probe.width for linear in linears):
        raise UnsupportedModelError(
            f"expected a linear layer to width {probe.width} at {anatomy.down_projection!r} in each of"
            f" {probe.depth} blocks, found {linears[0]}. Correct the Anatomy."
        )
    probe.check_embedding(anatomy.patch_embedding, layout)
    neurons = anatomy.down_projections(model)[0].in_features
    measured = replace(anatomy, depth=probe.depth, width=probe.width, neurons=neurons, heads=probe.heads())
    for name in ("depth", "width", "neurons", "heads"):
        stated, found = getattr(anatomy, name), getattr(measured, name)
        if stated not in (0, found):
            raise UnsupportedModelError(
                f"expected {name} {stated}, found {found}. Correct the Anatomy, or leave {name} out: it is"
                " measured."
            )
    return measured


def _part(module: nn.Module, path: str) -> nn.Module:
    """The submodule at a dotted path that an Anatomy names."""
    try:
        return module.get_submodule(path)
    except AttributeError as error:
        raise UnsupportedModelError(
            f"expected a module at {path!r} in {type(module).__name__}, found none. Correct the Anatomy."
        ) from error


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
        f" at least 2 modules of one class with at least 2 linear layers each. {_PASS_AN_ANATOMY}"
    )


def _is_stack(module: nn.Module) -> bool:
    children = list(module.children())
    one_class = len({type(child) for child in children}) == 1
    return len(children) >= 2 and one_class and all(len(_linears(child)) >= 2 for child in children)


def _linears(module: nn.Module) -> list[str]:
    return [name for name, child in module.named_modules() if isinstance(child, nn.Linear)]


def _count_registers(model: nn.Module, constant_tokens: int) -> int:
    """Trained registers, told from CLS and distillation tokens by the name of their parameter."""
    for name, parameter in model.named_parameters():
        if _REGISTER_NAME.search(name) and parameter.dim() >= 2 and parameter.shape[-2] <= constant_tokens:
            return parameter.shape[-2]
    return 0


def first_tensor(value: Any) -> Tensor | None:
    """The first tensor of what enters or leaves a block: the residual stream, by every library's habit."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        return next((found for item in value if (found := first_tensor(item)) is not None), None)
    return None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode and without gradients, and each module back in its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


class _Probe:
    """One watched forward pass over two different noise images, and what it showed."""

    def __init__(
        self, model: nn.Module, stack: str, image_size: tuple[int, int], embedding: str | None = None
    ) -> None:
        self.model, self.image_size, self.embedding = model, image_size, embedding
        self.blocks = list(_part(model, stack).children())
        self.depth = len(self.blocks)
        if not self.blocks:
            raise UnsupportedModelError(f"expected blocks in {stack!r}, found none. Correct the Anatomy.")
        self.inputs: list[Tensor | None] = []
        self.outputs: list[Tensor | None] = []
        self.attention: list[tuple[int, tuple[int, ...]]] = []  # (block, shape of q)
        self.called: list[tuple[str, tuple[int, ...]]] = []  # linear layers of block 0, in order
        self.features: list[tuple[str, tuple[int, ...]]] = []  # outputs before block 0, in order
        self._inside: int | None = None

    # -- watching --------------------------------------------------------------------------------

    def run(self, forward: Forward) -> None:
        images = self._noise()
        with ExitStack() as stack, evaluating(self.model):
            for hook in self._hooks():
                stack.callback(hook.remove)
            stack.enter_context(intercept(self._saw_attention))
            try:
                forward(images)
            except Exception as error:
                if not self.inputs:
                    raise UnsupportedModelError(
                        f"{type(self.model).__name__} could not run on images of shape"
                        f" {tuple(images.shape)} ({type(error).__name__}: {_one_line(error)}). Give vitreg"
                        " the vision encoder itself (of a larger model, its vision tower), a matching size,"
                        " or a `forward` that says how to call it."
                    ) from error
                if len(self.outputs) < self.depth:
                    raise
                # Past the blocks: a head that wants more than images does not concern us.

    def _noise(self) -> Tensor:
        parameter = next(self.model.parameters())
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(2, 3, *self.image_size, generator=generator) * 2 - 1
        return images.to(parameter.device, parameter.dtype if parameter.is_floating_point() else None)

    def _hooks(self) -> Iterator[Any]:
        for index, block in enumerate(self.blocks):
            yield block.register_forward_pre_hook(self._enter(index), with_kwargs=True)
            yield block.register_forward_hook(self._leave)
        for name, module in self.blocks[0].named_modules():
            if isinstance(module, nn.Linear):
                yield module.register_forward_hook(self._saw_linear(name))
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear) or name == self.embedding:
                yield module.register_forward_hook(self._saw_feature(name))

    def _enter(self, index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._inside = index
            self.inputs.append(first_tensor((args, kwargs)))

        return hook

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._inside = None
        self.outputs.append(first_tensor(output))

    def _saw_linear(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self.called.append((name, tuple(output.shape)))

        return hook

    def _saw_feature(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not self.inputs and (found := first_tensor(output)) is not None:
                self.features.append((name, tuple(found.shape)))

        return hook

    def _saw_attention(self, call: AttentionCall) -> None:
        if self._inside is not None:
            self.attention.append((self._inside, tuple(call.q.shape)))

    # -- concluding ------------------------------------------------------------------------------

    @property
    def stream(self) -> Tensor:
        """The residual stream that enters block 0, (2, n, d)."""
        found = self.inputs[0]
        assert found is not None
        return found

    @property
    def tokens(self) -> int:
        return self.stream.shape[1]

    @property
    def width(self) -> int:
        return self.stream.shape[2]

    def check_stream(self) -> None:
        """Every block must map one (b, n, d) stream to another of the same shape, once per pass."""
        if not self.inputs:
            raise self._unsupported("block 0 was never called by the model's forward pass")
        shapes = [None if x is None else tuple(x.shape) for x in (*self.inputs, *self.outputs)]
        first = shapes[0]
        if first is None or len(first) == 4:
            raise self._unsupported(
                f"block 0 takes {'no tensor' if first is None else f'a 4-dimensional input {first}'}."
                " Windowed and convolutional models cannot carry extra tokens"
            )
        if len(first) != 3 or first[0] != 2:
            raise self._unsupported(
                f"block 0 takes an input of shape {first} for 2 images, not (b, n, d). Use the batch-first"
                " form of the model"
            )
        changed = next((shape for shape in shapes if shape != first), None)
        if changed:
            raise self._unsupported(
                f"the residual stream changes from {first} to {changed}."
                " Hierarchical models, which pool or widen tokens on the way, have no fixed patch tokens"
            )
        if len(self.inputs) != self.depth or len(self.outputs) != self.depth:
            raise self._unsupported(f"a forward pass calls them {len(self.inputs)} times")
        if not self.stream.isfinite().all():
            raise NonFiniteError("the input of block 0 holds NaN or infinity for a noise image.")

    def constant_tokens(self) -> int:
        """Tokens that are the same for both images; they must come first (prefix, then registers)."""
        one, other = self.stream.float()
        # Equal up to rounding, which may differ between images of one batch in some kernels.
        scale = one.abs().amax(-1) + other.abs().amax(-1)
        constant = (one - other).abs().amax(-1) <= 1e-4 * scale
        count = int(constant.sum())
        if count == self.tokens:
            raise self._unsupported("their input does not depend on the image")
        if not bool(constant[:count].all()):
            raise self._unsupported(
                f"the tokens that do not depend on the image are at {constant.nonzero().flatten().tolist()},"
                " not in front of the patches"
            )
        return count

    def down_projection(self) -> str:
        """The linear layer of block 0 that leads from the MLP's neurons back to the width."""
        linears = dict(self.blocks[0].named_modules())
        names = [
            name
            for name, shape in self.called
            if isinstance(linear := linears[name], nn.Linear)
            and linear.out_features == self.width != linear.in_features
            and shape == tuple(self.stream.shape)
        ]
        if not names:
            raise self._unsupported(
                f"block 0 has no MLP: no linear layer leads to its width {self.width} from another"
            )
        if len(names) > 1:
            names = [name for name in names if not self._is_attention_output(linears, name)]
        if len(names) != 1:
            raise self._unsupported(f"block 0 has {len(names)} MLPs ({', '.join(names)}), not one")
        return names[0]

    def _is_attention_output(self, linears: dict[str, nn.Module], name: str) -> bool:
        """Attention with its own width also leads back to d: its input is exactly heads x channels."""
        linear = linears[name]
        widths = {heads * channels for block, (_, heads, _, channels) in self.attention if block == 0}
        siblings = [n for n in linears if n.rpartition(".")[0] == name.rpartition(".")[0]]
        queries = [n for n in siblings if re.search(r"qkv|q_proj|query|in_proj", n)]
        return isinstance(linear, nn.Linear) and linear.in_features in widths and bool(queries)

    def patch_size(self) -> tuple[int, int]:
        height, width = self.image_size
        rows, columns = self._grid()[1]
        return height // rows, width // columns

    def patch_embedding(self) -> str | None:
        return self._grid()[0]

    def check_embedding(self, path: str | None, layout: TokenLayout) -> None:
        """What an Anatomy says of the patch embedding must be what the probe saw of it."""
        if path is None:
            return
        _part(self.model, path)
        seen = [shape[2:] if len(shape) == 4 else shape[1:2] for name, shape in self.features if name == path]
        if layout.grid not in seen and (layout.patches,) not in seen:
            raise UnsupportedModelError(
                f"expected {path!r} to embed {layout.grid[0]}x{layout.grid[1]} patches before block 0, found"
                f" {seen[-1] if seen else 'no call of it'}. Correct the Anatomy."
            )

    def _grid(self) -> tuple[str | None, tuple[int, int]]:
        """The last feature map before block 0 with as many cells as there are patches, and its grid."""
        patches = self.tokens - self.constant_tokens()
        maps = [(name, (s[2], s[3])) for name, s in self.features if len(s) == 4]
        fitting = [(name, grid) for name, grid in maps if grid[0] * grid[1] == patches]
        if fitting:
            return fitting[-1]
        height, width = self.image_size
        flat = [name for name, s in self.features if len(s) == 3 and s[1] == patches]
        if maps and not flat:
            rows, columns = maps[-1][1]
            raise self._unsupported(
                f"of the {rows}x{columns} cells of {maps[-1][0]!r} only {patches} enter them as patch tokens."
                " Token dropping and merging are not supported: switch them off"
            )
        rows = round((patches * height / width) ** 0.5)
        if rows * (patches // max(rows, 1)) != patches:
            raise self._unsupported(
                f"{patches} patch tokens do not fill a grid over an image of {height}x{width} pixels"
            )
        return (flat[-1] if flat else None), (rows, patches // rows)

    def heads(self) -> int:
        """Heads of the one attention that each block must compute over all tokens."""
        for index in range(self.depth):
            shapes = [shape for block, shape in self.attention if block == index]
            if not shapes:
                raise self._unsupported(f"block {index} {NO_ATTENTION_SEEN}")
            if len(shapes) > 1:
                raise self._unsupported(f"block {index} computes attention {len(shapes)} times, not once")
            if len(shapes[0]) != 4 or shapes[0][0] != 2 or shapes[0][2] != self.tokens:
                raise self._unsupported(
                    f"attention in block {index} has queries of shape {shapes[0]}, not (b, heads,"
                    f" {self.tokens} tokens, channels). Windowed models cannot carry extra tokens"
                )
        return self.attention[0][1][1]

    def _unsupported(self, reason: str) -> UnsupportedModelError:
        kind = type(self.model).__name__
        return UnsupportedModelError(
            f"{kind} is not a Vision Transformer that vitreg can read: found {self.depth} blocks, but"
            f" {reason}. {_PASS_AN_ANATOMY}"
        )


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
