"""Photos with captions, from webdataset shards: tar files in which KEY.jpg lies beside KEY.txt.

write_pairs("imagenette/train", "pairs/")         # shards from labelled photos
pairs = ImageTextShards("pairs/")
image, caption, replaced = pairs[7]
"""

import glob
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from vitreg.data.decoding import check_regular, photo_extensions, reason
from vitreg.data.imagenet import wordnet_classes
from vitreg.data.listing import LeftOut, is_shard, notes_on, photos_in, printable, walk, warn_of
from vitreg.data.shards import CheckedHeader, why_left_out
from vitreg.errors import DataError, ImageError, MissingExtraError, OutputError
from vitreg.files import write_atomically
from vitreg.training.data import IN_A_ROW, readable

try:
    from webdataset.shardlists import expand_urls
    from webdataset.tariterators import group_by_keys
    from webdataset.writer import TarWriter
except ImportError as error:
    raise MissingExtraError("webdataset", "train") from error

CAPTIONS = (
    "a photo of a {}.",
    "a picture of the {}",
    "{}",
    "here is a {}, photographed by a friend",
    "a close-up of one {}",
    "the {} that we saw today",
)
_PLACE = np.dtype([("image", "u8"), ("image_size", "u4"), ("text", "u8"), ("text_size", "u4"), ("json", "?")])
Places = np.ndarray[Any, np.dtype[Any]]  # (n,) of _PLACE
Span = tuple[int, int]  # offset and size in bytes


class ImageTextShards(Dataset[tuple[Any, Any, float]]):
    """Image-text pairs of local shards by number: (image, caption, whether it is a replacement, 0 or 1).

    `source`: a folder of .tar files, one of them, a glob, or braces ("laion/{00000..41455}.tar"); several
    with `::` between. Captions are KEY.txt, else "caption" in KEY.json. `transform` takes an RGB PIL image,
    `tokenize` the text.

    All shards are gone through once, here, for the place of each member (25 bytes of memory a pair; kept in a
    hidden file beside the shard). Then any pair can be read by number, so that order, several processes and a
    resume are exact. A stream, which is webdataset's own way, begins anew after an interruption. So shards
    must be local and uncompressed.

    A picture that cannot be decoded is replaced by the pair after it, with a warning that names it, and
    counted (the third value): among millions of pictures from the web some are damaged, which must neither
    end a run of days nor go unseen. Ten in a row are a DataError.

    Raises DataError for what is no whole tar, holds no sample, or has samples without image or caption, or
    with a caption that is not UTF-8.
    """

    def __init__(
        self,
        source: str | Path,
        transform: Callable[[Any], Any] | None = None,
        tokenize: Callable[[str], Any] | None = None,
        window: int = 100_000,
    ) -> None:
        self.transform, self.tokenize, self.window = transform, tokenize, window
        self.shards = find_shards(source)
        indices = [_indexed(shard) for shard in self.shards]
        self.first = np.cumsum([0, *map(len, indices)])  # each shard's first pair, and the end
        self.places = np.concatenate(indices)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[Any, Any, float]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index}: expected 0 to {len(self) - 1}.")
        tries = min(IN_A_ROW, len(self))
        places = ((index + tried) % len(self) for tried in range(tries))
        found = readable(places, lambda i: self._read(i, "image"), self.name)
        if found is None:
            raise DataError(
                f"{tries} pictures in a row cannot be decoded, from {self.name(index)} on."
                " Expected .jpg, .png, .webp, ..."
            )
        i, image = found
        caption = self.caption(i)
        pixels = self.transform(image) if self.transform else image
        return pixels, self.tokenize(caption) if self.tokenize else caption, float(i != index)

    def caption(self, index: int) -> str:
        """The text of a pair."""
        return _caption(self._read(index, "text"), bool(self.places["json"][index]))

    def name(self, index: int) -> str:
        """SHARD/MEMBER of a pair's image."""
        start = int(self.places["image"][index]) - tarfile.BLOCKSIZE  # members follow their header
        header = _read(self._shard(index), (start, tarfile.BLOCKSIZE))
        return f"{self._shard(index)}/{tarfile.TarInfo.frombuf(header, 'utf-8', 'backslashreplace').name}"

    def order(self, generator: torch.Generator) -> list[int]:
        """An epoch: shards in random order, and pairs shuffled among `window` neighbours.

        A full shuffle of a large data set would read every disk block many times over.
        """
        shards = torch.randperm(len(self.shards), generator=generator).tolist()
        line = torch.cat([torch.arange(self.first[shard], self.first[shard + 1]) for shard in shards])
        parts = [part[torch.randperm(len(part), generator=generator)] for part in line.split(self.window)]
        mixed: list[int] = torch.cat(parts).tolist()
        return mixed

    def _shard(self, index: int) -> Path:
        return self.shards[int(np.searchsorted(self.first, index, side="right")) - 1]

    def _read(self, index: int, what: str) -> bytes:
        place = self.places[index]
        return _read(self._shard(index), (int(place[what]), int(place[f"{what}_size"])))


