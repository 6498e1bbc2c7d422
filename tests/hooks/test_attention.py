"""Attention rows from intercepted calls, against softmax written out and against PyTorch's own weights."""

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vitreg.errors import UnsupportedModelError
from vitreg.hooks.attention import AttentionCall
from vitreg.hooks.attention_mode import intercept

B, H, N, C = 2, 4, 6, 8
ROWS = torch.tensor([4, 0, 5])


def seen_by(run: Any) -> AttentionCall:
    """The one attention call that `run` makes."""
    calls: list[AttentionCall] = []
    with intercept(calls.append):
        run()
    (call,) = calls
    return call


def qkv(heads: int = H, tokens: int = N, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, B, heads, tokens, C, generator=generator) * 2
    return q, k, v


def softmax(q: Tensor, k: Tensor, bias: Tensor | float = 0.0, scale: float = C**-0.5) -> Tensor:
    return (torch.einsum("bhnc,bhmc->bhnm", q, k) * scale + bias).softmax(-1)


def blocked(mask: Tensor) -> Tensor:
    """The bias of a mask that is true where attention is not allowed."""
    return torch.where(mask, -torch.inf, 0.0)


def random_mask(*shape: int) -> Tensor:
    """True where attention is not allowed; every query keeps a key."""
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(1)) < 0.4
    mask[..., 2] = False
    return mask


# -- F.scaled_dot_product_attention ----------------------------------------------------------------

FLOAT_MASK = torch.randn(B, H, N, N, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("arguments", "bias"),
    [
        ({}, 0.0),
        ({"attn_mask": FLOAT_MASK}, FLOAT_MASK),
        ({"attn_mask": FLOAT_MASK[0]}, FLOAT_MASK[0]),
        ({"attn_mask": FLOAT_MASK[0, 0]}, FLOAT_MASK[0, 0]),
        ({"attn_mask": FLOAT_MASK[:, :1, :1]}, FLOAT_MASK[:, :1, :1]),
        ({"attn_mask": ~random_mask(N, N)}, blocked(random_mask(N, N))),
        ({"attn_mask": ~random_mask(B, 1, 1, N)}, blocked(random_mask(B, 1, 1, N))),
        ({"is_causal": True}, blocked(~torch.ones(N, N, dtype=torch.bool).tril())),
    ],
    ids=["none", "float", "float-3d", "float-2d", "float-keys", "bool", "bool-keys", "causal"],
)
@pytest.mark.parametrize("rows", [ROWS, slice(0, 1), slice(None)], ids=["some", "first", "all"])
def test_rows_apply_the_mask(arguments: dict[str, Any], bias: Any, rows: Any) -> None:
    q, k, v = qkv()
    call = seen_by(lambda: F.scaled_dot_product_attention(q, k, v, **arguments))
    torch.testing.assert_close(call.rows(rows), softmax(q, k, bias)[:, :, rows])
    result = F.scaled_dot_product_attention(q, k, v, **arguments)
    torch.testing.assert_close(call.rows(slice(None)) @ call.v, result)


def test_rows_apply_the_scale() -> None:
    q, k, v = qkv()
    call = seen_by(lambda: F.scaled_dot_product_attention(q, k, v, scale=0.7))
    torch.testing.assert_close(call.rows(ROWS), softmax(q, k, scale=0.7)[:, :, ROWS])


def test_grouped_keys_and_values_are_repeated_for_their_queries() -> None:
    q, _, _ = qkv()
    _, k, v = qkv(heads=2, seed=1)
    run = lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)  # noqa: E731
    call = seen_by(run)
    assert call.k.shape == call.v.shape == q.shape
    torch.testing.assert_close(call.rows(slice(None)) @ call.v, run())


@pytest.mark.parametrize(("queries", "keys"), [(3, 6), (6, 3)])
def test_causal_with_other_keys_than_queries(queries: int, keys: int) -> None:
    q, (_, k, v) = qkv(tokens=queries)[0], qkv(tokens=keys)
    run = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)  # noqa: E731
    torch.testing.assert_close(seen_by(run).rows(slice(None)) @ v, run())


