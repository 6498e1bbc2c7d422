"""One small ViT with blocks of every signature: how they are called, and what they give back.

SIGNATURES["dict"].wrapped(model)     # the same weights, the same answers, other calls between the blocks
"""

import copy
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from catalog import CATALOG, randomise, timm_model
from torch import Tensor, nn

import vitreg


class Pair(NamedTuple):
    extra: Any
    tokens: Tensor


class Output(OrderedDict):
    """As transformers' outputs: a dictionary that is copied, not built from a dictionary."""


@dataclass(frozen=True)
class Signature:
    """`call` makes a block's arguments of the stream, `take` finds it there, `give` makes an output of it
    (and of what entered), `keep` finds the stream there again."""

    call: Callable[[Tensor], tuple[tuple[Any, ...], dict[str, Any]]]
    take: Callable[..., Tensor]
    give: Callable[[Tensor, Tensor], Any] = lambda y, x: y
    keep: Callable[[Any], Tensor] = lambda output: output

    def wrapped(self, model: nn.Module, stack: str = "blocks") -> nn.Module:
        """A copy of a model whose blocks take (b, n, d), with blocks of this signature."""
        model = copy.deepcopy(model)
        signature, blocks = self, list(model.get_submodule(stack))
        plain = type(blocks[0])

        class Signed(plain):
            def forward(self, *args: Any, **kwargs: Any) -> Any:
                x = signature.take(*args, **kwargs)
                return signature.give(plain.forward(self, x), x)

        # As if it had been written like that: the signature that others see.
        Signed.forward.__wrapped__ = _with_self(self.take)
        for block in blocks:
            block.__class__ = Signed
        parent, _, name = stack.rpartition(".")
        setattr(model.get_submodule(parent), name, _Stack(signature, blocks))
        return model


def _with_self(take: Callable[..., Tensor]) -> Callable[..., Tensor]:
    import inspect

    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    signature = inspect.signature(take)
    every = [p.replace(kind=p.kind) for p in signature.parameters.values()]

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError

    forward.__signature__ = inspect.Signature([own, *every])
    return forward


class _Stack(nn.Sequential):
    def __init__(self, signature: Signature, blocks: list[nn.Module]) -> None:
        super().__init__(*blocks)
        self.signature = signature

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            args, kwargs = self.signature.call(x)
            x = self.signature.keep(block(*args, **kwargs))
        return x


def _positions(x: Tensor) -> Tensor:
    """Tokens of the stream's own shape that are the same for every image, and in every block."""
    return torch.linspace(0, 1, x[0].numel()).reshape(x[0].shape).expand_as(x).to(x)


SIGNATURES = {
    "positional": Signature(lambda x: ((x,), {}), lambda x: x),
    "by keyword": Signature(lambda x: ((), {"hidden": x}), lambda hidden, mask=None: hidden),
    "keywords only": Signature(
        lambda x: ((), {"mask": None, "hidden": x}), lambda *, mask, hidden: hidden
    ),
    "second argument": Signature(lambda x: ((_positions(x), x), {}), lambda positions, x: x),
    "behind positions, by keyword": Signature(
        lambda x: ((), {"positions": _positions(x), "x": x}), lambda positions, x: x
    ),
    "any arguments": Signature(lambda x: (("block", x), {"n": 3}), lambda *args, **kwargs: args[1]),
    "list": Signature(lambda x: (([x],), {}), lambda xs: xs[0], lambda y, x: [y], lambda ys: ys[0]),
    "list by keyword": Signature(
        lambda x: ((), {"xs": [x], "tables": [None]}),
        lambda xs, tables: xs[0],
        lambda y, x: [y],
        lambda ys: ys[0],
    ),
    "tuple with more": Signature(
        lambda x: (((x, "more"),), {}), lambda xs: xs[0], lambda y, x: (y, "more"), lambda ys: ys[0]
    ),
    "dict": Signature(
        lambda x: (({"mask": None, "tokens": x},), {}),
        lambda given: given["tokens"],
        lambda y, x: {"cache": x[:, :1], "tokens": y},
        lambda given: given["tokens"],
    ),
    "nested": Signature(
        lambda x: (("crops", [{"positions": _positions(x), "x": [x]}]), {}),
        lambda kind, crops: crops[0]["x"][0],
        lambda y, x: ((x.mean(1),), [[y]]),
        lambda output: output[1][0][0],
    ),
    "positions handed on": Signature(
        lambda x: ((_positions(x), x), {}),
        lambda p, x: x,
        lambda y, x: (_positions(y), y),
        lambda both: both[1],
    ),
    "what entered handed out": Signature(
        lambda x: ((x,), {}), lambda x: x, lambda y, x: (x, y), lambda both: both[1]
    ),
    "named tuple": Signature(
        lambda x: ((x,), {}), lambda x: x, lambda y, x: Pair(None, y), lambda pair: pair.tokens
    ),
    "output class": Signature(
        lambda x: ((Output(tokens=x, extra=1),), {}),
        lambda given: given["tokens"],
        lambda y, x: Output(extra=None, tokens=y),
        lambda output: output["tokens"],
    ),
    "in place": Signature(lambda x: ((x.clone(),), {}), lambda x: x, lambda y, x: x.copy_(y)),
    "sequence first": Signature(
        lambda x: ((x.transpose(0, 1),), {}),
        lambda x: x.transpose(0, 1),
        lambda y, x: y.transpose(0, 1),
        lambda y: y.transpose(0, 1),
    ),
    "sequence first in a dict": Signature(
        lambda x: ((), {"state": {"x": x.transpose(0, 1).contiguous()}}),
        lambda *, state: state["x"].transpose(0, 1),
        lambda y, x: {"x": y.transpose(0, 1)},
        lambda state: state["x"].transpose(0, 1),
    ),
}  # fmt: skip


@cache
def plain() -> vitreg.Backbone:
    torch.manual_seed(0)
    settings = {"depth": 2, "img_size": 32, "num_classes": 5}
    return vitreg.wrap(randomise(timm_model("vit_small_patch16_224", **settings)()).eval())


def sequence_first_clip() -> tuple[vitreg.Backbone, vitreg.Backbone]:
    """An open_clip tower as it was before 2024, tokens first in all its blocks, and today's."""
    today = CATALOG["open_clip vit"].backbone()
    model = copy.deepcopy(today.model)
    model.transformer.batch_first = False
    for block in model.transformer.resblocks:
        block.attn.batch_first = False
    return vitreg.wrap(model, image_size=today.image_size), today
