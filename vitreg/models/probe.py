"""One watched forward pass over noise images, and what it shows of a model's parts.

What is the same for different images is a prefix token; what attention receives tells the heads; the linear
layer that leads back to the width is the MLP's down-projection.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitreg.errors import NonFiniteError, UnsupportedModelError
from vitreg.hooks import rows
from vitreg.hooks.attention import AttentionCall
from vitreg.hooks.attention_mode import intercept
from vitreg.hooks.row_attention import joined
from vitreg.hooks.rows import Row
from vitreg.hooks.stream import Stream, tensors_in
from vitreg.models.block_calls import BlockCalls
from vitreg.models.block_stack import PASS_AN_ANATOMY, blocks_in, holds_blocks
from vitreg.models.down_projection import Call
from vitreg.models.feature import MAKES_FEATURES, Feature
from vitreg.models.film import takes_films
from vitreg.models.given import Given, given_to
from vitreg.models.placement import device_of, dtype_of

Forward = Callable[[Tensor], Any]

NO_ATTENTION_SEEN = (
    "made no attention that vitreg sees: scaled_dot_product_attention, nn.MultiheadAttention, or softmax(q"
    " k^T) v step by step. If a library's own kernel computes it, select PyTorch's:"
    " model.set_attn_implementation('sdpa') in transformers, say. Other kinds of attention, or none, are not"
    " supported"
)
IMAGES = 3  # of a probe: two different ones, and the first again
CONTRAST = 4.0  # what is added to changed pixels, whose own values are -1 to 1


def part(module: nn.Module, path: str) -> nn.Module:
    """The submodule at a dotted path that an Anatomy names."""
    try:
        return module.get_submodule(path)
    except AttributeError as error:
        raise UnsupportedModelError(
            f"expected a module at {path!r} in {type(module).__name__}, found none. Correct the Anatomy."
        ) from error


def first_tensor(value: Any) -> Tensor | None:
    """The first tensor of what enters or leaves a module."""
    return next((tensor for _, tensor in tensors_in(value)), None)


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


class Probe:
    """One watched forward pass over two noise images and the first again, and what it showed."""

    def __init__(
        self, model: nn.Module, stack: str, image_size: tuple[int, int], embedding: str | None = None
    ) -> None:
        self.model, self.image_size, self.embedding = model, image_size, embedding
        self.blocks = blocks_in(part(model, stack))
        self.depth = len(self.blocks)
        if not self.blocks:
            raise UnsupportedModelError(f"expected blocks in {stack!r}, found none. Correct the Anatomy.")
        self.calls = BlockCalls(IMAGES)
        self.attention: list[tuple[int, tuple[int, ...]]] = []  # (block, shape of q)
        self.mixed: Tensor | None = None  # what attention in block 0 made of the values, (IMAGES, n, h * c)
        self.called: list[Call] = []  # of the modules within block 0, in order
        self.features: list[Feature] = []  # outputs before block 0, in order
        self.given = Given(None, None)  # of the model itself
        self.masked = False  # attention in the blocks has a mask or positional bias
        self.elsewhere: list[tuple[int, ...]] = []  # shapes of q of self-attention outside the blocks
        self.between = False  # whether there is some between the first block and the last
        self._inside: int | None = None
        self._running = False
        self.head_error = ""  # what the model raised after the last block

    # -- watching --------------------------------------------------------------------------------

    def run(self, forward: Forward) -> None:
        images = self.noise()
        with ExitStack() as stack, evaluating(self.model):
            for hook in self._hooks():
                stack.callback(hook.remove)
            self._seeing = stack.enter_context(intercept(joined(self._saw_attention), IMAGES))
            stack.enter_context(rows.row(rows.NOTHING))
            try:
                forward(images)
            except Exception as error:
                if not self.calls.inputs and isinstance(error, UnsupportedModelError):
                    raise
                if not self.calls.inputs:
                    raise self._could_not_run(forward, images, error) from error
                if len(self.calls.outputs) < self.depth:
                    raise self.unsupported(
                        f"block {len(self.calls.outputs)} fails on images of shape {tuple(images.shape)}"
                        f" ({type(error).__name__}: {one_line(error)})"
                    ) from error
                # Past the blocks: a head that wants more than images does not concern us.
                self.head_error = f"{type(error).__name__}: {one_line(error)}"

    def _could_not_run(self, forward: Forward, images: Tensor, error: Exception) -> UnsupportedModelError:
        kind, shape = type(self.model).__name__, tuple(images.shape)
        if takes_films(self.model, self.blocks[0], forward, images):
            return UnsupportedModelError(
                f"{kind} takes video, 5-dimensional input (b, frames, 3, h, w), and not images (b, 3, h, w)."
                " Models of video are not supported: give vitreg an image encoder."
            )
        return UnsupportedModelError(
            f"{kind} could not run on images of shape {shape} ({type(error).__name__}: {one_line(error)})."
            " Give vitreg the vision encoder itself (of a larger model, its vision tower), a matching size,"
            " or a `forward` that says how to call it."
        )

    def entering(self, forward: Forward, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n d"]:
        """The residual stream (b, n, d) that enters block 0 for other images of the same size.

        Where images lie in a row, their patches are in the model's order until somebody proved it.
        """
        streams: list[Tensor] = []
        with self.blocks[0].register_forward_pre_hook(
            lambda module, args, kwargs: streams.append(self._place.of_call(args, kwargs)), with_kwargs=True
        ):
            try:
                with evaluating(self.model), rows.row(Row(len(images), self.tokens)):
                    forward(images)
            except Exception:
                if not streams:
                    raise
        return streams[0]

    def noise(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(2, 3, *self.image_size, generator=generator)[[0, 1, 0]] * 2 - 1
        return images.to(device_of(self.model), dtype_of(self.model))

    def _hooks(self) -> Iterator[Any]:
        yield self.model.register_forward_pre_hook(self._begin, with_kwargs=True)
        yield self.model.register_forward_hook(self._end)
        for index, block in enumerate(self.blocks):
            yield block.register_forward_pre_hook(self._enter(index), with_kwargs=True)
            yield block.register_forward_hook(self._leave)
        for name, module in self.blocks[0].named_modules():
            if name:
                yield module.register_forward_hook(self._saw_call(name), with_kwargs=True)
        for name, module in self.model.named_modules():
            if isinstance(module, MAKES_FEATURES) or name == self.embedding:
                yield module.register_forward_hook(self._saw_feature(name))

    def _enter(self, index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._inside = index
            self.calls.enter(module, args, kwargs)
            if self.calls.in_a_row and (tokens := self.calls.row_length):
                rows.know(Row(IMAGES, tokens // IMAGES))
                rows.enter_block(tokens)

        return hook

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._inside = None
        self.calls.leave(output)

    def _saw_call(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = next(iter((*args, *kwargs.values())), None)
            if isinstance(given, Tensor) and isinstance(output, Tensor):
                self.called.append(Call(name, module, given, tuple(output.shape)))

        return hook

    def _saw_feature(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not self.calls.inputs and (found := first_tensor(output)) is not None:
                entering = first_tensor(args)
                sides = (0, 0) if entering is None or entering.dim() != 4 else tuple(entering.shape[2:])
                self.features.append(Feature(name, module, tuple(found.shape), sides))

        return hook

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._running, self.given = True, given_to(args, kwargs)

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running = False

    def _saw_attention(self, call: AttentionCall) -> None:
        shape = tuple(call.q.shape)
        if self._inside is not None:
            self.attention.append((self._inside, shape))
            if self._inside == 0:
                self.mixed = call.compute(call.mask).transpose(1, 2).flatten(2) if len(shape) == 4 else None
            self.masked |= call.mask is not None
        elif self._running and call.tokens == call.k.shape[-2] > 1:
            self.elsewhere.append(shape)
            self.between |= 0 < len(self.calls.outputs) < self.depth

    # -- concluding ------------------------------------------------------------------------------

    @cached_property
    def _place(self) -> Stream:
        found = self.calls.stream()
        assert found is not None, "check_stream comes first"
        return found

    def place(self, down: str) -> Stream:
        """Where calls and outputs hold the residual stream; `down` is the path of the down-projection."""
        shape = next((call.output for call in self.called if call.name == down), None)
        return replace(self._place, neurons_tokens_first=shape == (self.tokens, IMAGES, self.width))

    @cached_property
    def stream(self) -> Float[Tensor, "b n d"]:
        """The residual stream that enters block 0, (IMAGES, n, d)."""
        return self.calls.by_image(self._place.argument)

    @property
    def row(self) -> tuple[int, ...]:
        """The shape of the stream as the blocks have it."""
        return tuple(self.calls.entered[self._place.argument].shape)

    @property
    def tokens(self) -> int:
        return self.stream.shape[1]

    @property
    def width(self) -> int:
        return self.stream.shape[2]

    def check_stream(self) -> None:
        """Every block must map one (b, n, d) stream to another of the same shape, once per pass."""
        if not self.calls.inputs:
            self._refuse_uncalled()
        if len(self.calls.inputs) == self.depth == len(self.calls.outputs):
            rivals = self.calls.rivals()
            if len(rivals) > 1:
                raise self.unsupported(
                    f"they hand on {len(rivals)} tensors of tokens that differ from block to block"
                    f" ({' and '.join(map(str, rivals))}). Which of them is the residual stream cannot be"
                    " told"
                )
        if self.calls.stream() is None:
            self._refuse_shapes()
        if len(self.calls.inputs) != self.depth or len(self.calls.outputs) != self.depth:
            raise self.unsupported(f"a forward pass calls them {len(self.calls.inputs)} times")
        if self.between:
            raise self.unsupported(
                "between them the model computes attention of its own (in a second list of blocks, say), so"
                " that they are a part of what makes its tokens"
            )
        if self.calls.not_finite is not None:
            raise NonFiniteError(
                f"block {self.calls.not_finite} gives NaN or infinity for a noise image: weights that were"
                " never set or loaded, perhaps."
            )
        if not self.calls.linked():
            raise self.unsupported(
                "what one of them gives back is not what the next one is given: the model changes its tokens"
                " between them"
            )
        others = {shape for shape in self.elsewhere if shape[-2] != self.tokens}
        if others:
            raise self.unsupported(
                f"outside them the model computes self-attention over {sorted(s[-2] for s in others)} tokens,"
                f" not {self.tokens}. Hierarchical models and those with a decoder are not supported; of the"
                " latter, give vitreg the encoder alone"
            )
        if not self.stream.isfinite().all():
            raise NonFiniteError("the input of block 0 holds NaN or infinity for a noise image.")
        if not bool(equal_tokens(self.stream[0], self.stream[2]).all()):
            raise self.unsupported(
                "the same image gives them other tokens each time. Random masks and shuffles are not"
                " supported: switch them off, or give vitreg the encoder alone"
            )

    def _refuse_uncalled(self) -> None:
        if self.called:
            raise self.unsupported(
                f"the model's forward pass calls the parts of block 0 ({self.called[0].name!r} first), and"
                " never the block itself: a pair of attention and MLP in a list, say. Give the blocks a"
                " `forward` that calls their parts, and let the model call them"
            )
        raise self.unsupported("block 0 was never called by the model's forward pass", PASS_AN_ANATOMY)

    def _refuse_shapes(self) -> None:
        """Say why no tensor of a block's call is a residual stream."""
        shapes = [*self.calls.inputs, *self.calls.outputs]
        first = shapes[0]
        if first is None or len(first) == 4:
            raise self.unsupported(
                f"block 0 takes {'no tensor' if first is None else f'a 4-dimensional input {first}'}."
                " Windowed and convolutional models cannot carry extra tokens"
            )
        if len(first) != 3 or IMAGES not in first[:2]:
            raise self.unsupported(
                f"block 0 takes an input of shape {first} for {IMAGES} images, not (b, n, d)."
                " Models that split an image into windows or several views are not supported"
            )
        changed = next((shape for shape in shapes if shape != first), None)
        if changed:
            raise self.unsupported(
                f"the residual stream changes from {first} to {changed}."
                " Hierarchical models, which pool or widen tokens on the way, have no fixed patch tokens"
            )
        raise self.unsupported(f"no block changes its tokens {first}, or they come and go in other arguments")

    def constant_tokens(self) -> int:
        """Tokens that are the same for both images; they must come first (prefix, then registers)."""
        constant = equal_tokens(self.stream[0], self.stream[1])
        count = int(constant.sum())
        if count == self.tokens:
            raise self.unsupported("their input does not depend on the image")
        if not bool(constant[:count].all()):
            places = constant.nonzero().flatten().tolist()
            named = ", ".join(map(str, places[:3])) + (", ..." if count > 3 else "")
            raise self.unsupported(
                f"of their tokens {count} do not depend on the image (number {named}) and are not in front of"
                " the patches"
            )
        return count

    def check_embedding(self, path: str | None, grid: tuple[int, int]) -> None:
        """What an Anatomy says of the patch embedding must be what the probe saw of it."""
        if path is None:
            return
        part(self.model, path)
        features = [feature for feature in self.features if feature.name == path]
        seen = [x.grid if len(x.shape) == 4 else x.shape[1:2] for x in features]
        if grid not in seen and (grid[0] * grid[1],) not in seen:
            raise UnsupportedModelError(
                f"expected {path!r} to embed {grid[0]}x{grid[1]} patches before block 0, found"
                f" {seen[-1] if seen else 'no call of it'}. Correct the Anatomy."
            )

    def heads(self) -> int:
        """Heads of the one attention that each block must compute over all tokens."""
        for index in range(self.depth):
            shapes = [shape for block, shape in self.attention if block == index]
            if not shapes:
                raise self.unsupported(f"block {index} {self._why_no_attention()}")
            if len(shapes) > 1:
                raise self.unsupported(f"block {index} computes attention {len(shapes)} times, not once")
            if len(shapes[0]) == 4 and shapes[0][2] != self.tokens == shapes[0][3]:
                raise self.unsupported(
                    f"attention in block {index} is over channels, not over tokens (cross-covariance), so"
                    " that no token attends to another"
                )
            if len(shapes[0]) != 4 or shapes[0][0] != IMAGES or shapes[0][2] != self.tokens:
                raise self.unsupported(
                    f"attention in block {index} has queries of shape {shapes[0]}, not (b, heads,"
                    f" {self.tokens} tokens, channels). Windowed models cannot carry extra tokens"
                )
        return self.attention[0][1][1]

    def _why_no_attention(self) -> str:
        """What a block does in place of attention."""
        changed = self._seeing.steps.changed
        if not changed:
            return NO_ATTENTION_SEEN
        return (
            f"changes its attention by {changed!r} between q k^T and the product with the values (heads that"
            " are mixed, say), which vitreg cannot follow"
        )

    def unsupported(self, reason: str, hint: str = "") -> UnsupportedModelError:
        kind = type(self.model).__name__
        found = "stages of several blocks" if holds_blocks(self.blocks[0]) else "blocks"
        return UnsupportedModelError(
            f"{kind} is not a Vision Transformer that vitreg can read: found {self.depth} {found}, but"
            f" {reason}. {hint}".rstrip()
        )


def equal_tokens(one: Tensor, other: Tensor) -> Tensor:
    """Which tokens are equal, up to rounding, which in some kernels differs within a batch."""
    one, other = one.float(), other.float()
    scale = one.abs().amax(-1) + other.abs().amax(-1)
    return (one - other).abs().amax(-1) <= 1e-4 * scale


def one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
