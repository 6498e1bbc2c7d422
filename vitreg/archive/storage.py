"""A folder, local or wherever fsspec reaches: s3://, gs://, hf://, memory://.

    place = Place.at("s3://bucket/features")
    place.write("done/000001.json", b"{}")     # whole or not at all
    place.read("done/000001.json")

Every error is one of ours, in one line.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitreg.data.decoding import check_regular, reason
from vitreg.errors import DataError, MissingExtraError, OutputError
from vitreg.files import check_writable, write_atomically


@dataclass(frozen=True)
class Storage:
    """`path` is `url` without its protocol, as the file system `fs` takes it."""

    url: str
    fs: Any
    path: str

    @staticmethod
    def at(url: str | os.PathLike[str]) -> "Storage":
        """Raises DataError for a protocol that is unknown or whose driver is not installed."""
        try:
            from fsspec.core import url_to_fs
        except ImportError as error:
            raise MissingExtraError("fsspec", "ray") from error
        text = os.path.expanduser(os.fspath(url))
        try:
            fs, path = url_to_fs(text)
        except ImportError as error:  # fsspec knows which package it is, and says so
            raise DataError(f"{text} cannot be reached: {' '.join(str(error).split())}.") from error
        except Exception as error:  # a driver's own
            raise DataError(
                f"{text} cannot be reached: {reason(error)}. Expected a path or a URL."
            ) from error
        return Storage(text, fs, path.rstrip("/") or "/")

    @property
    def is_local(self) -> bool:
        return "file" in ([self.fs.protocol] if isinstance(self.fs.protocol, str) else self.fs.protocol)

    def child(self, name: str) -> str:
        """The full path of a name in this folder."""
        return f"{self.path.rstrip('/')}/{name}" if name else self.path

    def open(self, name: str) -> Any:
        if self.is_local:
            check_regular(self.child(name))
        return self.fs.open(self.child(name), "rb")

    def read(self, name: str) -> bytes:
        content: bytes = self.fs.cat_file(self.child(name))
        return content

    def read_all(self, names: list[str], at_once: int = 500) -> Iterator[bytes]:
        """Files in this order; of remote ones many are fetched at a time."""
        for start in range(0, len(names), at_once):
            paths = [self.child(name) for name in names[start : start + at_once]]
            found = self.fs.cat(paths) if len(paths) > 1 else {paths[0]: self.fs.cat_file(paths[0])}
            yield from (found[path] for path in paths)

    def has(self, name: str) -> bool:
        return bool(self.fs.exists(self.child(name)))

    def names(self, folder: str = "") -> list[str]:
        """Names of the files in a subfolder, sorted; none if there is no such folder."""
        self.fs.invalidate_cache()  # of listings: others write here
        try:
            found = self.fs.ls(self.child(folder), detail=False)
        except FileNotFoundError:
            return []
        return sorted(str(path).rstrip("/").rpartition("/")[2] for path in found)

    def make(self, *folders: str) -> None:
        """Create the place and subfolders of it. Raises OutputError where nothing can be written."""
        with self._explained(""):
            for folder in ("", *folders):
                self.fs.makedirs(self.child(folder), exist_ok=True)
        if self.is_local:
            check_writable(self.child(".writable"))
        else:
            with self._explained(".writable"):
                self.fs.pipe_file(self.child(".writable"), b"")
                self.fs.rm_file(self.child(".writable"))

    def write(self, name: str, content: bytes) -> None:
        """Whole or not at all: by renaming on a disk, and object stores know nothing else. OutputError."""
        if self.is_local:
            write_atomically(self.child(name), content)
            return
        with self._explained(name):
            self.fs.pipe_file(self.child(name), content)

    def remove(self, name: str) -> None:
        """Delete a file, if it is there."""
        with suppress(FileNotFoundError):
            self.fs.rm_file(self.child(name))

    def remove_partial(self, folder: str = "") -> None:
        """Delete what writers that were killed have left in a local folder."""
        if self.is_local:
            for path in Path(self.child(folder)).glob(".vitreg-*.tmp"):
                path.unlink(missing_ok=True)

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # each driver has its own
            where = f"{self.url.rstrip('/')}/{name}".rstrip("/")
            advice = "Choose another place, or see to space and permissions there"
            raise OutputError(f"cannot write {where}: {reason(error)}. {advice}.") from error
