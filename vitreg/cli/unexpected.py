"""What the command line says of an error that vitreg did not raise on purpose: one line, no traceback."""

import tempfile
import traceback

import torch

USAGE, FAILED, BUG = 2, 1, 3


def explained(error: Exception) -> tuple[str, int]:
    """One line for the user, and the exit code: 2 for a wrong value, 1 for what the machine refused, 3 for a
    bug, whose traceback is kept in a file."""
    line = " ".join(str(error).split())[:300]
    if isinstance(error, ValueError) and _raised_here(
        error
    ):  # a value that a user gave, as Python's API says it
        return line, USAGE
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return f"out of memory ({line}). Use a smaller --batch-size, --size or --dtype bfloat16.", FAILED
    if isinstance(error, OSError) and error.strerror:
        where = f" {error.filename}" if error.filename else ""
        return f"{error.strerror}:{where or ' no file was named'}.", FAILED
    what = f"{type(error).__name__}: {line or 'no message'}"
    return (
        f"unexpected error, a bug of vitreg or of a library that it calls: {what}.{_traceback_kept(error)}"
        " Please report it, with the output of vitreg doctor MODEL.",
        BUG,
    )


def _raised_here(error: Exception) -> bool:
    """Whether vitreg's own code raised an error, and not a library that it calls."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return bool(frames) and str(frames[-1][0].f_globals.get("__name__", "")).partition(".")[0] == "vitreg"


def _traceback_kept(error: Exception) -> str:
    text = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="vitreg-error-", suffix=".txt", delete=False, encoding="utf-8"
        ) as file:
            file.write(text)
    except OSError:
        return ""
    return f" The traceback is in {file.name}."
