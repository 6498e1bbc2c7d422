"""Random walks of generated models beside their plain twins: how many stay the same, and what is refused.

    python benchmarks/random_walks.py [--walks 300] [--first 0]

Each seed draws a model, what wraps its layers and when, and what is done to it (tests/interop/walks.py). A
difference from the twin, and any exception that is not vitreg's own, is counted and printed with its seed.
"""

import argparse
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "interop"))


def main() -> None:
    from walks import walk

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--walks", type=int, default=300)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    ends: Counter[str] = Counter()
    for seed in range(args.first, args.first + args.walks):
        try:
            ends[walk(seed)] += 1
        except Exception as error:  # what this command is there to find
            ends["WRONG"] += 1
            print(f"seed {seed}: {type(error).__name__}: {str(error)[:300]}", flush=True)
    for end, count in ends.most_common():
        print(f"{count:5}  {end}")


if __name__ == "__main__":
    main()
