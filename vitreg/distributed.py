"""Several processes, one result: each reads its share of the images, and what they found is put together.

    torchrun --nproc-per-node 4 -m vitreg diagnose MODEL photos/

    with process_group() as ranks:                           # of torchrun; or ALONE, without it
        photos = read_images("photos/", vit, ranks=ranks)
        report = diagnose(vit, photos)                       # the same on every rank

Only what is read by `ranks` is shared: a training with processes of its own may diagnose on one of them.
Every rank must ask for the same in the same order; one that fails takes the others with it.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from vitreg.errors import RankError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among others: `rank` of `size`, `neighbours` of them (with itself) on this machine."""

    rank: int = 0
    size: int = 1
    neighbours: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that speaks to the user, and writes."""
        return self.rank == 0

    def gather(self, mine: T) -> list[T]:
        """What each rank has, in the order of ranks, on every rank. Raises RankError if one is lost."""
        if self.size == 1:
            return [mine]
        found: list[Any] = [None] * self.size
        with _explained():
            dist.all_gather_object(found, mine)
        return found

    def add(self, mine: Tensor) -> Tensor:
        """The sum over ranks."""
        return self._reduced(mine, dist.ReduceOp.SUM)

    def largest(self, mine: Tensor) -> Tensor:
        """The largest over ranks, element by element."""
        return self._reduced(mine, dist.ReduceOp.MAX)

    def _reduced(self, mine: Tensor, operation: Any) -> Tensor:
        if self.size == 1:
            return mine
        whole = mine.cpu().clone()
        with _explained():
            dist.all_reduce(whole, operation)
        return whole.to(mine.device)


ALONE = Ranks()


@contextmanager
def process_group() -> Iterator[Ranks]:
    """This process as one of those that torchrun started, by gloo: what is put together is small.

    All but the first are silent meanwhile. If one fails, it alone tells why; the others leave with exit
    code 1, and so they do if one is killed, of which one of them tells. A process that fails here has to
    end: it no longer heeds SIGTERM.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    store, rank, size = next(iter(rendezvous("env://")))
    dist.init_process_group("gloo", store=PrefixStore("vitreg", store), rank=rank, world_size=size)
    ranks = Ranks(rank, size, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    before = signal.signal(signal.SIGTERM, _stopped)  # so does torchrun with those that are left
    try:
        with ExitStack() as stack:
            if not ranks.first:
                nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.enter_context(redirect_stdout(nowhere))
                stack.enter_context(redirect_stderr(nowhere))
            yield ranks
    except (Exception, KeyboardInterrupt):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # from torchrun, before this is told
        if store.add("vitreg/told", 1) > 1:
            sys.exit(1)
        raise
    else:
        signal.signal(signal.SIGTERM, before)
    finally:
        dist.destroy_process_group()


def _stopped(*_: Any) -> None:
    raise RankError(_LOST)


_LOST = (
    "another of the processes has died or was stopped, so this one stops, too; nothing was written. Expected"
    " all of them to last: see torchrun's summary for which it was (signal 9 is often a lack of memory)"
)


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo's: connection closed by peer, a timeout
        raise RankError(_LOST) from error
