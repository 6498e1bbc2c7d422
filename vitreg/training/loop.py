"""The loop: from a recipe to a trained ViT, on one processor or on many machines.

    run = train(recipe, "run/")              # goes on from run/last.ckpt if it is there
    run.log, run.written["model"]            # the curve; a folder that vitreg.load reads

Lightning Fabric has the devices, precisions and strategies (DDP, FSDP), leaves the loop to us, and does not
wrap what it does not need to: the same lines run on one CPU and under torchrun on many nodes. (Accelerate
would do as well; Lightning comes with lightly's losses anyway. Lightning's Trainer hides the loop, and its
own checkpoints do not stop in mid-epoch at the same photo with another number of processes.)
"""

import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from timm.scheduler import CosineLRScheduler
from torch import Tensor
from torch.utils.data import DataLoader

from vitreg.errors import DataError, NonFiniteError, OutputError
from vitreg.files import check_writable
from vitreg.printing import did_you_mean, progress_bar
from vitreg.training import checkpoint
from vitreg.training.diagnosis_log import diagnosed
from vitreg.training.fabric import Fabric, Machine, first, plain_attention, quiet, whole
from vitreg.training.log import Log, read_log
from vitreg.training.objective import Objective
from vitreg.training.recipe import Recipe
from vitreg.training.sampler import MicroBatches, Seeded, seed_all

__all__ = ["Machine", "Run", "train"]

# Seconds of which the mean speed tells the time that is left: many steps, also where one takes a minute.
_PERIOD = 600.0


@dataclass(frozen=True)
class Run:
    """What came out. `stopped`: a signal ended it early, after a checkpoint; the same call goes on.
    `interrupted`: that was Ctrl-C, in this process or another.

    `written` names what was made at the end. `first`: this is the first of several processes, the one that
    writes; in the others nothing is written.
    """

    folder: Path
    step: int
    stopped: bool = False
    written: dict[str, Path] = field(default_factory=dict)
    first: bool = True
    interrupted: bool = False

    @property
    def log(self) -> list[dict[str, Any]]:
        """All lines of the log."""
        return read_log(self.folder)


def train(recipe: Recipe, out: str | Path, machine: Machine | None = None) -> Run:
    """Train as a recipe says, into a folder; from its last checkpoint if there is one.

    Writes last.ckpt (whole or not at all), log.jsonl and, at the end, model/. At SIGTERM and at Ctrl-C it
    finishes the step, writes a checkpoint and returns; a second Ctrl-C does not wait for that.
    Raises DataError for data, a machine or a checkpoint that do not fit, OutputError for what cannot be
    written, NonFiniteError for a loss, a gradient or a weight that is not a number; the last checkpoint is
    from before that.
    """
    machine, folder = machine or Machine(), Path(out)
    with quiet():
        fabric = machine.fabric()
        fabric.launch()
        first(fabric, lambda: _prepare(folder))
        return _Training(recipe, folder, machine, fabric).run()


