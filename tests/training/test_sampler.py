"""Order and randomness follow from the seed and the step, however the work is shared out."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from vitreg.errors import DataError
from vitreg.training.sampler import MicroBatches, Seeded, seed_all


class Draws:
    """Items that are drawn: from all three generators."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> list[float]:
        return [index, random.random(), float(np.random.rand()), float(torch.rand(()))]


class Shards(Draws):
    """Shuffles what lies together, as a dataset of shards may."""

    def order(self, generator: torch.Generator) -> list[int]:
        return [5 * shard + i for shard in torch.randperm(2, generator=generator).tolist() for i in range(5)]


def keys(batch: int = 4, micro: int = 2, steps: range = range(7), items: Draws | None = None, **more: int):
    return list(MicroBatches(items or Draws(), batch, micro, steps, **more))


def test_an_epoch_is_all_photos_in_a_new_order_but_for_a_rest():
    batches = [a + b for a, b in zip(keys()[::2], keys()[1::2], strict=True)]
    assert [{epoch for epoch, _ in batch} for batch in batches] == [{0}, {0}, {1}, {1}, {2}, {2}, {3}]
    epochs = [[index for batch in batches[i : i + 2] for _, index in batch] for i in (0, 2, 4)]
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_another_seed_is_another_order():
    assert keys(seed=1) == keys(seed=1) != keys(seed=2)


@pytest.mark.parametrize("processes", [1, 2])
def test_processes_share_out_what_one_would_do(processes):
    each = [keys(micro=1, rank=rank, processes=processes) for rank in range(processes)]
    passes = 4 // processes
    whole = [key for step in range(7) for rank in each for key in rank[step * passes : (step + 1) * passes]]
    assert whole == keys(micro=1)


def test_a_resumed_run_goes_on_where_it_stopped():
    assert keys(steps=range(3, 7)) == keys()[6:]
    assert len(MicroBatches(Draws(), 4, 2, range(3, 7))) == 8


def test_a_dataset_may_shuffle_by_itself():
    found = [index for batch in keys(5, 5, range(2), Shards()) for _, index in batch]
    assert found in ([0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [5, 6, 7, 8, 9, 0, 1, 2, 3, 4])


def test_items_are_the_same_wherever_they_are_made():
    def made(workers: int, steps: range) -> list[list[float]]:
        sampler = MicroBatches(Draws(), 4, 2, steps, seed=3)
        loader = DataLoader(
            Seeded(Draws(), 3), batch_sampler=sampler, num_workers=workers, collate_fn=lambda items: items
        )
        return [item for batch in loader for item in batch]

    one = made(0, range(6))
    assert made(2, range(6)) == one
    assert made(0, range(4, 6)) == one[16:]
    first = {item[0]: item for item in one[:8]}
    again = [item for item in one[8:16] if item[0] in first]
    assert again  # the same photo in another epoch
    assert all(item[1:] != first[item[0]][1:] for item in again)


def test_all_numbers_of_a_seed_count():
    def drawn(*numbers: int) -> tuple[float, float, float]:
        seed_all(*numbers)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    assert drawn(1, 2, 3) == drawn(1, 2, 3)
    assert len({drawn(*numbers) for numbers in [(1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4)]}) == 4


def test_too_few_photos_for_a_batch():
    with pytest.raises(
        DataError, match=r"found 10 photos, expected at least .* 16\. Set a smaller batch_size"
    ):
        keys(batch=16)


def test_a_batch_that_cannot_be_dealt_out():
    with pytest.raises(DataError, match=r"batch_size=6 cannot be dealt out to 2 processes .* multiple of 4"):
        keys(batch=6, micro=2, processes=2)
