"""Blocks that make positions for a fixed number of tokens: what registers get, and who is refused them."""

import pytest
import rotary_models
import torch
from authors_models import Authors
from catalog import authors, images
from hypothesis import given, settings
from hypothesis import strategies as st
from rotary_models import angles, places

import vitreg
from vitreg.fixes import AttentionBias, TestTimeRegisters, TokenSplitting
from vitreg.fixes.neurons import RegisterNeuron, RegisterNeurons
from vitreg.hooks.position_tables import fitted, neutral, with_rows

ROTARY = ["Halves", "Centred", "Interleaved", "Complex", "Added"]
NEURONS = RegisterNeurons.of({1: [3, 5]})


def vit_of(kind: str) -> vitreg.Backbone:
    return authors(attention=getattr(rotary_models, kind)).backbone()


@pytest.mark.parametrize("kind", ROTARY)
def test_registers_are_at_no_position(kind: str) -> None:
    """Their queries and keys are those that the projection makes of their content."""
    vit = vit_of(kind)
    value = torch.linspace(-1, 1, vit.anatomy.width)
    fix = TestTimeRegisters({}, 2, initial="given", tensors={"initial": value.repeat(2, 1)})
    with torch.no_grad(), fix.applied_to(vit), vitreg.trace(vit, qkv=True, layers=[0]) as t:
        vit(images(vit))
    block = vit.model.blocks[0]
    q, k, v = block.attn.qkv(block.norm1(value)).unflatten(-1, (3, vit.anatomy.heads, -1))
    for found, expected in ((t.q[0], q), (t.k[0], k), (t.v[0], v)):
        torch.testing.assert_close(found[0, :, 1:3], expected[:, None].expand(-1, 2, -1), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("Counting", "block 0 gives the tokens other positions"),
        ("Asserting", r"block 0 fails \(AssertionError: rotary positions are for another number"),
    ],
)
def test_a_block_without_room_is_read_and_not_given_registers(kind: str, reason: str) -> None:
    vit = vit_of(kind)
    with torch.no_grad(), vitreg.trace(vit, attention="cls") as t:
        plain = vit(images(vit))
    assert t.attention.shape == (3, 2, 4, 1, 21)
    with pytest.raises(vitreg.UnsupportedModelError, match=f"no room for registers: .*{reason}"):
        TestTimeRegisters(NEURONS).apply(vit)
    with pytest.raises(vitreg.UnsupportedModelError, match="no room for registers"):
        vitreg.add_registers(vit, 2)
    with pytest.raises(vitreg.UnsupportedModelError, match="no room for registers"):
        AttentionBias.calibrate(vit, [images(vit)], NEURONS)
    splitting = TokenSplitting(RegisterNeurons((RegisterNeuron(1, 3, threshold=0.1),)))
    with pytest.raises(vitreg.UnsupportedModelError, match=r"cannot have its tokens split: block 0"):
        splitting.apply(vit)
    with torch.no_grad(), TestTimeRegisters(NEURONS, 0).applied_to(vit):
        assert not torch.equal(vit(images(vit)), plain)
    assert torch.equal(vit(images(vit)), plain)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(2, 9),
    columns=st.integers(2, 9),
    base=st.floats(20, 1e4),
    first=st.sampled_from([0, 1, "centred"]),
    cls=st.booleans(),
)
def test_cosines_are_told_from_sines(rows: int, columns: int, base: float, first: object, cls: bool) -> None:
    grid = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1)
    coordinates = grid.flatten(0, 1).float()
    if first == "centred":
        coordinates = 2 * (coordinates + 0.5) / torch.tensor([rows, columns]) - 1
    else:
        coordinates += first
    frequencies = base ** -torch.linspace(0, 1, 8)
    turned = (coordinates[..., None] * frequencies).flatten(-2)
    turned = torch.cat([torch.zeros(1, 16), turned]) if cls else turned
    assert neutral("mul", turned.cos(), 0) == 1
    assert neutral("mul", turned.sin(), 0) == 0


def test_only_tables_that_lack_the_tokens_are_fitted() -> None:
    def fit(name: str, table: torch.Tensor, axis: int, like: torch.Tensor) -> torch.Tensor:
        return with_rows(table, axis, 1, 2, neutral(name, table, axis))

    x = torch.randn(2, 4, 7, 8)
    short = torch.randn(5, 8)
    assert fitted("add", (x, short), 2, fit)[1].shape == (7, 8)
    assert not fitted("add", (x, short), 2, fit)[1][1:3].any()
    for table in (torch.randn(7, 8), torch.randn(1, 8), torch.randn(8), torch.randn(4, 8), torch.tensor(2.0)):
        assert fitted("mul", (x, table), 2, fit)[1] is table
    assert fitted("mul", (x.transpose(1, 2), torch.ones(5, 1, 8)), 2, fit)[1].shape == (7, 1, 8)
    assert angles(places()).shape == (20, 4)


def test_wrapping_leaves_no_trace_of_the_trial() -> None:
    model = Authors(rotary_models.Halves).eval()
    classes = [type(module) for module in model.modules()]
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    vitreg.wrap(model)
    assert [type(module) for module in model.modules()] == classes
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
