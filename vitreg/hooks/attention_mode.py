"""See every attention of a model while its own kernel computes it, or compute another in its place.

    with intercept(print):
        model(images)          # print is called with one AttentionCall per attention

A `TorchFunctionMode` that catches the two functions of torch and follows the steps of the third way sees
every library. It is seen by the thread that entered it and by no other. (`nn.MultiheadAttention` alone
notices any mode: in evaluation without gradients it then leaves its fused inference kernel for the one that
it trains with, which rounds differently in the last bits.)
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vitreg.hooks.attention import AttentionCall, MultiheadArguments, MultiheadCall, SdpaCall
from vitreg.hooks.stepwise import Steps


class AttentionMode(TorchFunctionMode):
    """Hands each attention, in whichever way it is computed, to `attend`, and each mask before it to `mask`.

    `images`: how many images there are, for those that fold the heads into their axis.
    """

    def __init__(self, images: int | None = None) -> None:
        super().__init__()
        self.steps = Steps(images)

    def mask(self, mask: Tensor, keys: int) -> Tensor:
        """What takes the place of a mask (True: kept) or bias (..., n or 1, m) over so many keys."""
        return mask

    def beside(self, func: Any, args: Any) -> Any:
        """What takes the place of the arguments of a function that is no step of an attention."""
        return args

    def attend(self, call: AttentionCall) -> Float[Tensor, "*b h n e"] | None:
        """What the queries get, or None: what the model computes."""
        return None

    def weights(self, call: AttentionCall) -> Float[Tensor, "*b h n m"]:
        """The rows that a model is given which asks nn.MultiheadAttention for them."""
        return call.rows(slice(None))

    def __torch_function__(  # type: ignore[no-untyped-def]
        self, func, types, args=(), kwargs=None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._sdpa(func, *args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self._multihead(func, MultiheadArguments(*args, **kwargs))
        return self._other(func, args, kwargs)

    def _other(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A function that is no attention by itself, and may be a step of one."""
        step = self.steps.before(func, args, kwargs)
        if step is None:
            return func(*self.beside(func, args), **kwargs)
        call = step.call
        if call is not None and (mixed := self.attend(call)) is not None:
            return step.as_result(mixed)
        args = step.with_masks(self.mask)
        return step.after(func(*args, **kwargs))

    # Parameters have the names that callers may use.

    def _sdpa(
        self, func: Any, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *rest: Any,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        if attn_mask is not None:
            attn_mask = self.mask(attn_mask, key.shape[-2])
        mixed = self.attend(SdpaCall(query, key, value, attn_mask, *rest, **kwargs))
        return func(query, key, value, attn_mask, *rest, **kwargs) if mixed is None else mixed

    def _multihead(self, func: Any, given: MultiheadArguments) -> Any:
        mask, keys = given.attn_mask, given.key.shape[0]
        if mask is not None and mask.dtype == torch.bool:  # here it says what to ignore, not what to keep
            given = given._replace(attn_mask=~self.mask(~mask, keys))
        elif mask is not None:
            given = given._replace(attn_mask=self.mask(mask, keys))
        call = MultiheadCall(given)
        mixed = self.attend(call)
        if mixed is None:
            return func(*given)
        return call.projected(mixed), call.weights(self.weights(call)) if given.need_weights else None


class intercept(AttentionMode):  # noqa: N801 - used as a verb, like torch.no_grad
    """While entered, `seen` is called with every AttentionCall of this thread, before it runs."""

    def __init__(self, seen: Callable[[AttentionCall], None], images: int | None = None) -> None:
        super().__init__(images)
        self._seen = seen

    def attend(self, call: AttentionCall) -> None:
        self._seen(call)
