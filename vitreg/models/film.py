"""Models of video: they run on films (b, frames, 3, h, w), and not on images."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

_FRAMES = ("num_frames", "frames_per_clip")  # of configurations, whose positions are for so many
_TRIED = (2, 4, 8, 16)


def takes_films(
    model: nn.Module, first: nn.Module, forward: Callable[[Tensor], Any], images: Float[Tensor, "b 3 h w"]
) -> bool:
    """Whether a model that fails on images gets to its `first` block with films."""
    reached: list[bool] = []

    def reach(*_: Any) -> None:
        reached.append(True)
        raise StopIteration

    with torch.no_grad(), first.register_forward_pre_hook(reach, prepend=True):
        for film in _films(model, images[:1]):
            with suppress(Exception):
                forward(film)
            if reached:
                return True
    return False


def _films(model: nn.Module, image: Float[Tensor, "1 3 h w"]) -> Iterator[Tensor]:
    config = getattr(model, "config", None)
    named = [getattr(config, name) for name in _FRAMES if isinstance(getattr(config, name, None), int)]
    for frames in (*named, *_TRIED):
        film = image[:, None].expand(-1, frames, -1, -1, -1)
        yield film
        yield film.transpose(1, 2)
