"""Tiny training runs: photos on disk, a small supervised recipe, and ways for a run to go wrong."""

import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from vitreg.training.log import read_log
from vitreg.training.loop import Machine
from vitreg.training.supervised import Supervised, SupervisedObjective

CPU = Machine(accelerator="cpu")


def save_classes(folder: Path, train: int = 16, val: int = 4, classes: int = 3) -> Path:
    """`classes` folders of noisy 40 x 40 photos of one colour, in train/ and val/."""
    random = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for i in range(count * classes):
            path = folder / split / f"c{i % classes}" / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = random.integers(0, 128, (40, 40, 3)) + 40 * np.eye(3, dtype=int)[i % 3]
            PIL.Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


@dataclass(frozen=True)
class Hit:
    """What befalls a run at an optimizer step (from 1), in one of its processes.

    nan-loss, nan-gradient    at that step
    nan-weight                after it
    term, kill, int           the process is sent SIGTERM, SIGKILL or SIGINT when that step is done
    ctrl-c                    SIGINT goes to all processes of its group, as from a terminal
    impatient                 SIGINT comes twice
    """

    what: str = ""
    step: int = 0
    rank: int = 0


class Hits:
    """The next one, for `train` takes recipes alone, and a resumed run must have the same."""

    now = Hit()


@dataclass(frozen=True)
class Tiny(Supervised):
    def objective(self) -> "TinyObjective":
        return TinyObjective(self)


class TinyObjective(SupervisedObjective):
    """That of the supervised regime, with what befalls it."""

    def __init__(self, recipe: Supervised) -> None:
        super().__init__(recipe)
        self.done: Tensor
        self.register_buffer("done", torch.tensor(0))

    def forward(self, batch: Any) -> dict[str, Tensor]:
        losses = super().forward(batch)
        step = int(self.done) + 1
        if _hit("nan-loss", step):
            losses["loss"] = losses["loss"] * torch.nan
        if _hit("nan-gradient", step):
            losses["loss"].register_hook(lambda gradient: gradient * torch.nan)
        return losses

    def after_step(self, step: int, steps: int) -> None:
        self.done.fill_(step)
        if _hit("nan-weight", step):
            self.vit.pos_embed.data.fill_(torch.nan)
        for name, number in (("term", signal.SIGTERM), ("kill", signal.SIGKILL), ("int", signal.SIGINT)):
            if _hit(name, step):
                os.kill(os.getpid(), number)
        if _hit("ctrl-c", step):
            os.killpg(os.getpgrp(), signal.SIGINT)
        if _hit("impatient", step):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)


def _hit(what: str, step: int) -> bool:
    return Hit(what, step, int(os.environ.get("RANK", "0"))) == Hits.now


def tiny(data: Path | str, **settings: Any) -> Tiny:
    """A ViT of 60 thousand parameters, 6 batches of 8 photos an epoch, all that is random switched on."""
    defaults: dict[str, Any] = {
        "model_args": {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3},
        "image_size": 32,
        "batch_size": 8,
        "micro_batch": 4,
        "steps": 8,
        "warmup": 2,
        "drop_path": 0.1,
        "log_every": 1,
        "checkpoint_every": 3,
        "diagnose_every": 0,
    }
    return Tiny(about="", expected="", cost="", data=str(data), **defaults | settings)


def losses(folder: Path | list[dict[str, Any]]) -> list[float]:
    """Those of a log, whose steps must be 1, 2, ..., each once."""
    lines = folder if isinstance(folder, list) else read_log(folder)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def weights(folder: Path) -> dict[str, Tensor]:
    """The trained weights, and the optimizer's state beside them."""
    held = torch.load(folder / "last.ckpt", weights_only=True)
    state = held["optimizer"]["state"]
    moments = {f"{i}.{name}": value for i, of in state.items() for name, value in of.items()}
    return held["objective"] | moments


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Bit by bit."""
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@contextmanager
def full_disk(largest: int) -> Iterator[None]:
    """No file can grow beyond so many bytes: as at a full disk, writing fails in the middle."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
