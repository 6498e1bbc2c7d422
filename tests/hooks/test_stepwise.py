"""Attention step by step, in generated ways to write it: rows, queries, masks and what a rewrite gives."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vitreg.hooks.attention import AttentionCall
from vitreg.hooks.attention_mode import AttentionMode, intercept

B, H, N, C = 2, 3, 5, 4

PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "@": lambda q, k: q @ k.mT,
    "matmul": lambda q, k: torch.matmul(q, k.transpose(2, 3)),
    "einsum": lambda q, k: torch.einsum("bhic,bhjc->bhij", q, k),
    "einsum, keys first": lambda q, k: torch.einsum("bhjc, bhic -> bhij", k, q),
    "einsum, tokens first": lambda q, k: torch.einsum(
        "bihc,bjhc->bhij", q.transpose(1, 2), k.transpose(1, 2)
    ),
    "bmm": lambda q, k: torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).view(B, H, N, N),
    "baddbmm": lambda q, k: torch.baddbmm(torch.zeros(1), q.flatten(0, 1), k.flatten(0, 1).mT).unflatten(
        0, (B, H)
    ),
}
BIAS = torch.randn(H, N, N, generator=torch.Generator().manual_seed(1))
HIDDEN = torch.rand(B, 1, 1, N, generator=torch.Generator().manual_seed(2)) < 0.3
PER_HEAD = torch.tensor([0.5, 1.0, 2.0])[:, None, None]
LOGITS: dict[str, Callable[[Tensor], Tensor]] = {
    "scaled": lambda x: x * 0.5,
    "scaled from the left": lambda x: 0.5 * x,
    "divided": lambda x: x / 2.0,
    "scaled per head": lambda x: x * PER_HEAD,
    "biased": lambda x: x + BIAS,
    "biased from the left": lambda x: BIAS + x,
    "biased in place": lambda x: x.add_(BIAS),
    "less a bias": lambda x: x - BIAS,
    "less the largest": lambda x: x - x.amax(-1, keepdim=True),
    "masked": lambda x: x.masked_fill(HIDDEN, -1e9),
    "masked by where": lambda x: torch.where(HIDDEN, torch.tensor(-1e9), x),
    "kept by where": lambda x: torch.where(~HIDDEN, x, -1e9),
    "cast": lambda x: x.double().float(),
    "folded": lambda x: x.view(B, H, N, N).flatten(0, 1),
    "unfolded": lambda x: x.view(B, H, N, N),
}
SOFTMAXES: dict[str, Callable[[Tensor], Tensor]] = {
    "method": lambda x: x.softmax(-1),
    "torch": lambda x: torch.softmax(x, dim=x.dim() - 1),
    "module": torch.nn.Softmax(dim=-1),
    "functional": lambda x: F.softmax(x, dim=-1, dtype=torch.float32),
}
MIXES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "@": lambda w, v: w @ v,
    "einsum": lambda w, v: torch.einsum("bhij,bhjc->bhic", w, v),
    "einsum, tokens first": lambda w, v: torch.einsum("bhij,bhjc->bihc", w, v).transpose(1, 2),
    "einsum, values first": lambda w, v: torch.einsum("bhjc,bhij->bhic", v, w),
    "bmm": lambda w, v: torch.bmm(w.flatten(0, 1), v.flatten(0, 1)).unflatten(0, (B, H)),
    "dropped out": lambda w, v: F.dropout(w, 0.3, training=False) @ v,
}


def qkv(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, B, H, N, C, generator=torch.Generator().manual_seed(seed))
    return q, k, v


def written(product: str, steps: list[str], softmax: str, mix: str) -> Callable[..., tuple[Tensor, Tensor]]:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        logits = PRODUCTS[product](q, k)
        for step in steps:
            unfolded = step in ("folded", "unfolded")
            logits = LOGITS[step](logits if unfolded else logits.view(B, H, N, N))
        weights = SOFTMAXES[softmax](logits)
        return MIXES[mix](weights.view(B, H, N, N), v), weights.view(B, H, N, N)

    return attention


WRITTEN = st.builds(
    written,
    st.sampled_from(sorted(PRODUCTS)),
    st.lists(st.sampled_from(sorted(LOGITS)), max_size=5),
    st.sampled_from(sorted(SOFTMAXES)),
    st.sampled_from(sorted(MIXES)),
)


class Again(AttentionMode):
    """Computes each attention anew from what a call says of it."""

    def attend(self, call: AttentionCall) -> Tensor:
        return call.compute(call.mask)


@settings(max_examples=150, deadline=None)
@given(WRITTEN, st.integers(0, 9))
def test_however_it_is_written_it_is_read_and_computed_anew(attention: Any, seed: int) -> None:
    q, k, v = qkv(seed)
    mixed, weights = attention(q, k, v)
    calls: list[AttentionCall] = []
    with intercept(calls.append, images=B):
        seen, _ = attention(q, k, v)
    assert torch.equal(seen, mixed)
    (call,) = calls
    torch.testing.assert_close(call.rows(slice(None)), weights)
    torch.testing.assert_close(call.rows(torch.tensor([3, 0])), weights[:, :, [3, 0]])
    torch.testing.assert_close(call.logits(slice(None)).softmax(-1), weights)
    torch.testing.assert_close(call.v, v)
    torch.testing.assert_close(call.k, k)
    with Again(images=B):
        again, _ = attention(q, k, v)
    torch.testing.assert_close(again, mixed, atol=1e-5, rtol=1e-5)


CHANGES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "tanh": lambda q, k, v: ((q @ k.mT).tanh().softmax(-1)) @ v,
    "permute": lambda q, k, v: (
        F.linear((q @ k.mT).permute(0, 2, 3, 1), torch.eye(H)).permute(0, 3, 1, 2).softmax(-1) @ v
    ),
    "mul": lambda q, k, v: ((q @ k.mT) * BIAS).softmax(-1) @ v,
    "pow": lambda q, k, v: ((q @ k.mT).softmax(-1) ** 2) @ v,
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_cannot_be_followed_is_named_and_not_read(name: str) -> None:
    calls: list[AttentionCall] = []
    with intercept(calls.append, images=B) as seeing:
        CHANGES[name](*qkv(0))
    assert not calls
    assert seeing.steps.changed in (name, "__pow__")


def test_products_that_are_no_attention_are_none() -> None:
    q, k, v = qkv(0)
    calls: list[AttentionCall] = []
    with intercept(calls.append, images=B):
        (q @ k.mT) @ v
        (q @ k.mT).softmax(2) @ v
        q.softmax(-1) @ torch.randn(C, C)
        v.mT @ (q @ k.mT).softmax(-1)
        torch.einsum("bhic,bhjc->bij", q, k).softmax(-1) @ v[:, 0]
    assert not calls


def test_only_a_few_tensors_are_held() -> None:
    x = torch.randn(2, 3, 3)
    with intercept(lambda call: None) as seeing:
        for _ in range(50):
            x = x @ x
        assert len(seeing.steps._followed) < 10
        seeing.steps.forget()
        assert not seeing.steps._followed
