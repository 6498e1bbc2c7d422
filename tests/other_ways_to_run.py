"""Models run in other ways than plainly: copied, pickled, trained, checkpointed, compiled."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import jaxtyping
import torch
from catalog import images
from looking import tensors
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import vitreg


def twin(vit: vitreg.Backbone) -> vitreg.Backbone:
    """A copy to be changed."""
    return vit.with_model(copy.deepcopy(vit.model), "twin")


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@contextmanager
def unchecked() -> Iterator[None]:
    """Without the checks of shapes that only tests make, and that cannot be compiled."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@contextmanager
def compiled(vit: vitreg.Backbone, **settings: Any) -> Iterator[Callable[[Tensor], Any]]:
    torch._dynamo.reset()
    with torch.no_grad(), unchecked():
        yield torch.compile(vit.__call__, fullgraph=True, **settings)
    torch._dynamo.reset()


@contextmanager
def checkpointed(vit: vitreg.Backbone, reentrant: bool = False) -> Iterator[None]:
    """Each block computed again in the backward pass."""
    blocks = vit.anatomy.block_modules(vit.model)

    def forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(partial(type(block).forward, block, **kwargs), *args, use_reentrant=reentrant)

    for block in blocks:
        block.forward = partial(forward, block)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def gradients(vit: vitreg.Backbone) -> list[Tensor]:
    """Of every parameter, and of the images."""
    torch.manual_seed(0)  # rotary positions are jittered in training, and dropout may be on
    batch = images(vit).requires_grad_()
    sum(x.float().square().mean() for x in tensors(vit(batch))).backward()
    found = [batch.grad, *(p.grad for p in vit.model.parameters() if p.grad is not None)]
    vit.model.zero_grad(set_to_none=True)
    return found


@contextmanager
def training(vit: vitreg.Backbone) -> Iterator[None]:
    modes = [(module, module.training) for module in vit.model.modules()]
    vit.model.train()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def anatomy_of(model: nn.Module) -> list[Any]:
    """Of each module its class and what its __dict__ holds."""
    return [
        (name, type(module), list(vars(module)), vars(module).get("num_prefix_tokens"), module.training,
         [len(hooks) for key, hooks in vars(module).items() if key.endswith("_hooks")])
        for name, module in model.named_modules()
    ]  # fmt: skip
