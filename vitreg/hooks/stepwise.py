"""Attention step by step, softmax(q k^T) v in PyTorch's own functions, followed from product to product.

    steps = Steps()
    step = steps.before(func, args, kwargs)      # in a TorchFunctionMode, for every function
    step.call                                    # the attention, once it meets its values

A product of two batches of matrices may be q k^T. What is done to it (a scale, a bias, a mask, another shape)
is followed until a softmax over the keys, and the weights from there to the product with the values. Whatever
else is done on the way is no attention that anybody here could read or rewrite, and `changed` names it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vitreg.hooks.attention import AttentionCall
from vitreg.hooks.products import ADDS, MULTIPLIES, PRODUCTS, Product, alike_for_keys, product_of

FOLLOWED = 6  # tensors at a time: other products may come between q k^T and its softmax

_DIVIDES = {"div", "div_", "divide", "divide_", "true_divide"}
_FILLS = {"masked_fill", "masked_fill_", "where"}
_SHAPES = {"view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze"}
_CASTS = {"to", "float", "double", "half", "bfloat16", "type", "type_as", "contiguous", "clone", "detach"}
_SOFTMAX = {"softmax"}
_DROPOUTS = {"dropout", "dropout_", "feature_dropout", "nan_to_num"}


@dataclass(frozen=True)
class _Done:
    """What was done to q k^T: `how` is "scale", "add", "fill" (a mask with True for what is ignored, and a
    value) or "shape" (from one, to another)."""

    how: str
    what: Any


@dataclass
class _Followed:
    """A tensor on its way from q k^T to the values. `weights`: what its softmax gave."""

    tensor: Tensor
    product: Product
    done: tuple[_Done, ...] = ()
    weights: Tensor | None = None
    dropout: float = 0.0
    changed: str = ""  # by a function that cannot be followed


class Steps:
    """Follows what one thread computes. `images`: how many there are, for heads folded into their axis."""

    def __init__(self, images: int | None = None) -> None:
        self.images = images
        self.changed = ""  # the function that last turned a product into something else before its values
        self._followed: list[_Followed] = []

    def forget(self) -> None:
        """Hold no tensor any longer."""
        self._followed = []

    def before(self, func: Any, args: Any, kwargs: Any) -> "Step | None":
        """The step that a function takes with these arguments, or None where it is none."""
        name = getattr(func, "__name__", "")
        at, followed = self._among(args)
        if followed is None:
            if name in PRODUCTS and (product := product_of(name, args, kwargs)) is not None:
                return Step(self, name, args, kwargs, product=product)
            return None
        product = product_of(name, args, kwargs) if name in PRODUCTS else None
        return Step(self, name, args, kwargs, at, followed, product)

    def _among(self, args: Any) -> tuple[int, _Followed | None]:
        """The followed tensor among a function's arguments, and where it is."""
        if self._followed:
            for at, value in enumerate(args):
                for followed in self._followed:
                    if value is followed.tensor:
                        return at, followed
        return 0, None

    def follow(self, followed: _Followed) -> None:
        kept = [other for other in self._followed if other.tensor is not followed.tensor]
        self._followed = [*kept, followed][-FOLLOWED:]


