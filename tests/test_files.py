"""Files that are written whole or not at all."""

import errno
import os
import stat
import threading
from pathlib import Path

import pytest

from vitreg.errors import OutputError
from vitreg.files import check_writable, write_atomically


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("content", "stored"), [("é\n", b"\xc3\xa9\n"), (b"\x00\xff", b"\x00\xff"), ("\udc80", rb"\udc80")]
)
def test_writes_text_as_utf_8_and_bytes_as_they_are(tmp_path, content, stored):
    path = tmp_path / "out"
    assert write_atomically(path, content) == path
    assert path.read_bytes() == stored
    assert names(tmp_path) == ["out"]


def test_accepts_a_string_and_a_name_as_long_as_the_system_allows(tmp_path):
    path = tmp_path / ("x" * 255)
    assert write_atomically(str(path), "a") == path
    assert path.read_text() == "a"


def test_a_new_file_has_the_usual_permissions(tmp_path):
    usual = tmp_path / "usual"
    usual.touch()
    assert write_atomically(tmp_path / "out", "a").stat().st_mode == usual.stat().st_mode


def test_replaces_a_file_and_keeps_its_permissions(tmp_path):
    path = tmp_path / "out"
    path.write_text("old")
    path.chmod(0o640)
    write_atomically(path, "new")
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_link_stays_a_link(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("old")
    link.symlink_to(real)
    write_atomically(link, "new")
    assert link.is_symlink()
    assert real.read_text() == "new"


def test_writes_into_a_pipe_instead_of_replacing_it(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()), daemon=True)
    reader.start()
    write_atomically(pipe, "text")
    reader.join(10)
    assert got == [b"text"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


@pytest.mark.parametrize("attempt", [lambda path: write_atomically(path, "a"), check_writable])
class TestRefusals:
    def test_missing_folder(self, tmp_path, attempt):
        with pytest.raises(
            OutputError, match=r"there is no folder .*gone\. Create it, or choose another place"
        ):
            attempt(tmp_path / "gone" / "out")
        assert names(tmp_path) == []

    def test_target_is_a_folder(self, tmp_path, attempt):
        with pytest.raises(OutputError, match="is a folder, but expected the name of a file"):
            attempt(tmp_path)
        assert names(tmp_path) == []

    def test_folder_is_a_file(self, tmp_path, attempt):
        (tmp_path / "file").write_text("old")
        with pytest.raises(OutputError, match=r"cannot write .*: Not a directory\. Choose another place"):
            attempt(tmp_path / "file" / "out")
        assert names(tmp_path) == ["file"]

    def test_file_is_write_protected(self, tmp_path, attempt, monkeypatch):
        path = tmp_path / "out"
        path.write_text("old")
        monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
        with pytest.raises(OutputError, match="the file there is write-protected"):
            attempt(path)
        assert path.read_text() == "old"

    def test_null_byte(self, tmp_path, attempt):
        with pytest.raises(OutputError, match="null"):
            attempt(tmp_path / "a\0b")


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_whole(tmp_path, monkeypatch, step):
    path = tmp_path / "out"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OutputError, match=r"No space left on device\. .*see to space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_an_interrupt_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "out", "new")
    assert names(tmp_path) == []


def test_check_writable_changes_nothing(tmp_path):
    path = tmp_path / "out"
    check_writable(path)
    assert names(tmp_path) == []
    path.write_text("old")
    check_writable(path)
    assert path.read_text() == "old"
