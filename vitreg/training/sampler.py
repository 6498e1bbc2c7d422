"""Which photos each forward pass sees, and what is random in it: both follow from the seed and the step.

So a run is the same with any number of processes and data workers, and a resumed one goes on exactly where
it stopped: there is no state to keep but the step.
"""

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from vitreg.errors import DataError
from vitreg.training.objective import Items

Key = tuple[int, int]  # epoch, index in the dataset


def seed_all(*numbers: int) -> None:
    """Seed the global generators of random, numpy and torch with several numbers at once."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class Seeded(Dataset[Any]):
    """A dataset whose items depend on (seed, epoch, index) alone, wherever they are made."""

    def __init__(self, items: Items, seed: int) -> None:
        self.items, self.seed = items, seed

    def __getitem__(self, key: Key) -> Any:
        seed_all(self.seed, *key)
        return self.items[key[1]]


class MicroBatches(Sampler[list[Key]]):
    """The keys of each forward pass of one process, from one optimizer step to another.

    Every epoch is a new order of all photos, cut into batches of all processes; a rest that makes no whole
    batch is left out. Each batch is cut into micro-batches, and a process takes those next to each other.
    """

    def __init__(
        self,
        items: Items,
        batch_size: int,
        micro_batch: int,
        steps: range,
        *,
        rank: int = 0,
        processes: int = 1,
        seed: int = 0,
    ) -> None:
        self.per_epoch = len(items) // batch_size
        if not self.per_epoch:
            raise DataError(
                f"found {len(items)} photos, expected at least as many as a batch has, {batch_size}."
                " Set a smaller batch_size, or give more photos."
            )
        if batch_size % (micro_batch * processes):
            raise DataError(
                f"batch_size={batch_size} cannot be dealt out to {processes} processes in micro-batches of"
                f" {micro_batch}. Choose a multiple of {micro_batch * processes}."
            )
        # The full size runs read shards: such a dataset shuffles what lies together.
        self._order: Callable[[torch.Generator], list[int]] = getattr(
            items, "order", lambda generator: torch.randperm(len(items), generator=generator).tolist()
        )
        self.batch_size, self.micro_batch, self.steps, self.seed = batch_size, micro_batch, steps, seed
        self.passes = batch_size // (micro_batch * processes)
        self.first = rank * self.passes  # this process's first micro-batch of each batch

    def __len__(self) -> int:
        return len(self.steps) * self.passes

    def __iter__(self) -> Iterator[list[Key]]:
        order, known = [], -1
        for step in self.steps:
            epoch, batch = divmod(step, self.per_epoch)
            if epoch != known:
                order, known = self._order(torch.Generator().manual_seed(self.seed + epoch)), epoch
            for micro in range(self.first, self.first + self.passes):
                start = batch * self.batch_size + micro * self.micro_batch
                yield [(epoch, index) for index in order[start : start + self.micro_batch]]
