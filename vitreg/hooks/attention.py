"""One attention, however a model computes it: its queries, keys, values and rows, made only when asked for.

`F.scaled_dot_product_attention` gets the real q, k and v (after rotary positions and q/k norm),
`nn.MultiheadAttention` goes through `F.multi_head_attention_forward`, and everything else multiplies
softmax(q k^T) by v step by step (stepwise.py). A mode of attention_mode.py sees all three.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vitreg.errors import UnsupportedModelError

Change = Callable[[Tensor], Tensor]


def _same(x: Tensor) -> Tensor:
    return x


class AttentionCall(ABC):
    """One attention: what its queries, keys and values are, computed only when asked for.

    Shapes: `q` (b, h, n, c), `k` and `v` (b, h, n, c), c channels per head (windowed models have other
    leading axes). Grouped keys and values are repeated to one per query head. `mask` is what
    scaled_dot_product_attention takes: True for what is kept, or a bias to add to the logits.
    """

    kind: str  # in the reader's words
    scale: float | None
    mask: Tensor | None
    causal: bool
    tokens: int  # queries
    dropout: float = 0.0
    grouped: bool = False  # fewer keys and values than query heads

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
        return self.logits(index).softmax(-1)

    def logits(self, index: Tensor | slice) -> Float[Tensor, "*b h r m"]:
        """What the softmax of `rows` is taken of, in float32."""
        q, k = self.queries(index).float(), self.k.float()
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        with torch.autocast(q.device.type, enabled=False):  # it would round the logits, as no kernel does
            # Keys first: for few queries this is 6 times faster than q @ k^T, whose right side is strided.
            logits = (k @ q.transpose(-2, -1)).transpose(-2, -1) * scale
        return logits + self._bias(index, k.shape[-2], logits)

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

    def compute(
        self, mask: Tensor | None, *, keys: Change = _same, values: Change = _same
    ) -> Float[Tensor, "*b h n e"]:
        """What the queries get with another mask, and with changed keys and values (b, h or fewer, m, c)."""
        k, v = keys(self._shared_k), values(self._shared_v)
        causal = self.causal and mask is None
        if self.causal and mask is not None:
            allowed = torch.ones(self.tokens, k.shape[-2], dtype=torch.bool, device=k.device).tril()
            mask = mask & allowed if mask.dtype == torch.bool else mask.masked_fill(~allowed, -torch.inf)
        return F.scaled_dot_product_attention(
            self.q, k, v, mask, self.dropout, causal, scale=self.scale, enable_gqa=self.grouped
        )

    @property
    def _shared_k(self) -> Float[Tensor, "*b g m c"]:
        """Keys as query heads share them, g of them or one each."""
        return self.k

    @property
    def _shared_v(self) -> Float[Tensor, "*b g m e"]:
        return self.v


class SdpaCall(AttentionCall):
    """A call of F.scaled_dot_product_attention."""

    kind = "scaled_dot_product_attention"

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
        self.dropout, self.grouped = dropout_p, enable_gqa
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

    @property
    def _shared_k(self) -> Float[Tensor, "*b g m c"]:
        return self._k

    @property
    def _shared_v(self) -> Float[Tensor, "*b g m e"]:
        return self._v


class MultiheadArguments(NamedTuple):
    """The parameters of F.multi_head_attention_forward, in order; tokens are the first axis."""

    query: Tensor
    key: Tensor
    value: Tensor
    embed_dim_to_check: int
    num_heads: int
    in_proj_weight: Tensor | None
    in_proj_bias: Tensor | None
    bias_k: Tensor | None
    bias_v: Tensor | None
    add_zero_attn: bool
    dropout_p: float
    out_proj_weight: Tensor
    out_proj_bias: Tensor | None
    training: bool = True
    key_padding_mask: Tensor | None = None
    need_weights: bool = True
    attn_mask: Tensor | None = None
    use_separate_proj_weight: bool = False
    q_proj_weight: Tensor | None = None
    k_proj_weight: Tensor | None = None
    v_proj_weight: Tensor | None = None
    static_k: Tensor | None = None
    static_v: Tensor | None = None
    average_attn_weights: bool = True
    is_causal: bool = False


class MultiheadCall(AttentionCall):
    """A call of F.multi_head_attention_forward, whose arguments come before the in-projection.

    Queries, keys and values are projected again here, each only when asked for: reading one row
    costs one key projection, and nothing that the model computes is touched.
    """

    kind = "nn.MultiheadAttention"
    scale = None

    def __init__(self, given: MultiheadArguments) -> None:
        self.given = given
        self._projected: dict[int, Tensor] = {}  # no cached_property: Dynamo does not know its lock
        self._heads = given.num_heads
        self.tokens = given.query.shape[0]
        self.dropout = given.dropout_p if given.training else 0.0
        self.causal = bool(given.is_causal) and given.attn_mask is None
        self.mask = self._merged_mask()

    def _merged_mask(self) -> Tensor | None:
        mask, padding = self.given.attn_mask, self.given.key_padding_mask
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

    def _project(self, x: Tensor, part: int, index: Tensor | slice = slice(None)) -> Tensor:
        given = self.given
        added = [name for name in ("bias_k", "static_k") if getattr(given, name) is not None]
        if added or given.add_zero_attn:
            raise UnsupportedModelError(
                f"attention over keys that are no tokens ({', '.join(added) or 'add_zero_attn'}) is not"
                " supported."
            )
        x = x[index]
        if given.use_separate_proj_weight:
            weight = (given.q_proj_weight, given.k_proj_weight, given.v_proj_weight)[part]
        else:
            assert given.in_proj_weight is not None
            weight = given.in_proj_weight.chunk(3)[part]
        assert weight is not None
        bias = given.in_proj_bias
        y = F.linear(x, weight, None if bias is None else bias.chunk(3)[part])
        if y.dim() == 2:  # one image without a batch axis
            y = y[:, None]
        return y.unflatten(-1, (self._heads, -1)).permute(1, 2, 0, 3)  # (n, b, h, c) -> (b, h, n, c)

    def queries(self, index: Tensor | slice) -> Float[Tensor, "*b h r c"]:
        return self._project(self.given.query, 0, index)

    @property
    def q(self) -> Float[Tensor, "*b h n c"]:
        return self._whole(self.given.query, 0)

    @property
    def k(self) -> Float[Tensor, "*b h m c"]:
        return self._whole(self.given.key, 1)

    @property
    def v(self) -> Float[Tensor, "*b h m e"]:
        return self._whole(self.given.value, 2)

    def _whole(self, x: Tensor, part: int) -> Float[Tensor, "b h n c"]:
        if part not in self._projected:
            self._projected[part] = self._project(x, part)
        return self._projected[part]

    def projected(self, mixed: Float[Tensor, "b h n e"]) -> Float[Tensor, "n b d"]:
        """What the function returns for a mix of values, behind the output projection."""
        y = F.linear(
            mixed.permute(2, 0, 1, 3).flatten(2), self.given.out_proj_weight, self.given.out_proj_bias
        )
        return y if self.given.query.dim() == 3 else y[:, 0]

    def weights(self, rows: Float[Tensor, "b h n m"]) -> Float[Tensor, "b *h n m"] | None:
        """The second thing that the function returns."""
        if not self.given.need_weights:
            return None
        rows = rows.mean(1) if self.given.average_attn_weights else rows
        return rows if self.given.query.dim() == 3 else rows[0]