class Step:
    """One function with a followed tensor among its arguments, or with two batches of matrices."""

    def __init__(
        self,
        steps: Steps,
        name: str,
        args: Any,
        kwargs: Any,
        at: int = 0,
        followed: _Followed | None = None,
        product: Product | None = None,
    ) -> None:
        self._steps, self._name, self._args, self._kwargs = steps, name, args, kwargs
        self._at, self._followed, self._product = at, followed, product
        self.call = self._attention()

    def _attention(self) -> "StepwiseCall | None":
        """The attention whose weights meet their values here."""
        followed, product = self._followed, self._product
        if followed is None or product is None or followed.weights is None:
            return None
        if followed.changed:
            self._steps.changed = followed.changed
            return None
        if product.left.shape[-2:] != followed.weights.shape[-2:] or product.scale != 1:
            return None  # weights from the right, or transposed: of something else
        return StepwiseCall(followed, product.right.transpose(-1, -2), self._steps.images)

    def as_result(self, mixed: Float[Tensor, "*b h n e"]) -> Tensor:
        """A mix of values as the function would return it."""
        assert self._product is not None
        mixed = mixed.reshape(*self._product.left.shape[:-2], *mixed.shape[-2:])
        return mixed if self._product.out is None else mixed.permute(self._product.out)

    def with_masks(self, change: Callable[[Tensor, int], Tensor]) -> Any:
        """The function's arguments, with other masks and biases in the place of those before the softmax."""
        followed, product = self._followed, self._product
        if followed is not None and followed.weights is None:
            logits: Sequence[int] = followed.tensor.shape
            self._args = tuple(
                value if i == self._at else self._changed(value, logits, change)
                for i, value in enumerate(self._args)
            )
        elif self._name == "baddbmm" and product is not None and product.bias is not None:
            logits = (*product.left.shape[:-1], product.right.shape[-2])
            self._args = (self._changed(self._args[0], logits, change), *self._args[1:])
            self._product = product_of(self._name, self._args, self._kwargs)
        return self._args

    def _changed(self, value: Any, logits: Sequence[int], change: Callable[[Tensor, int], Tensor]) -> Any:
        """Another mask in the place of an argument, if that is one."""
        filled = self._name in _FILLS
        if not isinstance(value, Tensor) or value.dim() < 2 or filled != (value.dtype == torch.bool):
            return value
        ignoring = filled and not (self._name == "where" and self._at == 1)
        mask, images = ~value if ignoring else value, self._steps.images
        heads = logits[0] // images if len(logits) == 3 and images and logits[0] % images == 0 else 0
        if heads and mask.dim() == 3:
            mask = mask.unflatten(0, (-1, heads)) if len(mask) == logits[0] else mask[None]
        changed = change(mask, logits[-1])
        if changed is mask:
            return value
        if heads and changed.dim() == 4:
            changed = changed.expand(logits[0] // heads, heads, -1, -1).flatten(0, 1)
        return ~changed if ignoring else changed

    def after(self, result: Any) -> Any:
        """Follow what the function returned, which is handed on."""
        if isinstance(result, Tensor) and self.call is None:
            if self._followed is not None:
                self._go_on(self._followed, result)
            if self._product is not None and self._product.out is None:
                self._start(self._product, result)
        return result

    def _start(self, product: Product, result: Tensor) -> None:
        done: tuple[_Done, ...] = () if product.scale == 1 else (_Done("scale", product.scale),)
        done = done if product.bias is None else (*done, _Done("add", product.bias))
        self._steps.follow(_Followed(result, product, done))

    def _go_on(self, followed: _Followed, result: Tensor) -> None:
        if result.numel() != followed.tensor.numel():
            return  # read from it: its largest value, one row
        if followed.changed:
            self._steps.follow(replace(followed, tensor=result))
            if self._name in _SOFTMAX:
                self._steps.changed = followed.changed
        elif followed.weights is None:
            self._before_softmax(followed, result)
        else:
            self._after_softmax(followed, result)

    def _before_softmax(self, followed: _Followed, result: Tensor) -> None:
        name, tensor = self._name, followed.tensor
        if name in _SOFTMAX and self._over_keys(tensor):
            self._steps.follow(replace(followed, tensor=result, weights=result))
            return
        done = self._done(tensor, result)
        if done is None:
            self._steps.follow(replace(followed, tensor=result, changed=name))
        else:
            self._steps.follow(replace(followed, tensor=result, done=(*followed.done, *done)))

    def _after_softmax(self, followed: _Followed, result: Tensor) -> None:
        name = self._name
        if name in _DROPOUTS:
            self._steps.follow(replace(followed, tensor=result, dropout=self._dropout()))
        elif name in _CASTS or (name in _SHAPES and result.shape[-2:] == followed.tensor.shape[-2:]):
            weights = followed.weights
            assert weights is not None
            if weights.shape != result.shape:
                weights = weights.reshape(result.shape)
            self._steps.follow(replace(followed, tensor=result, weights=weights, done=(
                *followed.done, *_reshaped(followed.tensor, result))))  # fmt: skip
        else:
            self._steps.follow(replace(followed, tensor=result, changed=name))

    def _over_keys(self, tensor: Tensor) -> bool:
        dim = self._kwargs.get("dim", self._args[1] if len(self._args) > 1 else None)
        return dim in (-1, tensor.dim() - 1)

    def _dropout(self) -> float:
        if self._name == "nan_to_num":
            return 0.0
        given = dict(zip(("p", "training"), self._args[1:3], strict=False)) | self._kwargs
        return float(given.get("p", 0.5)) if given.get("training", True) else 0.0

    def _done(self, tensor: Tensor, result: Tensor) -> tuple[_Done, ...] | None:
        """What the function does to logits, or None: something that cannot be followed."""
        name = self._name
        if name in _CASTS:
            return ()
        if name in _SHAPES:
            same = tensor.shape[-2:] == result.shape[-2:]
            return _reshaped(tensor, result) if same else None
        if name in _FILLS:
            return self._filled()
        operand = self._args[1 - self._at] if len(self._args) > 1 and self._at < 2 else None
        if operand is None or result.shape != tensor.shape:
            return None
        alike = alike_for_keys(operand)
        if name in MULTIPLIES and alike:
            return (_Done("scale", operand),)
        if name in _DIVIDES and alike and not self._at:
            return (_Done("scale", 1 / operand),)
        if name in ADDS:
            return self._added(operand, alike)
        return None

    def _added(self, operand: Any, alike: bool) -> tuple[_Done, ...] | None:
        if self._name not in ("add", "add_"):
            if self._at or self._name == "__rsub__":
                return None
            operand = -operand
        if self._kwargs.get("alpha", 1) != 1:
            operand = operand * self._kwargs["alpha"]
        return () if alike else (_Done("add", operand),)

    def _filled(self) -> tuple[_Done, ...] | None:
        if self._name == "where":
            condition, *values = self._args[:3]
            if self._at not in (1, 2) or len(values) != 2:
                return None
            other, ignored = values[2 - self._at], ~condition if self._at == 1 else condition
        else:
            ignored = self._kwargs.get("mask", self._args[1] if len(self._args) > 1 else None)
            other = self._kwargs.get("value", self._args[2] if len(self._args) > 2 else None)
        if ignored is None or other is None or (self._at and self._name != "where"):
            return None
        return None if isinstance(other, Tensor) and other.dim() else (_Done("fill", (ignored, other)),)


def _reshaped(before: Tensor, after: Tensor) -> tuple[_Done, ...]:
    if before.shape == after.shape:
        return ()
    return (_Done("shape", (tuple(before.shape[:-2]), tuple(after.shape[:-2]))),)


class StepwiseCall(AttentionCall):
    """Attention that a model computes step by step: its rows are those that the model made itself."""

    kind = "softmax(q k^T) v, step by step"
    causal = False

    def __init__(self, followed: _Followed, values: Float[Tensor, "*b m e"], images: int | None) -> None:
        assert followed.weights is not None
        self._product, self._done = followed.product, followed.done
        self._weights, self._values, self._images = followed.weights, values, images
        self.tokens, self.dropout = followed.weights.shape[-2], followed.dropout

    @property
    def scale(self) -> float | None:  # type: ignore[override]
        scale = self._scale
        return 1.0 if isinstance(scale, Tensor) else scale

    @property
    def _scale(self) -> Any:
        scale: Any = 1.0
        for step in self._done:
            if step.how == "scale":
                scale = scale * step.what
        return scale

    @property
    def q(self) -> Float[Tensor, "*b h n c"]:
        scale, q = self._scale, self._by_head(self._product.left)
        if not isinstance(scale, Tensor):
            return q
        return q * self._unfolded(scale, self._product.left)

    @property
    def k(self) -> Float[Tensor, "*b h m c"]:
        return self._like_queries(self._by_head(self._product.right))

    @property
    def v(self) -> Float[Tensor, "*b h m e"]:
        return self._like_queries(self._by_head(self._values))

    @property
    def mask(self) -> Tensor | None:  # type: ignore[override]
        bias: Tensor | None = None
        for step in self._done:
            if step.how == "scale" and bias is not None:
                bias = bias * step.what
            elif step.how == "add":
                bias = step.what if bias is None else bias + step.what
            elif step.how == "fill":
                ignored, value = step.what
                bias = torch.zeros_like(ignored, dtype=self._weights.dtype) if bias is None else bias
                bias = torch.where(ignored, value, bias)
            elif step.how == "shape" and bias is not None and bias.dim() > 2:
                before, after = step.what
                bias = bias.expand(*before, *bias.shape[-2:]).reshape(*after, *bias.shape[-2:])
        if bias is None:
            return None
        bias = torch.atleast_2d(self._unfolded(bias, self._weights))
        return bias.to(self._product.left.dtype)

    def rows(self, index: Tensor | slice) -> Float[Tensor, "*b h r m"]:
        rows = self._by_head(self._weights)[..., index, :]
        if rows.dtype == torch.float32:
            return rows
        return rows.float() / rows.sum(-1, keepdim=True, dtype=torch.float32)  # 1, but for the rounding

    def _by_head(self, x: Float[Tensor, "*b n c"]) -> Float[Tensor, "*b h n c"]:
        """A tensor whose heads are folded into the axis of the images, (b * h, n, c), as (b, h, n, c)."""
        if self._images and x.dim() == 3 and x.shape[0] % self._images == 0:
            return x.unflatten(0, (self._images, -1))
        return x

    def _unfolded(self, x: Tensor, like: Tensor) -> Tensor:
        """What met a tensor with folded heads, by head; as it is where it has no such axis."""
        return self._by_head(x) if like.dim() == x.dim() == 3 and len(x) == len(like) else x

    def _like_queries(self, x: Tensor) -> Tensor:
        lead = self._by_head(self._product.left).shape[:-2]
        return x if x.shape[:-2] == lead else x.expand(*lead, *x.shape[-2:])