def find_shards(source: str | Path) -> list[Path]:
    """The .tar files of a source, in order (see ImageTextShards). Raises DataError where one is missing."""
    found: list[Path] = []
    try:
        parts = expand_urls(os.path.expanduser(source))
    except ValueError as error:  # braces that do not close
        raise DataError(
            f"{source} is not a list of shards: {reason(error)}. Expected matching braces."
        ) from error
    for text in parts:
        pattern = os.path.join(glob.escape(text), "*.tar") if os.path.isdir(text) else text
        matches = [text] if os.path.isfile(text) else sorted(glob.glob(pattern))
        if not matches:
            raise DataError(
                f"there is no shard {pattern or '(no data was given)'}. Expected a folder of .tar files, a"
                " glob, or braces ('{00000..00012}.tar'). vitreg.training.pairs.write_pairs makes shards."
            )
        found += map(Path, matches)
        if os.path.isdir(text):
            others = sorted({*filter(is_shard, walk(text).paths)} - {*matches})
            why = "a shard that is compressed or in a folder below: name it, or unpack it"
            warn_of(notes_on(LeftOut(printable(path), why) for path in others))
    return found


# -- the index of a shard --------------------------------------------------------------------------


def _indexed(shard: Path) -> Places:
    """The index of a shard, from the file beside it if the shard is still the same."""
    try:
        check_regular(str(shard))
        stat = shard.stat()
    except (OSError, ImageError) as error:
        raise DataError(f"{printable(str(shard))} cannot be read: {reason(error)}.") from error
    place = shard.with_name(f".{shard.stem}-{stat.st_size:x}-{stat.st_mtime_ns:x}.index.npy")
    with suppress(OSError, ValueError):  # not there yet
        kept: Places = np.load(place, allow_pickle=False)
        if kept.dtype == _PLACE:
            return kept
    found = _index(shard)
    content = io.BytesIO()
    np.save(content, found)
    with suppress(OutputError):  # the folder is not ours to write in
        write_atomically(place, content.getvalue())
    return found


def _index(shard: Path) -> Places:
    """Where the image and the caption of each sample lie (n,)."""
    places: list[tuple[int, int, int, int, bool]] = []
    problems: dict[str, list[str]] = {}
    try:
        for sample in group_by_keys(_members(shard)):
            images, text = _images_of(sample), sample.get("txt", sample.get("json"))
            image = images[0] if images else None
            if problem := _problem(shard, images, text, "txt" not in sample):
                problems.setdefault(problem, []).append(sample["__key__"])
            elif image and text:
                places.append((*image, *text, "txt" not in sample))
    except (tarfile.TarError, OSError, ValueError) as error:  # ValueError: the same name twice
        raise DataError(
            f"{shard} is not a complete tar file without compression: {reason(error)}. Get it anew, or unpack"
            " it."
        ) from error
    total = len(places) + sum(map(len, problems.values()))
    if problems:
        found = ", ".join(f"{len(keys)} have {what}" for what, keys in problems.items())
        raise DataError(
            f"{shard}: of {total} samples, {found}; the first is {next(iter(problems.values()))[0]}. Expected"
            ' for each KEY an image (KEY.jpg) and its caption in UTF-8 (KEY.txt, or "caption" in KEY.json).'
        )
    if not places:
        raise DataError(f"{shard} holds no sample. Expected KEY.jpg and KEY.txt for each KEY.")
    return np.array(places, _PLACE)


