"""See every attention call of a model while its own kernel computes the result.

    with intercept(print):
        model(images)          # print is called with one AttentionCall per attention

`F.scaled_dot_product_attention` gets the real q, k and v (after rotary positions and q/k norm),
and `nn.MultiheadAttention` goes through `F.multi_head_attention_forward`, so a `TorchFunctionMode`
that catches these two sees every library. The model's own result is returned untouched, and a mode
is seen by the thread that entered it and by no other. (`nn.MultiheadAttention` alone notices any mode: in
evaluation without gradients it then leaves its fused inference kernel for the one that it trains with,
which rounds differently in the last bits.)
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vitreg.errors import UnsupportedModelError


class AttentionCall(ABC):
    """One attention: what its queries, keys and values are, computed only when asked for.

    Shapes: `q` (b, h, n, c), `k` and `v` (b, h, n, c), c channels per head (windowed models have other
    leading axes). Grouped keys and values
    are repeated to one per query head.
    """

    scale: float | None
    mask: Tensor | None
    causal: bool
    tokens: int  # queries

    @property
    @abstractmethod
    def q(self) -> Float[Tensor, "*b h n c"]: ...

    @property
    @abstractmethod
    def k(self) -> Float[Tensor, "*b h m c"]: ...

    @property
    @abstractmethod
    def v(self) -> Float[Tensor, "*b h m e"]: ...

    def queries(self, index: Tensor | slice) -> Float[Tensor, "*b h r c"]:
        """The queries of some tokens only."""
        return self.q[..., index, :]

    def rows(self, index: Tensor | slice) -> Float[Tensor, "*b h r m"]:
        """Attention rows of the query tokens `index`, each summing to 1 over keys, in float32.

        O(r * n): the n x n map is never built unless all rows are asked for.
        """
        q, k = self.queries(index).float(), self.k.float()
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        with torch.autocast(q.device.type, enabled=False):  # it would round the logits, as no kernel does
            # Keys first: for few queries this is 6 times faster than q @ k^T, whose right side is strided.
            logits = (k @ q.transpose(-2, -1)).transpose(-2, -1) * scale
        return (logits + self._bias(index, k.shape[-2], logits)).softmax(-1)

    def _bias(self, index: Tensor | slice, keys: int, logits: Tensor) -> Tensor | float:
        bias: Tensor | float = 0.0
        if self.mask is not None:
            mask = torch.atleast_2d(self.mask)
            mask = mask if mask.shape[-2] == 1 else mask[..., index, :]
            bias = logits.new_zeros(()).masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else mask
        if self.causal:
            allowed = torch.ones(self.tokens, keys, dtype=torch.bool, device=logits.device).tril()[index]
            bias = logits.new_zeros(()).masked_fill(~allowed, -torch.inf) + bias
        return bias


class SdpaCall(AttentionCall):
    """A call of F.scaled_dot_product_attention."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        self._q, self._k, self._v = query, key, value
        self.mask, self.causal, self.scale = attn_mask, is_causal, scale
        self.tokens = query.shape[-2]

    @property
    def q(self) -> Float[Tensor, "*b h n c"]:
        return self._q

    @property
    def k(self) -> Float[Tensor, "*b h m c"]:
        return self._per_query_head(self._k)

    @property
    def v(self) -> Float[Tensor, "*b h m e"]:
        return self._per_query_head(self._v)

    def _per_query_head(self, x: Tensor) -> Tensor:
        groups = self._q.shape[-3] // x.shape[-3]
        return x if groups == 1 else x.repeat_interleave(groups, dim=-3)


_MHA_SIGNATURE = inspect.signature(F.multi_head_attention_forward)


class MultiheadCall(AttentionCall):
    """A call of F.multi_head_attention_forward, whose arguments come before the in-projection.

    Queries, keys and values are projected again here, each only when asked for: reading one row
    costs one key projection, and nothing that the model computes is touched.
    """

    scale = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        bound = _MHA_SIGNATURE.bind(*args, **kwargs)
        bound.apply_defaults()
        self._args = bound.arguments
        self._heads: int = self._args["num_heads"]
        self.tokens = self._args["query"].shape[0]
        self.causal = bool(self._args["is_causal"]) and self._args["attn_mask"] is None
        self.mask = self._merged_mask()

    def _merged_mask(self) -> Tensor | None:
        mask, padding = self._args["attn_mask"], self._args["key_padding_mask"]
        if mask is not None:
            # This function's boolean masks say what to ignore; those of scaled_dot_product_attention
            # say what to keep.
            mask = ~mask if mask.dtype == torch.bool else mask
            if mask.dim() == 3:
                mask = mask.unflatten(0, (-1, self._heads))
        if padding is None:
            return mask
        ignored = torch.zeros_like(padding, dtype=torch.float32)
        ignored = (
            ignored.masked_fill(padding, -torch.inf) if padding.dtype == torch.bool else ignored + padding
        )
        ignored = ignored[:, None, None, :]
        if mask is None:
            return ignored
        return ignored.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else ignored + mask

    def _project(self, source: str, part: int, index: Tensor | slice = slice(None)) -> Tensor:
        added = [name for name in ("bias_k", "static_k") if self._args[name] is not None]
        if added or self._args["add_zero_attn"]:
            raise UnsupportedModelError(
                f"attention over keys that are no tokens ({', '.join(added) or 'add_zero_attn'}) is not"
                " supported."
            )
        x: Tensor = self._args[source][index]
        if self._args["use_separate_proj_weight"]:
            weight = self._args[("q_proj_weight", "k_proj_weight", "v_proj_weight")[part]]
        else:
            weight = self._args["in_proj_weight"].chunk(3)[part]
        bias = self._args["in_proj_bias"]
        y = F.linear(x, weight, None if bias is None else bias.chunk(3)[part])
        return y.unflatten(-1, (self._heads, -1)).permute(1, 2, 0, 3)  # (n, b, h, c) -> (b, h, n, c)

    def queries(self, index: Tensor | slice) -> Float[Tensor, "*b h r c"]:
        return self._project("query", 0, index)

    @cached_property
    def q(self) -> Float[Tensor, "*b h n c"]:
        return self._project("query", 0)

    @cached_property
    def k(self) -> Float[Tensor, "*b h m c"]:
        return self._project("key", 1)

    @cached_property
    def v(self) -> Float[Tensor, "*b h m e"]:
        return self._project("value", 2)


class intercept(TorchFunctionMode):  # noqa: N801 - used as a verb, like torch.no_grad
    """While entered, `seen` is called with every AttentionCall of this thread, before it runs."""

    def __init__(self, seen: Callable[[AttentionCall], None]) -> None:
        super().__init__()
        self._seen = seen

    def __torch_function__(  # type: ignore[no-untyped-def]
        self, func, types, args=(), kwargs=None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._seen(SdpaCall(*args, **kwargs))
        elif func is F.multi_head_attention_forward:
            self._seen(MultiheadCall(*args, **kwargs))
        return func(*args, **kwargs)
