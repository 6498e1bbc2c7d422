"""Try vitreg on every image model of timm and transformers, with random weights, and write what happened.

    python benchmarks/census.py [--library timm|transformers|towers] [--only PATTERN] [--again]
                                [--out docs/census.json] [--write docs/census.md]

"towers" are the vision towers inside transformers' multimodal models.

Each model is built with two blocks and a small, non-square image where its constructor allows that, and
gets one of four verdicts:

    supported   vitreg.wrap() accepts it, and every check agrees: tokens, grid, depth and the position of a
                patch with what the model says of itself; norms, neurons and attention rows with hooks of
                this file on the model's own layers; the traced output with the untraced one, bit by bit
    refused     an UnsupportedModelError, whose reason is kept
    wrong       any other error, or a check that disagrees
    not built   the library itself cannot build or run it here: too large, too slow, or an error

No weights are downloaded. A killed run continues where it stopped: results are appended to OUT.part, and
become OUT (a JSON object, each reason listed once) and the page at the end. `--again` tries the chosen names
once more.
"""

import argparse
import fnmatch
import gc
import json
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from census_builds import ATTEMPTS, NAMES, Attempt, NotBuiltError, not_built, one_line
from census_checks import checks
from census_page import LIBRARIES, Result, Results, journal, load_results, page, save_results, slim
from census_towers import tower_attempts, tower_names
from torch import nn

import vitreg
from vitreg.errors import UnsupportedModelError


class OutOfTime(BaseException):
    """The time limit of one model is over: no Exception, so that no library swallows it."""


def judge(library: str, name: str, module: str, seconds: int) -> Result:
    """The verdict on one model, from the smallest of its builds that decides it."""
    result = Result(library, name, module, "not built")
    try:
        with time_limit(seconds):
            result.checked = verdict_of((ATTEMPTS | {"towers": tower_attempts})[library](name))
            result.verdict = "supported"
    except OutOfTime:
        result.reason = f"too slow: over {seconds} s"
    except NotBuiltError as error:
        result.reason = one_line(error)
    except UnsupportedModelError as error:
        result.verdict, result.reason = "refused", one_line(error)
    except Exception as error:
        result.verdict, result.reason = "wrong", f"{type(error).__name__}: {one_line(error)}"
    return result


def verdict_of(attempts: Iterator[Attempt]) -> list[str]:
    """The checks passed by the first build that works; else the error of the first that decides.

    A smaller image may fail for reasons of its own (a window that no longer fits), so a failure there
    counts only where the model itself runs and vitreg is wrong about it.
    """
    last: Exception = NotBuiltError("no way to build it")
    for attempt in attempts:
        try:
            model = attempt.build().eval()
        except Exception as error:
            last = error if isinstance(error, UnsupportedModelError) else not_built(error)
            continue
        try:
            return checks(vitreg.wrap(model, image_size=attempt.size))
        except Exception as error:
            last = error
            wrong = not isinstance(error, UnsupportedModelError)
            if attempt.size is None or (wrong and runs(model, attempt.size)):
                raise
    raise last


def runs(model: nn.Module, size: tuple[int, int]) -> bool:
    try:
        with torch.no_grad():
            model(torch.rand(1, 3, *size))
    except Exception:
        return False
    return True


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def over(*_: object) -> None:
        raise OutOfTime

    signal.signal(signal.SIGALRM, over)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def chosen_names(library: str | None, only: str) -> list[tuple[str, str, str]]:
    """(library, name, module) of what to try; `only` is a pattern of names or of modules."""
    rows = [
        (kind, name, module)
        for kind in LIBRARIES
        if library in (None, kind)
        for name, module in (NAMES | {"towers": tower_names})[kind]().items()
    ]
    return [row for row in rows if fnmatch.fnmatch(row[1], only) or fnmatch.fnmatch(row[2], only)]


def take(rows: list[tuple[str, str, str]], results: Results, args: argparse.Namespace) -> None:
    """Judge the models that have no verdict yet, writing each down at once."""
    for number, (library, name, module) in enumerate(rows, 1):
        if (library, name) in results and not args.again:
            continue
        torch.manual_seed(0)
        started = time.perf_counter()
        result = judge(library, name, module, args.seconds)
        results[library, name] = result
        with journal(args.out).open("a") as file:
            file.write(json.dumps(slim(result)) + "\n")
        took = time.perf_counter() - started
        reason = "" if result.verdict == "supported" else result.reason[:150]
        print(
            f"{number}/{len(rows)} {took:5.1f}s {name}: {result.verdict} {reason}",
            file=sys.stderr,
            flush=True,
        )
        gc.collect()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--library", choices=LIBRARIES)
    parser.add_argument("--only", default="*", help="a pattern of model names or of module names")
    parser.add_argument("--again", action="store_true", help="also try what already has a verdict")
    parser.add_argument("--seconds", type=int, default=120, help="time limit for one model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("docs/census.json"))
    parser.add_argument("--write", type=Path, default=Path("docs/census.md"))
    return parser.parse_args()


def main() -> None:
    args = arguments()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    results = load_results(args.out)
    take(chosen_names(args.library, args.only), results, args)
    save_results(args.out, results)
    args.write.write_text(page(results, args.seconds), encoding="utf-8")


if __name__ == "__main__":
    main()