def _prepare(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {folder}: {error.strerror}. Choose another.") from error
    check_writable(folder / checkpoint.NAME)


class _Training:
    """One run in one process."""

    def __init__(self, recipe: Recipe, folder: Path, machine: Machine, fabric: Fabric) -> None:
        self.recipe, self.folder, self.machine, self.fabric = recipe, folder, machine, fabric
        self.path = folder / checkpoint.NAME
        seed_all(recipe.seed)
        self.objective = recipe.objective()
        resumed = self.path.exists()
        if resumed:
            checkpoint.check(self.path, self.objective, recipe)
        # Before FSDP flattens the weights: those of one dimension are not decayed.
        optimizer = _optimizer(self.objective, recipe)
        self.schedule = _schedule(optimizer, recipe)
        self.module, self.optimizer = fabric.setup(self.objective, optimizer)
        self.state = {"objective": self.module, "optimizer": self.optimizer}
        self.step = checkpoint.load(fabric, self.path, self.state) if resumed else 0
        self.saved = self.step  # the step of the last checkpoint
        self.batches = MicroBatches(
            self.objective.dataset,
            recipe.batch_size,
            recipe.micro_batch or max(1, recipe.batch_size // fabric.world_size),
            range(self.step, recipe.steps),
            rank=fabric.global_rank,
            processes=fabric.world_size,
            seed=recipe.seed,
        )
        self.log = first(fabric, lambda: Log(folder, self.step, machine.tensorboard))

    def run(self) -> Run:
        shown = self.machine.progress and self.fabric.is_global_zero
        # Data workers start within: they leave signals, which may go to all of a job, to this process.
        bar = progress_bar(shown, self.recipe.steps, self.step, elapsed=True, period=_PERIOD)
        with _told_to_end() as told, bar as show:
            loader = iter(self._loader())
            while self.step < self.recipe.steps:
                started = time.monotonic()
                values = self._one_step(loader)
                stop = self._anywhere(bool(told))
                values["photos_per_second"] = self.recipe.batch_size / (time.monotonic() - started)
                self._regularly(values, stop)
                show(self.step, f"loss {values['loss']:.3f}  {values['photos_per_second']:.0f} photos/s")
                if stop:
                    return self._result(stopped=True, interrupted=self._anywhere(signal.SIGINT in told))
            with whole(self.module):
                written = first(self.fabric, lambda: self.objective.finish(self.folder))
        return self._result(written=written or {})

    def _result(self, **what: Any) -> Run:
        if self.log is not None:
            self.log.close()
        return Run(self.folder, self.step, first=self.fabric.is_global_zero, **what)

    def _loader(self) -> Any:
        loader: Any = DataLoader(
            Seeded(self.objective.dataset, self.recipe.seed),
            batch_sampler=self.batches,
            num_workers=self.machine.workers,
            collate_fn=self.objective.collate,
            worker_init_fn=_leave_interrupts,
            pin_memory=self.fabric.device.type == "cuda",
        )
        return self.fabric.setup_dataloaders(loader, use_distributed_sampler=False)

    def _one_step(self, loader: Iterator[Any]) -> dict[str, float]:
        """One optimizer step; returns the means over the whole batch of what the objective gives."""
        recipe, fabric = self.recipe, self.fabric
        self.objective.train()
        self.schedule.step_update(self.step)
        values = self._gradients(loader)
        clip = math.inf if recipe.clip_grad is None else recipe.clip_grad
        norm = fabric.clip_gradients(self.module, self.optimizer, max_norm=clip, error_if_nonfinite=False)
        assert norm is not None
        values["grad_norm"] = float(norm)
        for name, value in values.items():
            if not math.isfinite(value):
                raise self._not_finite(f"{name} of step {self.step + 1} is {value}")
        self.optimizer.step()
        self.optimizer.zero_grad()
        values["lr"] = max(group["lr"] for group in self.optimizer.param_groups)
        self.step += 1
        if type(self.objective).after_step is not Objective.after_step:
            with whole(self.module, write=True):
                self.objective.after_step(self.step, recipe.steps)
        return values

    def _gradients(self, loader: Iterator[Any]) -> dict[str, float]:
        """Those of the whole batch, over micro-batches and processes, with the means of what is logged."""
        passes, sums = self.batches.passes, dict[str, Tensor]()
        for i in range(passes):
            batch = next(loader)
            seed_all(self.recipe.seed, self.step, self.batches.first + i)
            with (
                plain_attention(self.objective, self.fabric.device),
                self.fabric.no_backward_sync(self.module, enabled=i + 1 < passes),
            ):
                losses = self.module(batch)
                self.fabric.backward(losses["loss"] / passes)
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach().float() / passes
        means: Any = self.fabric.all_reduce(torch.stack(list(sums.values())), reduce_op="mean")
        return dict(zip(sums, means.tolist(), strict=True))

    def _regularly(self, values: dict[str, float], stop: bool) -> None:
        """What is due at this step: a diagnosis, an evaluation, a line of the log, a checkpoint."""
        always = stop or self.step == self.recipe.steps
        measured = self._measured()
        if measured or always or self._due(self.recipe.log_every):
            # Before the checkpoint: what is logged after one is logged again by a resumed run.
            first(self.fabric, lambda: self._write(values | measured))
        if always or self._due(self.recipe.checkpoint_every):
            self._save()

    def _write(self, values: dict[str, float]) -> None:
        assert self.log is not None  # in the first process
        self.log.write(self.step, values)

    def _measured(self) -> dict[str, float]:
        recipe, last, found = self.recipe, self.step == self.recipe.steps, dict[str, float]()
        diagnose = self.objective.photos and (
            self._due(recipe.diagnose_every) or (last and recipe.diagnose_every)
        )
        evaluate = self._due(recipe.evaluate_every) or last
        if diagnose or evaluate:
            with whole(self.module):
                if diagnose:
                    found |= diagnosed(self.objective.vit, list(self.objective.photos), recipe.image_size)
                if evaluate:
                    found |= self.objective.evaluate()
        return found

    def _save(self) -> None:
        finite = all(bool(weight.isfinite().all()) for weight in self.objective.parameters())
        # Buffers may hold infinity on purpose: the causal mask of a text tower.
        if self._anywhere(not finite or any(bool(b.isnan().any()) for b in self.objective.buffers())):
            raise self._not_finite(f"a weight after step {self.step} is not a number")
        settings = checkpoint.settings_of(self.recipe)
        checkpoint.save(self.fabric, self.path, self.state | {"step": self.step, "recipe": settings})
        self.saved = self.step

    def _not_finite(self, what: str) -> NonFiniteError:
        kept = (
            f"{self.path} is of step {self.saved}, from before it" if self.saved else "There is no checkpoint"
        )
        return NonFiniteError(
            f"{what}. {kept}. Run it again with a lower learning rate (lr), a longer warmup or a clip_grad."
        )

    def _anywhere(self, true: bool) -> bool:
        """Whether something is true in any process."""
        return bool(self.fabric.all_reduce(torch.tensor(float(true)), reduce_op="max"))

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0


def _optimizer(objective: Objective, recipe: Recipe) -> torch.optim.Optimizer:
    """timm's, which does not decay biases and norms. Raises DataError for a name that timm does not have."""
    try:
        info = get_optimizer_info(recipe.optimizer)
    except ValueError as error:
        near = did_you_mean(recipe.optimizer, list_optimizers())
        raise DataError(f"timm has no optimizer {recipe.optimizer!r}.{near}") from error
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        objective,
        opt=recipe.optimizer,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        **({"betas": recipe.betas} if info.has_betas and info.num_betas == 2 else {}),
    )
    return optimizer


def _schedule(optimizer: torch.optim.Optimizer, recipe: Recipe) -> Any:
    """A half cosine after a linear warm-up, as a function of the step alone."""
    return CosineLRScheduler(
        optimizer,
        t_initial=recipe.steps,
        lr_min=recipe.min_lr,
        warmup_t=recipe.warmup,
        warmup_lr_init=recipe.min_lr,
        t_in_epochs=False,
    )


@contextmanager
def _told_to_end() -> Iterator[list[int]]:
    """Fills the list with SIGTERM and SIGINT (Ctrl-C), so that the step can be finished first."""
    told: list[int] = []

    def hear(number: int, frame: Any) -> None:
        # torchrun passes on a Ctrl-C that its processes have had from the terminal.
        again = number == signal.SIGINT and number in told
        if again and "TORCHELASTIC_RUN_ID" not in os.environ:
            raise KeyboardInterrupt
        told.append(number)

    before: dict[int, Any] = {}
    with suppress(ValueError):  # no main thread: no signals
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as of a job in a shell's background
                before[number] = signal.signal(number, hear)
    try:
        yield told
    finally:
        for heard, handler in before.items():
            signal.signal(heard, handler)


def _leave_interrupts(worker: int) -> None:
    """A terminal sends Ctrl-C to data workers as well, which have to finish the step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
