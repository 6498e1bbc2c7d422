"""Ranks as threads of one process, and results compared as the issue of several ranks asks for it."""

import copy
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import Queue
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

import vitreg
from vitreg.distributed import Ranks
from vitreg.errors import RankError

T = TypeVar("T")


LOST = object()


@dataclass(frozen=True)
class Thread(Ranks):
    posts: dict[tuple[int, int], Queue[Any]] = field(default_factory=dict)  # by sender and receiver

    def send(self, what: Any) -> None:
        for other in range(self.size):
            self.posts[self.rank, other].put(what)

    def gather(self, mine: T) -> list[T]:
        self.send(copy.deepcopy(mine))
        found = [self.posts[other, self.rank].get(timeout=60) for other in range(self.size)]
        if any(theirs is LOST for theirs in found):
            raise RankError("another one has failed")
        return found

    def add(self, mine: Tensor) -> Tensor:
        return torch.stack(self.gather(mine)).sum(0).to(mine.dtype)

    def largest(self, mine: Tensor) -> Tensor:
        return torch.stack(self.gather(mine)).amax(0)


def of_each(size: int, work: Callable[[Ranks], T]) -> list[T | Exception]:
    """What each of so many ranks makes of it: a result, or the error that it ended with."""
    posts = {pair: Queue() for pair in itertools.product(range(size), repeat=2)}

    def run(rank: int) -> T | Exception:
        mine = Thread(rank, size, size, posts)
        try:
            return work(mine)
        except Exception as error:
            mine.send(LOST)
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


def copied(vit: vitreg.Backbone) -> vitreg.Backbone:
    """Each rank has a model of its own."""
    return vit.with_model(copy.deepcopy(vit.model), vit.name)


def flat(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """The leaves of a JSON document, with their paths."""
    if isinstance(value, dict):
        return list(itertools.chain(*(flat(part, f"{name}.{key}") for key, part in value.items())))
    if isinstance(value, list | tuple):
        return list(itertools.chain(*(flat(part, f"{name}[{i}]") for i, part in enumerate(value))))
    return [(name, value)]


def differences(one: Any, other: Any, tolerance: float = 1e-6) -> Sequence[str]:
    """What differs between two documents: floats by more than the tolerance, all else by anything."""
    first, second = flat(one), flat(other)
    if [name for name, _ in first] != [name for name, _ in second]:
        return ["other fields"]
    return [
        f"{name}: {a!r} and {b!r}"
        for (name, a), (_, b) in zip(first, second, strict=True)
        if not (
            a == pytest.approx(b, rel=tolerance, abs=tolerance, nan_ok=True)
            if isinstance(a, float) and isinstance(b, float)
            else a == b
        )
    ]