def _members(shard: Path) -> Iterator[dict[str, Any]]:
    """The files of a tar as webdataset's grouping takes them, with places instead of contents."""
    left_out: list[LeftOut] = []
    with open(shard, "rb") as file, tarfile.open(fileobj=file, mode="r:", tarinfo=CheckedHeader) as tar:
        for member in iter(tar.next, None):
            if why := why_left_out(member):
                left_out.append(LeftOut(printable(f"{shard}/{member.name}"), why))
            elif member.isreg() and not re.search(r"^__[^/]*__($|/)|(^|/)\.[^/]*$", member.name):
                # Neither webdataset's own notes nor what is hidden (a Mac's ._0001.jpg).
                span: Span = (member.offset_data, member.size)
                yield {"fname": member.name, "data": span, "__url__": str(shard)}
            tar.members = []  # type: ignore[attr-defined]  # it would keep them all
    warn_of(notes_on(left_out))


def _images_of(sample: Mapping[str, Any]) -> list[Span]:
    return [sample[name] for name in sample if f".{name}" in photo_extensions()]


def _problem(shard: Path, images: Sequence[Span], text: Span | None, is_json: bool) -> str:
    """What is wrong with a sample, or nothing."""
    if not images or not images[0][1]:
        return "no image"
    if len(images) > 1:
        return "several images"
    try:
        return "" if text and _caption(_read(shard, text), is_json) else "no caption"
    except UnicodeDecodeError:
        return "a caption that is not UTF-8"


def _caption(content: bytes, is_json: bool) -> str:
    """Without space around it; empty where the JSON holds none. Raises UnicodeDecodeError."""
    text = content.decode("utf-8-sig")
    if is_json:
        try:
            text = json.loads(text)["caption"]
        except (ValueError, KeyError, TypeError):
            return ""
    return text.strip() if isinstance(text, str) else ""


def _read(shard: Path, span: Span) -> bytes:
    with open(shard, "rb") as file:
        file.seek(span[0])
        return file.read(span[1])


# -- shards from labelled photos -------------------------------------------------------------------


def write_pairs(
    photos: str | Path, out: str | Path, templates: Sequence[str] = CAPTIONS, per_shard: int = 1000
) -> list[Path]:
    """Make shards of a folder with a folder of photos for each class; returns their paths.

    Captions are the `templates` in turn, with the class's name for {}. Photos are shuffled, always in the
    same way, and copied as they are. Raises DataError where there are none, OutputError for what cannot be
    written.
    """
    root, folder = Path(photos), Path(out)
    paths = photos_in(root)
    if loose := [path for path in paths if path.parent == root]:
        raise DataError(f"{loose[0]} lies in no class's folder. Expected {root}/CLASS/photo.jpg.")
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(0)).tolist()
    shards = [folder / f"{shard:05d}.tar" for shard in range(-(-len(paths) // per_shard))]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for shard, start in zip(shards, range(0, len(order), per_shard), strict=True):
            # Not by its name, which webdataset would take for a URL (C:\shards).
            with open(shard, "wb") as file, TarWriter(file, mtime=0) as writer:
                for i, place in enumerate(order[start : start + per_shard], start):
                    path = paths[place]
                    name = class_name(path.relative_to(root).parts[0])
                    caption = templates[i % len(templates)].format(name)
                    image = path.suffix.lower().lstrip(".")
                    writer.write({"__key__": f"{i:08d}", image: path.read_bytes(), "txt": caption})
    except OSError as error:
        raise OutputError(f"cannot write shards into {folder}: {error.strerror}.") from error
    return shards


def class_name(folder: str) -> str:
    """What a class's folder is called in English: CLIP's name for an ImageNet id, else the folder's own."""
    known = wordnet_classes(1000)
    if folder in known:
        from open_clip import IMAGENET_CLASSNAMES

        return str(IMAGENET_CLASSNAMES[known[folder]])
    return re.sub(r"[_\s-]+", " ", folder).strip()
