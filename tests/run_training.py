"""Runs in processes of their own, one after the other: `python run_training.py JOBS.json`, or under torchrun.

A job is {out, settings} with, by choice: machine (arguments), hit (arguments), disk (bytes that the first
process can write into a file), fork (in a child process, which may die), fsdp. What came of it is put beside
the run's folder, by each process: {step, stopped, written} or {error, message, seconds}, {status} of a child.
"""

import json
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.strategies import FSDPStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from training_runs import Hit, Hits, TinyObjective, full_disk, tiny

from vitreg.errors import VitregError
from vitreg.training.loop import Machine, train


class CpuFsdp(FSDPStrategy):
    """Fabric refuses its own class where there is no GPU; torch does not, if it is told."""

    def setup_module(self, module: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(module, device_id=torch.device("cpu"), use_orig_params=True)


def run(job: dict[str, Any]) -> dict[str, Any]:
    rank = int(os.environ.get("RANK", "0"))
    Hits.now = Hit(*job.get("hit", ()))
    machine = Machine(accelerator="cpu", **job.get("machine", {}))
    if job.get("fsdp"):
        machine = replace(machine, strategy=CpuFsdp(state_dict_type="full"))
        # It looks at weights through numpy, from where FSDP cannot take them back on a CPU.
        TinyObjective.evaluate = lambda self: {}
    started = time.monotonic()
    with full_disk(job["disk"]) if "disk" in job and rank == 0 else nullcontext():
        try:
            result = train(tiny(**job["settings"]), job["out"], machine)
        except VitregError as error:
            seconds = time.monotonic() - started
            return {"error": type(error).__name__, "message": str(error), "seconds": seconds}
    return {name: value for name, value in asdict(result).items() if name != "folder"}


def forked(job: dict[str, Any]) -> dict[str, Any]:
    if child := os.fork():
        return {"status": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}
    run(job)
    os._exit(0)


def main() -> None:
    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        found = forked(job) if job.get("fork") else run(job)
        path = Path(f"{job['out']}.{os.environ.get('RANK', '0')}.{job.get('name', 'run')}.json")
        path.write_text(json.dumps(found, default=str))


main()
