"""What passes from block to block: per thread, per tensor where gradients are recorded, and nothing else."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch
from torch import nn

import vitreg
from vitreg.hooks.block_edit import BlockEdit, edits_of, inserted_tokens, install, uninstall, without_edits
from vitreg.hooks.carry import CarriedTokens, handing_on


class Add(BlockEdit):
    """Adds to the stream before the block runs, and notes the order in which edits come."""

    def __init__(self, name, amount, inserted=0):
        self.name, self.amount, self.inserted, self.seen = name, amount, inserted, []

    def run(self, block, inner, x, args, kwargs):
        self.seen.append((self.name, x.item(), args, kwargs))
        return 10 * inner(x + self.amount, args, kwargs)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.Identity()
        self.attention.num_prefix_tokens = 1

    def forward(self, hidden_states, scale=1.0, *, shift=0.0):
        """What a block does."""
        return hidden_states * scale + shift


class Tupled(Block):
    def forward(self, x):
        return x, "attention", None


ONE = torch.tensor(1.0)


def test_edits_run_the_outermost_first_and_pass_the_arguments_on():
    block, outer, inner = Block(), Add("outer", 1), Add("inner", 5)
    install(block, outer)
    install(block, inner)
    assert edits_of(block) == [outer, inner]
    assert block(ONE, 2.0, shift=3.0) == 10 * 10 * ((1 + 1 + 5) * 2 + 3)
    assert outer.seen == [("outer", 1, (None, 2.0), {"shift": 3.0})]
    assert inner.seen == [("inner", 2, (None, 2.0), {"shift": 3.0})]
    assert block(hidden_states=ONE, scale=3.0) == 100 * 21
    assert Block()(ONE) == 1  # of this instance only


def test_what_a_block_returns_beside_the_stream_is_passed_on():
    block = Tupled()
    install(block, Add("a", 1))
    assert block(ONE) == (20, "attention", None)


def test_a_block_is_itself_again_when_the_last_edit_has_gone():
    block, first, second = Block(), Add("first", 1, inserted=2), Add("second", 1, inserted=1)
    kept = dict(vars(block))
    install(block, first)
    install(block, second)
    assert isinstance(block, Block)
    assert (type(block).__name__, type(block).__doc__, type(block).__module__) == ("Block", None, __name__)
    assert (inserted_tokens(block), block.attention.num_prefix_tokens) == (3, 4)
    with pytest.raises(AssertionError):
        uninstall(block, first)
    uninstall(block, second)
    assert (inserted_tokens(block), block.attention.num_prefix_tokens) == (2, 3)
    uninstall(block, first)
    assert type(block) is Block
    assert vars(block) == kept
    assert block.attention.num_prefix_tokens == 1


def test_a_model_is_bare_for_as_long_as_one_looks():
    model, edit = nn.Sequential(Block(), Block()), Add("a", 1, inserted=1)
    install(model[1], edit)
    with suppress(KeyError), without_edits(model):
        assert model(ONE) == 1
        assert (type(model[1]), model[1].attention.num_prefix_tokens) == (Block, 1)
        raise KeyError
    assert model(ONE) == 20
    assert model[1].attention.num_prefix_tokens == 2


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda block: pickle.loads(pickle.dumps(block))]
)
def test_a_copy_has_edits_of_its_own(copied):
    block = Block()
    install(block, Add("a", 1))
    other = copied(block)
    assert other(ONE) == 20
    uninstall(block, edits_of(block)[0])
    assert (block(ONE), other(ONE)) == (1, 20)
    uninstall(other, edits_of(other)[0])
    assert (type(other), other(ONE)) == (Block, 1)


def test_what_is_left_goes_to_the_next_layer_once():
    carry: CarriedTokens[str] = CarriedTokens()
    assert carry.take(1, ONE) is None
    carry.leave(0, "registers")
    assert carry.latest == "registers"
    assert carry.take(1, ONE + 1) == "registers"  # whatever tensor: a hook may have changed it
    assert carry.take(1, ONE) is None
    carry.leave(0, "registers")
    assert carry.take(5, ONE) is None  # not the next layer
    carry.leave(3, "of a pass that failed")
    carry.leave(0, "of another")
    assert carry.take(1, ONE) == "of another"


def test_each_thread_has_its_own():
    carry: CarriedTokens[int] = CarriedTokens()
    carry.leave(0, 1)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(carry.take, 1, ONE).result() is None
        pool.submit(carry.leave, 0, 2).result()
        assert carry.take(1, ONE) == 1
        assert pool.submit(carry.take, 1, ONE).result() == 2


def test_a_copy_starts_with_empty_hands():
    carry: CarriedTokens[int] = CarriedTokens()
    carry.leave(0, 1)
    for other in (copy.deepcopy(carry), pickle.loads(pickle.dumps(carry))):
        assert other.take(1, ONE) is None


def in_a_backward_pass(function):
    """What `function` returns when a backward pass calls it."""
    found = []
    x = torch.zeros(1, requires_grad=True)
    y = x * 2
    y.register_hook(lambda gradient: found.append(function()))
    y.backward()
    return found[0]


def test_a_backward_pass_finds_what_each_tensor_came_with():
    carry: CarriedTokens[str] = CarriedTokens()
    streams = [torch.zeros(1) for _ in range(3)]
    carry.leave(0, "to 1")
    carry.take(1, streams[1])
    carry.leave(1, "to 2")
    carry.take(2, streams[2])
    carry.take(2, streams[0])  # with nothing
    again = in_a_backward_pass(lambda: [carry.take(2, x) for x in (streams[2], streams[0])])
    assert again == ["to 2", None]
    assert in_a_backward_pass(lambda: carry.take(1, streams[1])) == "to 1"


def test_a_backward_pass_hands_on_within_itself():
    """Blocks that are computed again together, on tensors that nobody saw before."""
    carry: CarriedTokens[str] = CarriedTokens()
    carry.leave(0, "of the forward pass")

    def again():
        carry.leave(0, "of the backward pass")
        return carry.take(1, torch.zeros(1))

    assert in_a_backward_pass(again) == "of the backward pass"
    assert carry.take(1, ONE) == "of the forward pass"


def test_a_tensor_that_was_never_seen_is_refused_in_a_backward_pass():
    carry: CarriedTokens[str] = CarriedTokens()
    with torch.no_grad():  # as reentrant checkpointing runs the forward pass
        carry.leave(0, "registers")
        carry.take(1, ONE)
    with pytest.raises(vitreg.UnsupportedModelError, match="use_reentrant=False"):
        in_a_backward_pass(lambda: carry.take(1, ONE))


def test_nothing_is_kept_for_tensors_that_are_gone():
    carry: CarriedTokens[str] = CarriedTokens()
    for layer in range(4):
        x = torch.zeros(1)
        carry.leave(layer - 1, "registers")
        carry.take(layer, x)
    del x
    assert len(carry._of) == 0
    with torch.no_grad():
        carry.take(1, ONE)
    assert len(carry._of) == 0


def test_what_is_left_belongs_to_the_stream_that_left_the_block():
    """Two streams in lock-step, in either order."""
    carry: CarriedTokens[str] = CarriedTokens()
    streams = {}
    for name in ("one", "other"):
        with handing_on(torch.zeros(1)) as leaving:
            carry.leave(0, name)
            streams[name] = torch.ones(1)
            leaving.append(streams[name])
    assert carry.take(1, streams["other"]) == "other"
    assert carry.take(1, streams["one"]) == "one"
    assert carry.take(1, streams["one"]) is None
    with pytest.raises(vitreg.UnsupportedModelError, match="nothing of block 0 came with its stream"):
        carry.take_from_before(1, streams["one"])


def test_several_streams_that_changed_on_the_way_are_refused():
    carry: CarriedTokens[str] = CarriedTokens()
    streams = []
    for name in ("one", "other"):
        with handing_on(torch.zeros(1)) as leaving:
            carry.leave(0, name)
            streams.append(torch.ones(1))
            leaving.append(streams[-1])
    with pytest.raises(
        vitreg.UnsupportedModelError, match="2 streams left block 0, and block 1 is called on"
    ):
        carry.take(1, torch.ones(1))
