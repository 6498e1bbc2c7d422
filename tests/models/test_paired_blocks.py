"""Pairs [attention, MLP] that a loop calls one by one: the same to the bit, refused where they are none."""

import copy
import pickle

import pytest
import torch
from authors_models import Attention
from catalog import randomise
from paired_models import Paired
from refused_models import small
from torch import Tensor, nn

import vitreg
from vitreg.fixes import TestTimeRegisters

FIX = TestTimeRegisters({1: [3, 5]}, 2)


def model(how: str = "added", attention: type[nn.Module] = Attention) -> Paired:
    torch.manual_seed(0)
    return randomise(Paired(attention, how)).eval()


def batch() -> Tensor:
    return torch.randn(2, 3, 32, 40, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("how", ["added", "by number"])
def test_a_wrapped_model_answers_to_the_bit_what_it_answered(how: str) -> None:
    plain = model(how)
    expected, weights = plain(batch()), list(plain.state_dict())
    vit = vitreg.wrap(plain)
    assert torch.equal(plain(batch()), expected)
    assert list(plain.state_dict()) == weights
    with vitreg.trace(vit, attention="cls"):
        assert torch.equal(vit(batch()), expected)
    with FIX.applied_to(vit):
        assert not torch.equal(vit(batch()), expected)
    assert torch.equal(plain(batch()), expected)


@torch.no_grad()
def test_a_fixed_pair_answers_what_the_same_block_answers_that_is_called() -> None:
    plain = model()
    called = vitreg.wrap(plain.joined())
    vit = vitreg.wrap(plain)
    assert vit.anatomy == called.anatomy
    with FIX.applied_to(vit), FIX.applied_to(called):
        torch.testing.assert_close(vit(batch()), called(batch()), atol=1e-5, rtol=1e-5)


def test_gradients_are_those_of_the_model_as_it_was() -> None:
    plain, other = model().train(), model().train()
    vitreg.wrap(other)
    for twin in (plain, other):
        torch.manual_seed(3)  # dropout
        twin(batch()).square().sum().backward()
    for (name, mine), theirs in zip(plain.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_are_blocks_as_well(copied: object) -> None:
    vit = vitreg.wrap(model())
    twin = copied(vit.model)  # type: ignore[operator]
    with FIX.applied_to(twin), FIX.applied_to(vit):
        assert torch.equal(twin(batch()), vit(batch()))


def test_a_loop_that_does_something_else_is_refused_and_left_as_it_was() -> None:
    other = model("halved")
    classes = [type(module) for module in other.modules()]
    with pytest.raises(vitreg.UnsupportedModelError, match="what the second is given is not what the first"):
        vitreg.wrap(other)
    assert [type(module) for module in other.modules()] == classes


def test_a_pair_prints_itself() -> None:
    assert "Before" in repr(vitreg.wrap(model()).model)


def test_the_second_part_alone_is_refused() -> None:
    vit = vitreg.wrap(model())
    _, mlp = vit.model.layers[0]
    with pytest.raises(vitreg.UnsupportedModelError, match="runs without its first"):
        mlp(torch.zeros(1, 21, 32))


def test_models_without_pairs_are_left_alone() -> None:
    other = small("vit_small_patch16_224", embed_dim=32, depth=2, num_heads=4)()
    classes = [type(module) for module in other.modules()]
    vitreg.wrap(other, image_size=64)
    assert [type(module) for module in other.modules()] == classes
