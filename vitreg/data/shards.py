"""The photos in a .tar shard, one after another; a shard that is cut off or damaged says so."""

import os
import tarfile
from collections.abc import Iterator
from typing import BinaryIO

from vitreg.data.listing import FailedImage, is_image, printable


class CheckedHeader(tarfile.TarInfo):
    """A member's header. A damaged or missing one, which tarfile takes for the end, is an error here."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "CheckedHeader":
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # two blocks of zeros: a proper end
            raise
        except tarfile.HeaderError as error:
            if not tar.offset:  # no tar at all, which tarfile says better
                raise
            raise tarfile.ReadError(f"it breaks off, or is damaged, at byte {tar.offset}") from error


def why_left_out(member: tarfile.TarInfo) -> str | None:
    """Why a photo in a tar is not read; None for one that is, and for what is no photo."""
    name = os.path.basename(member.name)
    if name.startswith("."):
        return "a hidden file" if is_image(name[1:]) and not name.startswith("._") else None
    return "a link" if is_image(name) and not member.isreg() and not member.isdir() else None


def shard_members(stream: BinaryIO, name: str) -> Iterator[tuple[str, bytes] | FailedImage]:
    """(name/member, bytes) of the photos in a .tar, compressed or not.

    Hidden photos and those that are links to others are a FailedImage. Raises what damaged ones make tarfile
    raise.
    """
    with tarfile.open(fileobj=stream, mode="r|*", tarinfo=CheckedHeader) as tar:
        for member in tar:
            label = printable(f"{name}/{member.name}")
            if why := why_left_out(member):
                yield FailedImage(label, why)
            elif is_image(member.name) and (content := tar.extractfile(member)):
                yield label, content.read()
            tar.members = []  # type: ignore[attr-defined]  # it would keep them all
