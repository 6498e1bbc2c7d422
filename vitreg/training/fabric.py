"""Where a run is computed: Lightning Fabric, and what a loop over several processes needs beside it.

fabric = Machine(devices=8, precision="bf16-mixed").fabric()
first(fabric, lambda: path.write_text(page))      # by one process; all of them learn if it fails
with whole(module): ...                           # under FSDP, all weights are here meanwhile
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from vitreg.errors import DataError, MissingExtraError, OutputError
from vitreg.hooks.block_edit import edits_of

try:
    from lightning.fabric import Fabric as Fabric
    from lightning.fabric.plugins.io import TorchCheckpointIO
    from lightning.fabric.strategies.fsdp import FSDPStrategy
    from lightning.fabric.strategies.strategy import Strategy
except ImportError as error:
    raise MissingExtraError("lightning", "train") from error

T = TypeVar("T")


@dataclass(frozen=True)
class Machine:
    """Where a run is computed; results do not depend on it, but for rounding.

    accelerator, devices, nodes, strategy, precision   as Lightning Fabric takes them; under torchrun, that
                  has the say on devices and nodes. "fsdp" needs GPUs: it shards gradients and the
                  optimizer's state, and gathers the weights for each pass
    workers       processes that load data, for each training process
    tensorboard   whether to write events for TensorBoard beside log.jsonl
    progress      whether to draw a bar on stderr
    """

    accelerator: str = "auto"
    devices: int | str = 1
    nodes: int = 1
    strategy: str | Strategy = "auto"
    precision: str = "32-true"
    workers: int = 0
    tensorboard: bool = False
    progress: bool = False

    def fabric(self) -> Fabric:
        """Raises DataError for what Fabric does not know or this computer does not have."""
        if self.precision.startswith("16"):
            raise DataError(f"precision={self.precision} needs loss scaling. Use bf16-mixed, which does not.")
        devices, nodes = self.devices, self.nodes
        if "TORCHELASTIC_RUN_ID" in os.environ:
            devices = int(os.environ["LOCAL_WORLD_SIZE"])
            nodes = int(os.environ["WORLD_SIZE"]) // devices
        # Only the whole objective is sharded, as one unit: inside it, modules stay what `vitreg.wrap` knows.
        # A full state dict is one file, which any number of processes reads.
        strategy = FSDPStrategy(state_dict_type="full") if self.strategy == "fsdp" else self.strategy
        precision: Any = self.precision
        try:
            return Fabric(
                accelerator=self.accelerator,
                devices=devices,
                num_nodes=nodes,
                strategy=strategy,
                precision=precision,
                plugins=[] if isinstance(strategy, FSDPStrategy) else [_Plain()],
            )
        except Exception as error:  # Fabric raises many kinds
            raise DataError(f"cannot train on this machine as asked: {error}") from error


class _Plain(TorchCheckpointIO):
    """Writes a checkpoint where it belongs. Lightning's own way makes it in memory, and again in /tmp."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with open(path, "wb") as file:  # torch's own writer would not say what went wrong
            torch.save(checkpoint, file)


def first(fabric: Fabric, action: Callable[[], T]) -> T | None:
    """Do something in the first process; returns None in the others.

    If it fails there, the others raise OutputError with its message: none goes on to wait for the first.
    """
    result, problem, caught = None, "", None
    if fabric.is_global_zero:
        try:
            result = action()
        except Exception as error:
            problem, caught = str(error) or type(error).__name__, error
    problem = fabric.broadcast(problem)
    if caught is not None:
        raise caught
    if problem:
        raise OutputError(problem)
    return result


@contextmanager
def whole(module: nn.Module, *, write: bool = False) -> Iterator[None]:
    """Under FSDP, gather all weights, and with `write` keep what is done to them; else do nothing.

    `module` is what Fabric set up. All processes must enter together.
    """
    inner = getattr(module, "_forward_module", module)
    if not isinstance(inner, FullyShardedDataParallel):
        yield
        return
    with FullyShardedDataParallel.summon_full_params(inner, writeback=write):
        yield


@contextmanager
def plain_attention(module: nn.Module, device: torch.device) -> Iterator[None]:
    """On a CPU, timm's own attention: its backward pass takes half the time of torch's fused kernel there.

    Models with carried tokens keep the kernel, through which their masks are widened.
    """
    carried = device.type != "cpu" or any(edits_of(part) for part in module.modules())
    fused: list[Any] = [] if carried else [x for x in module.modules() if getattr(x, "fused_attn", None)]
    try:
        for attention in fused:
            attention.fused_attn = False
        yield
    finally:
        for attention in fused:
            attention.fused_attn = True


@contextmanager
def quiet() -> Iterator[None]:
    """Without Lightning's notices on the terminal; its warnings stay."""
    loggers = [logging.getLogger(f"lightning.{part}") for part in ("fabric", "pytorch")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
