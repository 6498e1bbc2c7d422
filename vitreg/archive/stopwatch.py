"""Seconds by what they were spent on, from several threads."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """`with watch("forward"): ...` adds to `watch.seconds["forward"]`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - start
