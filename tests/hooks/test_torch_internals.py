"""Each name of torch that is not public still does what vitreg needs it for."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vitreg.hooks import torch_internals as internals


class Asking(nn.Module):
    """A layer that asks, whenever it runs, whether a backward pass runs it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.answers = nn.Linear(2, 2), []

    def forward(self, x):
        self.answers.append(internals.in_backward())
        return self.linear(x)


def test_a_recomputed_pass_is_told_from_a_first_one():
    layer = Asking()
    checkpoint(layer, torch.ones(1, 2), use_reentrant=False).sum().backward()
    assert layer.answers == [False, True]


def test_another_thread_is_not_in_this_backward_pass():
    seen = []

    def look(gradient):
        thread = threading.Thread(target=lambda: seen.append(internals.in_backward()))
        thread.start()
        thread.join()
        seen.append(internals.in_backward())

    x = torch.ones(1, requires_grad=True)
    x.register_hook(look)
    x.sum().backward()
    assert seen == [False, True]


def test_a_compiled_model_is_seen_and_gives_its_original():
    model = nn.Linear(2, 2)
    compiled = torch.compile(model, backend="eager")
    assert internals.is_compiled(compiled)
    assert not internals.is_compiled(model)
    assert internals.compiled_model_of(compiled) is model
    assert internals.compiled_model_of(model) is model


@pytest.mark.parametrize("fails", [False, True])
def test_a_compiled_part_is_uncompiled_for_a_while(fails):
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].compile(backend="eager")
    assert internals.is_compiled(model[0])
    try:
        with internals.uncompiled(model):
            assert not internals.is_compiled(model[0])
            assert fails is False
    except AssertionError:
        assert fails
    assert internals.is_compiled(model[0])


def test_a_replica_is_seen():
    model = nn.Linear(2, 2)
    assert not internals.is_replica(model)
    assert internals.is_replica(model._replicate_for_data_parallel())


def test_hooks_are_seen_and_forgotten_on_a_copy():
    def before(module, args):
        raise AssertionError

    def after(module, args, output):
        raise AssertionError

    model = nn.Sequential(nn.Linear(2, 2))
    assert not internals.has_hooks(model[0])
    model[0].register_forward_pre_hook(before)
    model[0].register_forward_hook(after)
    twin = copy.deepcopy(model)
    assert internals.has_hooks(twin[0])
    assert internals.pre_hooks(twin[0]) == [before]
    internals.forget_pre_hook(twin[0], before)
    internals.forget_output_hooks(twin)
    assert not internals.has_hooks(twin[0])
    twin(torch.ones(1, 2))
    assert internals.has_hooks(model[0])


def test_a_dictionary_by_tensor_holds_no_tensor():
    kept, x = internals.WeakTensorKeyDictionary(), torch.ones(2)
    kept[x] = "x"
    assert kept[x] == "x"
    assert torch.ones(2) not in kept
    del x
    assert len(kept) == 0


def test_trees_of_tensors():
    tree = {"a": [torch.ones(1), "text"], "b": (torch.zeros(1),)}
    assert internals.tree_leaves(tree)[1] == "text"
    doubled = internals.tree_map_only(torch.Tensor, lambda x: x + 1, tree)
    assert (doubled["a"][0].item(), doubled["a"][1], doubled["b"][0].item()) == (2.0, "text", 1.0)


def test_a_hook_without_its_handle_is_removed():
    def seen(module, args, output):
        raise AssertionError("called")

    layer = nn.Linear(2, 2)
    layer.register_forward_hook(seen, always_call=True)
    twin = copy.deepcopy(layer)
    internals.forget_hook(twin, seen)
    twin(torch.ones(2))
    with pytest.raises(RuntimeError):
        twin(torch.ones(3))  # a hook that is always called would say something else
    with pytest.raises(AssertionError, match="called"):
        layer(torch.ones(2))
