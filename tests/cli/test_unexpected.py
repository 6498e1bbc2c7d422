"""No traceback reaches the command line, whatever is raised, and the exit code says whose fault it is."""

import errno
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import vitreg
from vitreg.cli.unexpected import BUG, FAILED, USAGE
from vitreg.fixes import TestTimeRegisters


def our_value() -> None:
    TestTimeRegisters({}, registers=-1)


def their_value() -> None:
    torch.zeros(2).unflatten(0, ())
    int("x")


def disk() -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "page.json")


def memory() -> None:
    raise torch.OutOfMemoryError("tried to allocate\n8 GiB")


def key() -> None:
    {}["nothing"]


def silent() -> None:
    raise RuntimeError


def endless() -> None:
    endless()


RAISED: dict[str, tuple[Callable[[], None], int, str]] = {
    "a value that our own code refuses": (our_value, USAGE, "registers=-1, entry=0, scale=1.0: expected"),
    "a value that a library refuses": (their_value, BUG, "RuntimeError: "),
    "a full disk": (disk, FAILED, "No space left on device: page.json."),
    "no memory": (memory, FAILED, "out of memory (tried to allocate 8 GiB). Use a smaller --batch-size"),
    "a bug": (key, BUG, "a bug of vitreg or of a library that it calls: KeyError: 'nothing'"),
    "an error without words": (silent, BUG, "RuntimeError: no message."),
    "no end": (lambda: endless(), BUG, "RecursionError"),
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", RAISED)
def test_one_line_and_the_right_exit_code(run, monkeypatch, folder, name):
    explode, code, words = RAISED[name]
    monkeypatch.setattr(vitreg, "doctor", lambda *args, **options: explode())
    found, out, err = run("doctor", "timm:test_vit")
    assert found == code
    assert out == ""
    (line,) = [line for line in err.splitlines() if line.strip()]
    assert line.startswith("vitreg: ")
    assert words in line
    files = list(folder.glob("vitreg-error-*.txt"))
    assert len(files) == (code == BUG)
    if files:
        assert re.search(r"The traceback is in (\S+)\. Please report it", line)[1] == str(files[0])
        assert "explode()" in files[0].read_text()


def test_where_no_file_can_be_written_the_line_is_there_all_the_same(run, monkeypatch, folder):
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "nowhere"))
    monkeypatch.setattr(vitreg, "doctor", lambda *args, **options: key())
    code, _, err = run("doctor", "timm:test_vit")
    assert code == BUG
    assert "KeyError: 'nothing'. Please report it" in err
