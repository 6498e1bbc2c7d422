"""Results reach the disk whole or not at all.

    check_writable("report.html")               # before long work, so that none of it is lost
    write_atomically("report.html", page)

Both raise OutputError, which says what is in the way.
"""

import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vitreg.errors import OutputError

FIGURES = (".png", ".pdf", ".svg")  # what figures are written as


def write_atomically(path: str | Path, content: str | bytes) -> Path:
    """Write `content` (text as UTF-8) under another name in the same folder, then rename. Returns the path.

    Readers see the old file or the new one, never a part; when the disk fills up, the old one stays. What is
    no regular file (/dev/stdout, a named pipe) cannot be replaced and is written to directly. Raises
    OutputError, and leaves nothing behind.
    """
    target = Path(path)
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    with _explained(target):
        if _is_special(target):
            target.write_bytes(data)
        else:
            _replace(Path(os.path.realpath(target)), data)
    return target


def check_writable(path: str | Path, *, overwrite: bool = True) -> None:
    """Raise the OutputError that write_atomically would raise now. Changes nothing, however it ends.

    Without `overwrite`, a file that exists is one, too.
    """
    target = Path(path)
    if not overwrite and target.is_file():
        raise already_there(target)
    with _explained(target):
        if not _is_special(target):
            partial = _name_beside(Path(os.path.realpath(target)))
            partial.touch(exist_ok=False)
            partial.unlink()


def already_there(target: Path) -> OutputError:
    """What is said of a result that would replace another one."""
    return OutputError(f"{target} exists already. Add --overwrite to replace it, or choose another name.")


def _is_special(target: Path) -> bool:
    """Whether the target is neither a file nor a place for one. Raises OSError if it forbids writing."""
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return False
    if stat.S_ISDIR(mode):
        raise IsADirectoryError
    if not os.access(target, os.W_OK):  # a rename would get around it
        raise PermissionError(0, "the file there is write-protected")
    return not stat.S_ISREG(mode)


def _name_beside(target: Path) -> Path:
    return target.with_name(f".vitreg-{secrets.token_hex(8)}.tmp")


def _replace(target: Path, data: bytes) -> None:
    partial = _name_beside(target)
    try:
        with open(partial, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileNotFoundError):
            shutil.copymode(target, partial)
        os.replace(partial, target)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    try:
        yield
    except IsADirectoryError as error:
        raise OutputError(f"{target} is a folder, but expected the name of a file. Add one to it.") from error
    except FileNotFoundError as error:
        folder = f"there is no folder {target.absolute().parent}"
        raise OutputError(f"cannot write {target}: {folder}. Create it, or choose another place.") from error
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        advice = "Choose another place, or see to space and permissions there"
        raise OutputError(f"cannot write {target}: {reason}. {advice}.") from error
