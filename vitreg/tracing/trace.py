"""Record what happens inside a Vision Transformer during a forward pass.

    with trace(vit, attention="cls") as t:
        vit(batch)
    t.norms          # (l, b, n)
    t.attention      # (l, b, h, r, n)

A trace holds the latest forward pass only, so memory grows with the batch and never with the number
of images. `watch` is the streaming form underneath: it hands each block's tensors to a function and
keeps nothing.
"""

import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitreg.errors import UnsupportedModelError
from vitreg.hooks.attention import AttentionCall, intercept
from vitreg.hooks.block_edit import edits_of
from vitreg.hooks.stream import tensors_in
from vitreg.hooks.token_order import in_order, shown
from vitreg.hooks.torch_internals import in_backward
from vitreg.models.anatomy import Anatomy, TokenLayout, refuse_compiled
from vitreg.models.backbone import Backbone
from vitreg.models.probe import NO_ATTENTION_SEEN

AttentionRows = Literal["cls", "registers", "full"] | Sequence[int]


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
        on_embedding: Callable[[Tensor], None] | None = None,
        on_block: Callable[[int, Tensor], None] | None = None,
        on_neurons: Callable[[int, Tensor], None] | None = None,
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
            hooks.append(block.register_forward_pre_hook(partial(self._entered, layer)))
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
            self._stack.enter_context(intercept(self._attention))
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
        given = [tensor for _, tensor in tensors_in((args, kwargs))]
        images = [x for x in given if x.dim() == 4 and x.shape[1] == 3]
        tables = [x for x in given if x.dim() == 2 and x.shape[1] == 2 and not x.is_floating_point()]
        self._from_images = bool(images)
        if images:
            self.layout = self._vit.anatomy.layout((images[0].shape[2], images[0].shape[3]))
        elif tables:
            self.layout = replace(self.layout, grid=_one_grid(tables[0]))

    def _entered(self, layer: int, module: nn.Module, args: Any) -> None:
        if self._ours():
            self._inside, self._attended, self._layer = layer, False, layer
            self._inner.pop(layer, None)
            if layer == 0 and self._on_start:
                self._on_start()

    def _left(self, layer: int, module: nn.Module, args: Any, output: Any) -> None:
        if not self._ours():
            return
        residual = self._vit.anatomy.stream.of_output(output)
        self._inside = None
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
        if output.dim() == 4:
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


def _one_grid(table: Tensor) -> tuple[int, int]:
    """The (rows, columns) that all images of a batch have."""
    grids = {(int(rows), int(columns)) for rows, columns in table.tolist()}
    if len(grids) > 1:
        raise UnsupportedModelError(
            f"found images of {len(grids)} patch grids in one batch, such as {sorted(grids)[:2]}: expected"
            " one. Pass images of each size by themselves."
        )
    return grids.pop()