def test_values_may_be_wider_than_keys() -> None:
    q, k, _ = qkv()
    v = torch.randn(B, H, N, C + 3)
    call = seen_by(lambda: F.scaled_dot_product_attention(q, k, v))
    assert call.v.shape == (B, H, N, C + 3)
    assert call.rows(ROWS).shape == (B, H, 3, N)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_are_not_rounded_to_half_precision(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in qkv())
    call = seen_by(lambda: F.scaled_dot_product_attention(q * 4, k, v))
    assert call.rows(ROWS).dtype == torch.float32
    torch.testing.assert_close(call.rows(ROWS), softmax(q.float() * 4, k.float())[:, :, ROWS])


def test_logits_are_not_rounded_by_autocast() -> None:
    q, k, v = qkv()
    call = seen_by(lambda: F.scaled_dot_product_attention(q, k, v))
    with torch.autocast("cpu", torch.bfloat16):
        rows = call.rows(ROWS)
    torch.testing.assert_close(rows, softmax(q, k)[:, :, ROWS])


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_rows_are_distributions_and_rows_of_one_map(data: st.DataObject) -> None:
    heads, tokens = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    rows = data.draw(st.lists(st.integers(0, tokens - 1), min_size=1, max_size=tokens))
    q, k, v = qkv(heads, tokens, seed=data.draw(st.integers(0, 99)))
    call = seen_by(lambda: F.scaled_dot_product_attention(q, k, v))
    found = call.rows(torch.tensor(rows))
    torch.testing.assert_close(found.sum(-1), torch.ones(B, heads, len(rows)))
    torch.testing.assert_close(found, call.rows(slice(None))[:, :, rows])


# -- nn.MultiheadAttention -------------------------------------------------------------------------

PADDING = random_mask(B, N)
MHA_MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "float": {"attn_mask": FLOAT_MASK[0, 0]},
    "float-3d": {"attn_mask": FLOAT_MASK.flatten(0, 1)},
    "bool": {"attn_mask": random_mask(N, N)},
    "bool-3d": {"attn_mask": random_mask(B * H, N, N)},
    "padding": {"key_padding_mask": PADDING},
    "float-padding": {"key_padding_mask": FLOAT_MASK[:, 0, 0]},
    "bool-and-padding": {"attn_mask": random_mask(N, N), "key_padding_mask": PADDING},
    "bool-3d-and-padding": {"attn_mask": random_mask(B * H, N, N), "key_padding_mask": PADDING},
    "float-and-float-padding": {"attn_mask": FLOAT_MASK[0, 0], "key_padding_mask": FLOAT_MASK[:, 0, 0]},
    "causal": {"attn_mask": ~torch.ones(N, N, dtype=torch.bool).tril(), "is_causal": True},
}


def multihead(**settings: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(H * C, H, batch_first=True, **settings).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


@pytest.mark.parametrize("masks", MHA_MASKS.values(), ids=MHA_MASKS)
@pytest.mark.parametrize("settings", [{}, {"bias": False}, {"kdim": 20, "vdim": 12}], ids=str)
def test_multihead_rows_are_its_own_weights(masks: dict[str, Any], settings: dict[str, Any]) -> None:
    module = multihead(**settings)
    x = torch.randn(B, N, H * C)
    key, value = (
        torch.randn(B, N, settings.get("kdim", H * C)),
        torch.randn(B, N, settings.get("vdim", H * C)),
    )
    _, weights = module(x, key, value, average_attn_weights=False, **masks)
    call = seen_by(lambda: module(x, key, value, need_weights=False, **masks))
    torch.testing.assert_close(call.rows(ROWS), weights[:, :, ROWS])
    torch.testing.assert_close(call.rows(slice(None)), weights)


@pytest.mark.parametrize("separate", [False, True], ids=["joint", "separate"])
@pytest.mark.parametrize("padding", [None, PADDING], ids=["whole", "padded"])
@pytest.mark.parametrize(
    "mask", [None, random_mask(N, N), random_mask(B * H, N, N)], ids=["none", "2d", "3d"]
)
def test_multihead_called_as_a_function(separate: bool, padding: Tensor | None, mask: Tensor | None) -> None:
    """Other libraries (OpenAI's CLIP) call it with their own weights, and with masks as they are."""
    width = H * C
    x, weights, bias = torch.randn(N, B, width), torch.randn(3, width, width) * 0.3, torch.randn(3 * width)
    projections = dict(zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), weights, strict=True))
    arguments = {"key_padding_mask": padding, "attn_mask": mask, "average_attn_weights": False}
    found: list[AttentionCall] = []
    with intercept(found.append):
        _, reference = F.multi_head_attention_forward(
            x,
            x,
            x,
            width,
            H,
            in_proj_weight=None if separate else weights.flatten(0, 1),
            in_proj_bias=bias,
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=0.0,
            out_proj_weight=torch.eye(width),
            out_proj_bias=None,
            use_separate_proj_weight=separate,
            **(projections if separate else {}),
            **arguments,
        )
    torch.testing.assert_close(found[0].rows(ROWS), reference[:, :, ROWS])


