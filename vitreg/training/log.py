"""The log of a run: one JSON object a line, which a resumed run goes on from."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vitreg.errors import DataError, MissingExtraError, OutputError
from vitreg.files import write_atomically

NAME = "log.jsonl"


class Log:
    """Appends lines to log.jsonl and, if asked, to TensorBoard. Only the first process has one."""

    def __init__(self, folder: Path, step: int, tensorboard: bool = False) -> None:
        self.path = folder / NAME
        # What was logged after the checkpoint will be logged again.
        kept = [line for line in read_log(self.path) if line["step"] <= step] if step else []
        write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._board = _board(folder, step) if tensorboard else None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line: the step and values, rounded to six digits; null for what is not finite."""
        line = {"step": step} | {
            name: float(f"{value:.6g}") if math.isfinite(value) else None for name, value in values.items()
        }
        try:
            with open(self.path, "a", encoding="utf-8", newline="\n") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror}. See to space there.") from error
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a log, of a run's folder or of the file. A last line that was cut off is left out.

    Raises DataError for a damaged line.
    """
    file = Path(path) / NAME if Path(path).is_dir() else Path(path)
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    try:
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except ValueError as error:
        raise DataError(f"{file} has a line that is not JSON: {error}. Take it out.") from error


def _board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtraError("tensorboard", "train") from error
    return SummaryWriter(str(folder), purge_step=step + 1)
