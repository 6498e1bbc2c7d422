"""Shards on Ray Data: one actor per worker, each with the model. The only file that knows Ray.

    with ray_session(workers):
        for entry in run_shards(job, shards, workers, device): ...

Ray starts a worker that dies again, and gives its shard to whoever is free.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pickle import PicklingError
from typing import Any

from vitreg import errors
from vitreg.archive.worker import Job, ShardWorker
from vitreg.data.cpus import usable_cpus
from vitreg.errors import ArchiveError, MissingExtraError, UnsupportedModelError, VitregError

_CPUS = 4  # for each worker, where nothing else is known
_BLOCKS = 4096  # that Ray Data hands out; with more shards than that, several are in one


def require_ray() -> None:
    """Raise MissingExtraError without Ray, or without pyarrow, which the plan and the files need."""
    for module, package in (("ray", "ray[data]"), ("pyarrow", "pyarrow")):
        if find_spec(module) is None:
            raise MissingExtraError(package, "ray")


@contextmanager
def ray_session(workers: int | None) -> Iterator[None]:
    """The cluster of RAY_ADDRESS, or a Ray of this machine's own; one that the caller has started is used.

    Raises MissingExtraError without Ray, ArchiveError where it does not start.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what its C++ has to say stays in its log files
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingExtraError("ray[data]", "ray") from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS", "local")
    options: dict[str, Any] = {}
    if address == "local":
        options = {"num_cpus": max(usable_cpus(), workers or 1), "include_dashboard": False}
    try:
        with _quiet_start():
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except (OSError, RuntimeError, ValueError) as error:
        why = " ".join(str(error).split())[:300]
        raise ArchiveError(
            f"Ray does not start at {address}: {why}. See to RAY_ADDRESS, or unset it for a local run."
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _quiet_start() -> Iterator[None]:
    """Ray's C++ prints that it has read RAY_BACKEND_LOG_LEVEL, and nothing else keeps it from doing so."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def run_shards(job: Job, shards: Sequence[int], workers: int | None, device: str) -> Iterator[dict[str, Any]]:
    """The entries of these shards, as they are done.

    Raises what a worker raises, and ArchiveError where workers cannot start.
    """
    import ray

    hosts = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    device = _device(device, hosts)
    workers, cpus = share(hosts, workers, "GPU" if device == "cuda" else "CPU")
    shipped = _shipped(replace(job, device=device, threads=cpus))
    for entry in hand_out(_Actor, [shipped], shards, workers, cpus, 1 if device == "cuda" else 0):
        if "error" in entry:
            raise _error(**entry["error"])
        yield entry


def _shipped(job: Job) -> Any:
    import ray

    try:
        return ray.put(job)
    except (TypeError, AttributeError, PicklingError) as error:
        why = str(error.__cause__ or error).strip().splitlines()[0][:200]
        raise UnsupportedModelError(
            f"{job.vit.name} cannot be sent to workers: {why}. Expected a model, preprocess and forward that"
            " can be pickled: those of vitreg.load can."
        ) from error


def hand_out(
    actor: type, argument: Any, shards: Sequence[int], workers: int, cpus: int, gpus: int
) -> Iterator[dict[str, Any]]:
    """What actors make of the shards, in the order in which they are done."""
    import ray

    numbers = ray.data.from_items([*shards], override_num_blocks=min(len(shards), _BLOCKS))
    entries = numbers.map_batches(
        actor,
        fn_constructor_args=(argument,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(
            size=min(workers, len(shards)),
            max_tasks_in_flight_per_actor=1,  # else the last shards queue up behind one worker
        ),
        num_cpus=cpus,
        num_gpus=gpus,
    )
    try:
        for row in entries.iter_rows():
            yield json.loads(row["entry"])
    except ray.exceptions.ActorDiedError as error:
        why = str(error).strip().splitlines()[-1].strip()[:300]
        raise ArchiveError(
            f"workers do not start: {why}. Expected vitreg, the same version with the ray extra, on every"
            " machine of the cluster, and room for the model."
        ) from error


class _Actor:
    """What Ray runs. Our own errors come out as data: Ray would wrap them in its own and a traceback."""

    def __init__(self, shipped: list[Any]) -> None:
        import ray

        self._worker = ShardWorker(ray.get(shipped[0]))

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        try:
            entry = self._worker.run(int(batch["item"][0]))
        except VitregError as error:
            entry = {"error": {"kind": type(error).__name__, "message": str(error)}}
        return {"entry": [json.dumps(entry)]}


def _error(kind: str, message: str) -> VitregError:
    found = getattr(errors, kind)
    return ArchiveError(message) if found is MissingExtraError else found(message)


def _device(wanted: str, hosts: Sequence[Mapping[str, float]]) -> str:
    if wanted != "auto":
        return wanted
    return "cuda" if any(host.get("GPU") for host in hosts) else "cpu"


def share(hosts: Sequence[Mapping[str, float]], workers: int | None, unit: str) -> tuple[int, int]:
    """(workers, CPUs for each), such that all find room on the hosts: {"CPU": 8, "GPU": 1} each.

    A number that was asked for is kept, even where there is no room yet: clusters grow.
    """
    if unit == "GPU":
        able = [host for host in hosts if host.get("GPU")]
        cpus = min((int(host.get("CPU", 0) // host["GPU"]) for host in able), default=_CPUS)
        return workers or int(sum(host["GPU"] for host in able)) or 1, max(1, cpus)
    free = [int(host.get("CPU", 0)) for host in hosts]
    workers = workers or sum(n // _CPUS for n in free) or 1
    fits = [cpus for cpus in range(1, max(free, default=1) + 1) if sum(n // cpus for n in free) >= workers]
    return workers, max(fits, default=1)