def test_multihead_values_are_those_that_it_mixes() -> None:
    module = multihead()
    x = torch.randn(B, N, H * C)
    call = seen_by(lambda: module(x, x, x, need_weights=False))
    mixed = (call.rows(slice(None)) @ call.v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(module.out_proj(mixed), module(x, x, x)[0])
    torch.testing.assert_close(call.rows(slice(None)), softmax(call.q, call.k))
    torch.testing.assert_close(call.queries(ROWS), call.q[:, :, ROWS])


@pytest.mark.parametrize(
    ("settings", "named"), [({"add_bias_kv": True}, "bias_k"), ({"add_zero_attn": True}, "add_zero_attn")]
)
def test_keys_that_are_no_tokens_are_refused(settings: dict[str, Any], named: str) -> None:
    module, x = multihead(**settings), torch.randn(B, N, H * C)
    call = seen_by(lambda: module(x, x, x))
    with pytest.raises(UnsupportedModelError, match=f"keys that are no tokens \\({named}\\)"):
        call.rows(ROWS)


# -- the mode --------------------------------------------------------------------------------------


def test_each_attention_is_seen_once() -> None:
    """F.multi_head_attention_forward calls F.scaled_dot_product_attention: they are one attention."""
    calls: list[AttentionCall] = []
    x = torch.randn(B, N, H * C)
    with intercept(calls.append):
        multihead()(x, x, x, need_weights=False)
        F.scaled_dot_product_attention(*qkv())
    F.scaled_dot_product_attention(*qkv())
    assert len(calls) == 2


def test_results_are_untouched() -> None:
    expected = F.scaled_dot_product_attention(*qkv())
    with intercept(lambda call: None):
        assert torch.equal(F.scaled_dot_product_attention(*qkv()), expected)


def test_other_threads_are_not_seen() -> None:
    calls: list[AttentionCall] = []
    with intercept(calls.append):
        thread = threading.Thread(target=lambda: F.scaled_dot_product_attention(*qkv()))
        thread.start()
        thread.join()
    assert calls == []


def test_intercepts_nest() -> None:
    inner: list[AttentionCall] = []
    outer: list[AttentionCall] = []
    with intercept(outer.append), intercept(inner.append):
        F.scaled_dot_product_attention(*qkv())
    assert len(inner) == len(outer) == 1


@pytest.mark.parametrize("hidden", ["bool", "float"])
def test_a_causal_attention_stays_causal_with_another_mask(hidden: str) -> None:
    q, k, v = qkv()
    call = seen_by(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    keep, lower = ~random_mask(B, 1, 1, N), torch.ones(N, N, dtype=torch.bool).tril()
    expected = softmax(q, k, blocked(~(keep & lower))) @ v
    found = call.compute(keep if hidden == "bool" else blocked(~keep))
    torch.testing.assert_close(found[:, :, 2:], expected[:, :, 2:])  # from there on all see a key
