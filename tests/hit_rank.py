"""`python hit_rank.py kill|nan RANK COMMAND...`: the vitreg command; a rank is hit in its second round."""

import os
import signal
import sys

from vitreg.cli import main
from vitreg.errors import NonFiniteError
from vitreg.ranks import Ranks

how, victim = sys.argv[1], int(sys.argv[2])
gather, rounds = Ranks.gather, 0


def hit(self, mine):
    global rounds
    rounds += 1
    if self.rank == victim and rounds == 2:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise NonFiniteError("a value is NaN")
    return gather(self, mine)


Ranks.gather = hit
sys.argv[1:] = sys.argv[3:]
main()
