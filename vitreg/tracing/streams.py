"""Watch a forward pass: each block's stream, neurons and attention calls, as they are computed."""

import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitreg.errors import UnsupportedModelError
from vitreg.hooks.attention import AttentionCall
from vitreg.hooks.attention_mode import intercept
from vitreg.hooks.block_edit import edits_of
from vitreg.hooks.row_attention import joined
from vitreg.hooks.token_order import in_order, shown
from vitreg.hooks.torch_internals import in_backward
from vitreg.models.anatomy import refuse_compiled
from vitreg.models.backbone import Backbone
from vitreg.models.given import given_to, one_grid
from vitreg.models.layout import TokenLayout
from vitreg.models.probe import NO_ATTENTION_SEEN


class watch:  # noqa: N801 - used as a verb, like torch.no_grad
    """While entered, hand what each block computes to functions, in order, for this thread only.

    on_start()                          a forward pass enters block 0
    on_embedding(patches (b, p, d))     the patch embedding, before positions, where the model has one
    on_block(layer, residual (b, n, d)) the residual stream after block `layer`
    on_neurons(layer, a (b, n, f))      the input of the MLP's down-projection
    on_attention(layer, call)           q, k, v and rows of attention, computed on demand

    Tokens are those of `layout`; in neurons and attention, which are inside the blocks, those of `inner`: a
    fix may carry more registers there, which stand behind the model's own.

    Hooks are installed on entering and removed on leaving; the model's results are untouched. What a
    backward pass recomputes (gradient checkpointing) is not handed out a second time.
    """

    _thread: int | None = None  # the one that entered

    def __init__(
        self,
        vit: Backbone,
        *,
        on_start: Callable[[], None] | None = None,
        on_embedding: Callable[[Float[Tensor, "b p d"]], None] | None = None,
        on_block: Callable[[int, Float[Tensor, "b n d"]], None] | None = None,
        on_neurons: Callable[[int, Float[Tensor, "b n f"]], None] | None = None,
        on_attention: Callable[[int, AttentionCall], None] | None = None,
    ) -> None:
        self._vit = vit
        self._on_start, self._on_embedding, self._on_block = on_start, on_embedding, on_block
        self._on_neurons, self._on_attention = on_neurons, on_attention
        self._inside: int | None = None
        self._attended = False  # by the block that is running
        self._stack = ExitStack()
        self.layout = vit.layout  # of the latest pass
        self._from_images = False  # whether the model was given images that say it
        self._blocks = vit.anatomy.block_modules(vit.model)
        self._inner: dict[int, TokenLayout] = {}  # per layer, where it is not `layout`
        self._layer = 0  # that runs, or ran last

    @property
    def inner(self) -> TokenLayout:
        """The layout of neurons and attention in the block that runs, or ran last."""
        return self.inside(self._layer)

    @property
    def edited(self) -> bool:
        """Whether a fix is applied, so that there may be more tokens inside the blocks."""
        return any(map(edits_of, self._blocks))

    def inside(self, layer: int) -> TokenLayout:
        """The layout of neurons and attention in one block of the latest pass."""
        return self._inner.get(layer, self.layout)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of a watched model carries the hooks along: they lead to a watch that sees nothing."""
        return object.__new__, (watch,)

    def __enter__(self) -> "watch":
        self._thread = threading.get_ident()
        model, anatomy = self._vit.model, self._vit.anatomy
        refuse_compiled(model)
        downs = anatomy.down_projections(model)
        hooks: list[Any] = [model.register_forward_pre_hook(self._given, with_kwargs=True)]
        for layer, block in enumerate(self._blocks):
            hooks.append(block.register_forward_pre_hook(partial(self._entered, layer), with_kwargs=True))
            hooks.append(block.register_forward_hook(partial(self._left, layer)))
            if self._on_neurons:
                hooks.append(
                    downs[layer].register_forward_pre_hook(partial(self._neurons, layer), prepend=True)
                )
        if anatomy.patch_embedding:
            hooks.append(model.get_submodule(anatomy.patch_embedding).register_forward_hook(self._embedded))
        for hook in hooks:
            self._stack.callback(hook.remove)
        if self._on_attention:
            self._joined = joined(self._attention)
            self._seeing = self._stack.enter_context(intercept(self._joined))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _ours(self) -> bool:
        # No graph task: not inside a backward pass.
        return threading.get_ident() == self._thread and not in_backward()

    def _given(self, module: nn.Module, args: Any, kwargs: Any = None) -> None:
        """What the model is given says the grid: images do, and so does a table of grids beside patches.

        PyTorch calls this without keywords if another thread's watch is just taking its hook away.
        """
        if not self._ours():
            return
        given = given_to(args, kwargs)
        self._from_images = given.images is not None
        if given.images is not None:
            self.layout = self._vit.layout_for(given.images)
        elif given.table is not None:
            self.layout = replace(self.layout, grid=one_grid(given.table))

    def _entered(self, layer: int, module: nn.Module, args: Any, kwargs: Any = None) -> None:
        if self._ours():
            self._inside, self._attended, self._layer = layer, False, layer
            if self._on_attention and kwargs is not None:
                stream = self._vit.anatomy.stream
                images = len(stream.of_call(args, kwargs))
                self._seeing.steps.images = 1 if stream.row_axes else images
            self._inner.pop(layer, None)
            if layer == 0 and self._on_start:
                self._on_start()

    def _left(self, layer: int, module: nn.Module, args: Any, output: Any) -> None:
        if not self._ours():
            return
        residual = self._vit.anatomy.stream.of_output(output)
        self._inside = None
        if self._on_attention:
            self._seeing.steps.forget()
            self._joined.forget()
        self._check(layer, residual.shape[1])
        if self._on_block:
            self._on_block(layer, residual.detach())

    def _check(self, layer: int, tokens: int) -> None:
        if tokens != self.layout.tokens:
            raise UnsupportedModelError(
                f"found {tokens} tokens after block {layer}, but {self.layout} makes {self.layout.tokens}."
                " Token dropping, merging and packing are not supported: switch them off (model.eval())."
            )
        if self._on_attention and not self._attended:
            raise UnsupportedModelError(f"block {layer} {NO_ATTENTION_SEEN}.")

    def _neurons(self, layer: int, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self._ours() and self._on_neurons:
            activation = in_order(self._vit.anatomy.stream.neurons(args[0].detach()))
            self._saw_tokens(layer, activation.shape[1])
            self._on_neurons(layer, activation)

    def _saw_tokens(self, layer: int, tokens: int) -> None:
        if edits_of(self._blocks[layer]):
            more = tokens - self.layout.tokens
            self._inner[layer] = replace(self.layout, registers=self.layout.registers + more)

    def _embedded(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if not self._ours():
            return
        if output.dim() == 4 and isinstance(module, nn.Linear):  # (b, rows, columns, c)
            self._check_grid((output.shape[1], output.shape[2]))
            output = output.flatten(1, 2)
        elif output.dim() == 4:
            self._check_grid((output.shape[2], output.shape[3]))
            output = output.flatten(2).transpose(1, 2)
        if self._on_embedding:
            self._on_embedding(output.detach())

    def _check_grid(self, grid: tuple[int, int]) -> None:
        """Whoever reads images takes their layout by the patch size: it must be that of the pass."""
        if self._from_images and grid != self.layout.grid:
            high, wide = self._vit.anatomy.patch_size
            raise UnsupportedModelError(
                f"the images have {grid[0]}x{grid[1]} patches, but their size makes"
                f" {self.layout.grid[0]}x{self.layout.grid[1]} of {high}x{wide} pixels. Use images of a"
                " multiple of the patch, or wrap the model with the image_size of these."
            )
        self.layout = replace(self.layout, grid=grid)

    def _attention(self, call: AttentionCall) -> None:
        if self._inside is not None and self._ours() and self._on_attention:
            self._attended = True
            call = shown(call)
            self._saw_tokens(self._inside, call.tokens)
            with torch.no_grad():
                self._on_attention(self._inside, call)


def token_norms(residual: Float[Tensor, "b n d"]) -> Float[Tensor, "b n"]:
    """L2 norm of each token, accumulated in float32 whatever the model's dtype."""
    return torch.linalg.vector_norm(residual, dim=-1, dtype=torch.float32)
