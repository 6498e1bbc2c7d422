"""Checkpoints of a run: written whole or not at all, read without pickle, refused where they do not fit.

A checkpoint holds the objective, the optimizer, the step (from which order and randomness follow: order.py)
and the recipe's settings. The schedule is a function of the step.
"""

import os
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitreg.config.codec import encode
from vitreg.errors import DataError, OutputError
from vitreg.training.fabric import Fabric, first
from vitreg.training.recipe import Recipe

NAME = "last.ckpt"
# What may be another when a run goes on: what is written, how far it goes, where the data lie, and what
# helps it past a step whose loss was no number.
_FREE = (
    "about", "expected", "cost", "data", "steps", "log_every", "checkpoint_every", "diagnose_every",
    "evaluate_every", "lr", "min_lr", "warmup", "clip_grad",
)  # fmt: skip


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """What a run depends on, as plain values."""
    settings: dict[str, Any] = encode(recipe)
    return {"regime": type(recipe).__name__} | settings


def save(fabric: Fabric, path: Path, state: Mapping[str, Any]) -> None:
    """Replace the checkpoint, by all processes together. Raises OutputError; the one before stays whole."""
    unfinished = path.with_name(f".{path.name}.tmp")
    problem = None
    try:
        fabric.save(unfinished, dict(state))
    except (OSError, RuntimeError) as error:  # torch's own writer reports a full disk as a RuntimeError
        problem = error
        fabric.barrier()  # at which the others wait in fabric.save
    first(fabric, partial(_replace, path, unfinished, problem))


def _replace(path: Path, unfinished: Path, problem: Exception | None) -> None:
    try:
        if problem is not None:
            raise problem
        with open(unfinished, "r+b") as file:  # Windows syncs only what may be written
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            unfinished.unlink()
        kept = "The one before it is whole: see" if path.exists() else "There was none before it. See"
        raise OutputError(
            f"cannot write the checkpoint {path}: {_reason(error)}. {kept} to space and permissions there and"
            " run the same command again."
        ) from error


def _reason(error: BaseException) -> str:
    """That of the system, if it is known: torch's file format fails in its own words after it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return _reason(error.__context__) if error.__context__ else " ".join(str(error).split())[:200]


def check(path: Path, objective: nn.Module, recipe: Recipe) -> None:
    """Raise DataError for an incomplete checkpoint, or one of a run with other settings or models."""
    held = _read(path)
    _compare(path, held["recipe"], settings_of(recipe))
    if held["step"] > recipe.steps:
        raise DataError(
            f"{path} is of step {held['step']}, and steps={recipe.steps}. Set more steps, or give another"
            " folder to start anew."
        )
    _check_shapes(path, held["objective"], objective)


def load(fabric: Fabric, path: Path, state: dict[str, Any]) -> int:
    """Put a checkpoint, which was checked, into `objective` and `optimizer`; returns its step."""
    rest = fabric.load(path, {name: state[name] for name in ("objective", "optimizer")}, weights_only=True)
    return int(rest["step"])


def _read(path: Path) -> dict[str, Any]:
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise DataError(
            f"{path} is not a complete checkpoint ({type(error).__name__}). Delete it to start anew."
        ) from error
    kinds = {"objective": Mapping, "optimizer": Mapping, "recipe": Mapping, "step": int}
    if not isinstance(held, dict) or not all(isinstance(held.get(k), kind) for k, kind in kinds.items()):
        raise DataError(f"{path} is not a checkpoint of vitreg. Move it away to start anew.")
    return held


def _compare(path: Path, held: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    other = [
        f"{name}={held.get(name)} (now {wanted.get(name)})"
        for name in sorted(held.keys() | wanted.keys())
        if name not in _FREE and held.get(name) != wanted.get(name)
    ]
    if other:
        raise DataError(
            f"{path} is of another run: it had {', '.join(other[:5])}. Give the same settings to go on,"
            " or another folder to start anew."
        )


def _check_shapes(path: Path, held: Mapping[str, Any], module: nn.Module) -> None:
    """The recipe's file, or the classes in the data, may make another model of the same settings."""
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    found = {name: tuple(getattr(value, "shape", ())) for name, value in held.items()}
    odd = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if odd:
        name = odd[0]
        raise DataError(
            f"{path} is of another architecture: {len(odd)} tensors differ, such as {name}, which is"
            f" {found.get(name, 'absent')} there and {wanted.get(name, 'absent')} here. Give the recipe that"
            " it was made with, or another folder to start anew."
        )
