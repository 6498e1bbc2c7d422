"""`python hit_rank.py kill|nan RANK COMMAND...`: the vitreg command; a rank is hit in its second round.

All take their time to leave, so that torchrun's SIGTERM finds them at it.
"""

import os
import signal
import sys
import time

import torch.distributed as dist

from vitreg.cli.main import main
from vitreg.distributed import Ranks
from vitreg.errors import NonFiniteError

how, victim = sys.argv[1], int(sys.argv[2])
gather, leave, rounds = Ranks.gather, dist.destroy_process_group, 0


def hit(self, mine):
    global rounds
    rounds += 1
    if self.rank == victim and rounds == 2:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise NonFiniteError("a value is NaN")
    return gather(self, mine)


def leave_slowly():
    time.sleep(1)
    leave()


Ranks.gather, dist.destroy_process_group = hit, leave_slowly
sys.argv[1:] = sys.argv[3:]
main()