class trace:  # noqa: N801 - used as a verb, like torch.no_grad
    """Record chosen parts of the latest forward pass of `vit` made inside the `with` block.

    norms       L2 norms of the residual stream after each block -> `t.norms` (l, b, n)
    residuals   the residual stream itself -> `t.residuals` (l, b, n, d)
    neurons     inputs of the MLPs' down-projections -> `t.neurons` (l, b, n, f)
    attention   "cls", "registers", "full", or patch numbers (row-major) -> `t.attention`
                (l, b, h, r, n), softmax over all tokens; r rows in the order asked for
    qkv         -> `t.q`, `t.k`, `t.v` (l, b, h, n, c), after rotary positions and q/k norm
    embedding   the patch embedding before positions -> `t.embedding` (b, p, d)
    layers      the 0-based layers to record (default all); the l axis follows this order

    Tokens n are those of `t.layout`; of neurons, attention, q, k and v those of `t.inner`, which counts the
    registers that a fix carries inside the blocks (and attention="registers" has their rows).
    Reading what was not asked for, or before a forward pass, is an AttributeError that says so.
    """

    def __init__(
        self,
        vit: Backbone,
        *,
        norms: bool = True,
        residuals: bool = False,
        neurons: bool = False,
        attention: AttentionRows | None = None,
        qkv: bool = False,
        embedding: bool = False,
        layers: Iterable[int] | None = None,
    ) -> None:
        self._vit = vit
        self.layers = _checked_layers(layers, vit.anatomy)
        self._rows = attention
        self._norms, self._residuals, self._qkv = norms, residuals, qkv
        self._record: dict[str, dict[int, Tensor]] = {}
        self._watch = watch(
            vit,
            on_start=self._forget,
            on_embedding=partial(self._put, "embedding", 0) if embedding else None,
            on_block=self._block,
            on_neurons=self._keep_neurons if neurons else None,
            on_attention=self._attention if attention is not None or qkv else None,
        )
        # A wrong request is an error before the forward pass; how many patches there are, only that can say.
        of_the_pass = (attention == "registers" and self._watch.edited) or _are_patches(attention)
        if attention is not None and not of_the_pass:
            _query_index(attention, vit.layout)

    def __enter__(self) -> "trace":
        self._watch.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._watch.__exit__(*error)

    @property
    def layout(self) -> TokenLayout:
        """The token layout of the recorded pass."""
        return self._watch.layout

    @property
    def inner(self) -> TokenLayout:
        """The token layout inside the recorded blocks (of the last of them, should they differ)."""
        return self._watch.inside(self.layers[-1])

    def __getattr__(self, name: str) -> Tensor:
        # Only called for names that are not attributes yet: the recorded tensors.
        record = self.__dict__.get("_record", {})
        if name == "embedding" and name in record:
            return record[name][0]
        if name not in record:
            raise AttributeError(
                f"this trace has no {name!r}: it holds {sorted(record) or 'nothing yet'}. Ask for it in"
                " trace(...) and run the model inside the with block."
            )
        missing = [layer for layer in self.layers if layer not in record[name]]
        if missing:
            raise AttributeError(
                f"this trace has no {name!r} of layers {missing}: the latest forward pass did not reach them."
            )
        if len({record[name][layer].shape for layer in self.layers}) > 1:
            raise AttributeError(
                f"this trace's {name!r} has other tokens in some layers than in others: the fix on this model"
                f" carries none through the first blocks. Ask for fewer of the layers {self.layers}."
            )
        return torch.stack([record[name][layer] for layer in self.layers])

    def _forget(self) -> None:
        """A new pass begins: drop the last one, before it takes memory beside the new, or mixes with it."""
        self._record = {name: kept for name, kept in self._record.items() if name == "embedding"}

    def _put(self, name: str, layer: int, value: Tensor) -> None:
        self._record.setdefault(name, {})[layer] = value

    def _block(self, layer: int, residual: Tensor) -> None:
        if layer not in self.layers:
            return
        if self._norms:
            self._put("norms", layer, token_norms(residual))
        if self._residuals:
            self._put("residuals", layer, residual)

    def _keep_neurons(self, layer: int, activation: Tensor) -> None:
        if layer in self.layers:
            self._put("neurons", layer, activation)

    def _attention(self, layer: int, call: AttentionCall) -> None:
        if layer not in self.layers:
            return
        if self._rows is not None:
            self._put("attention", layer, call.rows(_query_index(self._rows, self._watch.inner)))
        if self._qkv:
            for name in ("q", "k", "v"):
                self._put(name, layer, getattr(call, name).detach())


def token_norms(residual: Float[Tensor, "b n d"]) -> Float[Tensor, "b n"]:
    """L2 norm of each token, accumulated in float32 whatever the model's dtype."""
    return torch.linalg.vector_norm(residual, dim=-1, dtype=torch.float32)


def _checked_layers(layers: Iterable[int] | None, anatomy: Anatomy) -> list[int]:
    chosen = list(range(anatomy.depth)) if layers is None else list(layers)
    wrong = [layer for layer in chosen if not 0 <= layer < anatomy.depth]
    if wrong or not chosen:
        raise ValueError(f"layers {wrong or chosen}: expected one or more of 0 to {anatomy.depth - 1}.")
    return chosen


def _are_patches(rows: AttentionRows | None) -> bool:
    return rows is not None and not isinstance(rows, str) and len(rows) > 0 and min(rows) >= 0


def _query_index(rows: AttentionRows, layout: TokenLayout) -> Tensor | slice:
    """The query tokens whose attention rows are wanted."""
    if rows == "full":
        return slice(None)
    if rows == "cls":
        if layout.prefix == 0:
            raise UnsupportedModelError(
                "this model has no CLS token; ask for the attention of patches instead, by their numbers."
            )
        return slice(0, 1)
    if rows == "registers":
        if layout.registers == 0:
            raise UnsupportedModelError(
                "this model has no register tokens whose attention could be recorded."
            )
        return layout.register_slice
    if isinstance(rows, str):
        raise ValueError(f"attention={rows!r}: expected 'cls', 'registers', 'full' or patch numbers.")
    wrong = [patch for patch in rows if not 0 <= patch < layout.patches]
    if wrong or not rows:
        raise ValueError(f"patches {wrong or list(rows)}: expected some of 0 to {layout.patches - 1}.")
    return torch.tensor(list(rows)) + layout.patch_slice.start
