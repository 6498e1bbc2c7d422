"""The data sets of mutated_folders.py: each format's small folder, its reader, and what must be true of both.

A format is a class. `build` writes a sound folder; `spec` holds what its lists, XML and JSON say, so that it
can be mutated before it is written. `read` runs the reader and returns an Account.
"""

import io
import json
import random
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vitreg.archive.sources import find_archive, items
from vitreg.data.datasets import boxes, classes, depth_pairs, foreground, masks
from vitreg.data.images import read_images
from vitreg.data.listing import FailedImage, photos_in, printable
from vitreg.errors import VitregError
from vitreg.training.data import TrainingPhotos
from vitreg.training.pairs import ImageTextShards

HEIGHT, WIDTH = 6, 8
NAMES = ("a", "b b", "c", "d.1", "é", "f")
WORDNET = ("n01440764", "n01443537", "n02102040")  # 0, 1, 217


@dataclass
class Account:
    """What a reader made of a folder: the photos that it gives, all that it says, and what is not so.

    `roots` are the folders whose photos must be read or named; `members` the photos in shards.
    """

    read: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    roots: list[Path] = field(default_factory=list)
    members: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def expect(self, true: bool, what: str) -> None:
        if not true:
            self.wrong.append(what)


def photo(path: Path, number: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(number))


def picture(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (WIDTH, HEIGHT), (number, 100, 200)).save(file, "png")
    return file.getvalue()


def save(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def small(image: Image.Image) -> torch.Tensor:
    return torch.zeros(3, 4, 4)


class Format:
    """A data set's layout. `texts` are its files of text by name, whose content is made from `spec`."""

    spec: Any = None

    def build(self, root: Path, rng: random.Random) -> None:
        raise NotImplementedError

    def texts(self, root: Path) -> dict[Path, str]:
        """Written after `spec` has been mutated, in whatever encoding."""
        return {}

    def read(self, root: Path) -> Account:
        raise NotImplementedError


# -- photos ------------------------------------------------------------------------------------------


class Folder(Format):
    """A tree of photos, by read_images."""

    def build(self, root: Path, rng: random.Random) -> None:
        for i, name in enumerate(NAMES):
            photo(root / rng.choice(("", "x", "x/y")) / f"{name}.png", i)

    def read(self, root: Path) -> Account:
        return read_with(root, [root])


def read_with(source: Any, roots: list[Path], members: list[str] | None = None) -> Account:
    account = Account(roots=roots, members=members or [])
    images = read_images(source, small, workers=0)
    try:
        for batch in images:
            account.read += batch.names
    finally:
        account.said += [f"{failed.path}: {failed.reason}" for failed in images.failed]
    return account


class TextList(Folder):
    """A list of photos in a text file, by read_images."""

    def build(self, root: Path, rng: random.Random) -> None:
        super().build(root, rng)
        self.spec = [str(path.relative_to(root)) for path in sorted(root.rglob("*.png"))]

    def texts(self, root: Path) -> dict[Path, str]:
        return {root / "list.txt": "\n".join(map(str, self.spec))}

    def read(self, root: Path) -> Account:
        account = read_with(root / "list.txt", [])
        listed = [line for line in map(str, self.spec) if line.strip() and not line.strip().startswith("#")]
        given = len(account.read) + len(account.said)
        account.expect(given == len(listed), f"{len(listed)} photos are listed, {given} are accounted for")
        return account


class Training(Folder):
    """A tree of photos, by the data set that models are trained on."""

    def read(self, root: Path) -> Account:
        paths = photos_in(root)
        data = TrainingPhotos(paths, small)
        for i in range(len(data)):
            data[i]  # a damaged one is replaced, and named in a warning
        return Account(read=list(map(str, paths)), roots=[root])


class Shards(Format):
    """Two .tar shards, by read_images."""

    def build(self, root: Path, rng: random.Random) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.spec = {
            f"{shard}.tar": [[f"{shard}{i}.{kind}", i, "file"] for i in range(3) for kind in ("png", "txt")]
            for shard in range(2)
        }

    def write(self, root: Path) -> None:
        for name, members in self.spec.items() if isinstance(self.spec, dict) else ():
            with tarfile.open(root / name, "w") as tar:
                for member in members if isinstance(members, list) else ():
                    add_member(tar, member)

    def members(self, root: Path) -> list[str]:
        """The photos in shards that are as they were written."""
        return [
            printable(f"{root / name}/{member[0]}")
            for name, members in self.spec.items()
            for member in members
            if member[0].endswith("png") and not Path(member[0]).name.startswith("._")
        ]

    def read(self, root: Path) -> Account:
        return read_with(root, [], self.members(root))


def add_member(tar: tarfile.TarFile, member: list[Any]) -> None:
    name, number, kind = member
    info = tarfile.TarInfo(name)
    if kind != "file":
        info.type, info.linkname = (tarfile.LNKTYPE if kind == "link" else tarfile.SYMTYPE), "00.png"
        tar.addfile(info)
        return
    content = picture(number) if name.endswith("png") else f"picture {number}".encode()
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


class Pairs(Shards):
    """The same, by the reader of image-text pairs."""

    def read(self, root: Path) -> Account:
        pairs = ImageTextShards(root)
        account = Account(members=self.members(root))
        for i in range(len(pairs)):
            image, caption, replaced = pairs[i]
            account.read.append(printable(pairs.name(i)))
            shown = image.getpixel((0, 0))[0]
            right = caption == f"picture {shown}" or bool(replaced)
            account.expect(right, f"{pairs.name(i)} shows {shown}, but its caption is {caption!r}")
        return account


class Archive(Folder):
    """A tree of photos, by the reader of archives."""

    def read(self, root: Path) -> Account:
        account, found = Account(roots=[root]), find_archive(str(root))
        for shard in found.shards(4):
            for item in items(found.place, found.kind, shard):
                if isinstance(item, FailedImage):
                    account.said.append(f"{item.path}: {item.reason}")
                else:
                    account.read.append(f"{root}/{item[0]}")
        return account


# -- classes -----------------------------------------------------------------------------------------


class WordNet(Format):
    """A folder for each of ImageNet's classes."""

    folders: tuple[str, ...] = WORDNET

    def build(self, root: Path, rng: random.Random) -> None:
        for i, folder in enumerate(self.folders):
            for name in rng.sample(NAMES, 2):
                photo(root / folder / f"{name}.png", i)

    def label(self, folder: str) -> int | None:
        return {"n01440764": 0, "n01443537": 1, "n02102040": 217}.get(folder)

    def read(self, root: Path) -> Account:
        found = classes.by_wordnet(root, 1000)
        account = Account(list(map(str, found.paths)), list(found.notes), [root])
        for path, label in zip(found.paths, found.labels, strict=True):
            known = self.label(path.parent.name)
            account.expect(known in (None, label), f"{path} is of class {known}, but {label} was read")
        return account


class Numbers(WordNet):
    """Folders 0, 2 and 10 of ImageNet."""

    folders = ("0", "2", "10")

    def label(self, folder: str) -> int | None:
        return int(folder) if folder in self.folders else None


class English(WordNet):
    """Folders with English names."""

    folders = ("tench", "gold-fish", "english_springer")

    def build(self, root: Path, rng: random.Random) -> None:
        self.folders = ("tench", rng.choice(("goldfish", "Goldfish")), "English_springer")
        super().build(root, rng)

    def label(self, folder: str) -> int | None:
        return {"tench": 0, "goldfish": 1, "english_springer": 217}.get(folder.lower())


class Splits(Format):
    """train/ and val/ with the same classes."""

    def build(self, root: Path, rng: random.Random) -> None:
        for split in ("train", "val"):
            for folder in (
                ("9", "10", "cat")[: rng.choice((2, 3))] if split == "never" else ("9", "10", "cat")
            ):
                photo(root / split / folder / f"{rng.choice(NAMES)}.png")

    def read(self, root: Path) -> Account:
        account = Account(roots=[root / "train", root / "val"])
        train, val = classes.splits(root)
        account.expect(train.classes == val.classes, "classes differ")
        for part in (train, val):
            account.read += map(str, part.paths)
            account.said += part.notes
            for path, label in zip(part.paths, part.labels, strict=True):
                right = part.classes[label] in path.parts
                account.expect(right, f"{path} is said to be of {part.classes[label]}")
        return account


# -- masks and depth ---------------------------------------------------------------------------------


class MaskFolder(Format):
    """images/ and masks/."""

    present: tuple[int, ...] = (0, 1, 2, 255)
    photos, targets = "images", "masks"

    def ids(self, i: int) -> np.ndarray:
        return np.roll(np.resize(np.array(self.present, np.uint8), (HEIGHT, WIDTH)), i)

    def expected(self, ids: np.ndarray) -> np.ndarray:
        return np.where(ids == 255, -1, ids.astype(int))

    def places(self, root: Path) -> Iterator[tuple[Path, Path]]:
        for name in NAMES[:3]:
            yield root / self.photos / f"{name}.png", root / self.targets / f"{name}.png"

    def build(self, root: Path, rng: random.Random) -> None:
        self.written: dict[Path, tuple[bytes, np.ndarray]] = {}
        for i, (image, mask) in enumerate(self.places(root)):
            photo(image, i)
            save(mask, self.ids(i))
            self.written[mask] = mask.read_bytes(), self.ids(i)

    def read(self, root: Path) -> Account:
        train, val = masks.train_and_val(root)
        account = Account(roots=self.folders(root))
        for part in (train, val):
            for i in range(len(part or ())):
                assert part is not None
                account.read += [str(part.paths[i]), str(part.masks[i])]
                self.check(account, part.masks[i], part.mask(i))
            account.said += part.notes if part else ()
        return account

    def folders(self, root: Path) -> list[Path]:
        return [root / self.photos, root / self.targets]

    def check(self, account: Account, path: Path, found: np.ndarray) -> None:
        content, ids = self.written.get(path, (b"", None))
        if ids is not None and path.is_file() and path.read_bytes() == content:
            account.expect(bool((found == self.expected(ids)).all()), f"{path} was read as other ids")


class Binary(MaskFolder):
    """Masks of 0 and 255."""

    present = (0, 255, 255)

    def expected(self, ids: np.ndarray) -> np.ndarray:
        return (ids == 255).astype(int)


class Mmseg(MaskFolder):
    """images/ and annotations/, with training/ and validation/."""

    prefix = ""

    def places(self, root: Path) -> Iterator[tuple[Path, Path]]:
        for split in ("training", "validation"):
            for name in NAMES[:2]:
                names = f"{split}/{self.prefix}{name}.png"
                yield root / "images" / names, root / "annotations" / names

    def folders(self, root: Path) -> list[Path]:
        return [
            root / kind / split for kind in ("images", "annotations") for split in ("training", "validation")
        ]


class Ade(Mmseg):
    """The same, with ADE20k's names."""

    prefix, present = "ADE_", (0, 1, 150)

    def expected(self, ids: np.ndarray) -> np.ndarray:
        return ids.astype(int) - 1


class VocMasks(MaskFolder):
    """VOC's lists of photos with masks."""

    present = (0, 15, 20, 255)
    photos, targets = "JPEGImages", "SegmentationClass"

    def build(self, root: Path, rng: random.Random) -> None:
        super().build(root, rng)
        self.spec = ["a", "b", "c"]
        for old in (root / "JPEGImages/b b.png", root / "SegmentationClass/b b.png"):
            new = old.with_name("b.png")
            old.rename(new)
            if old in self.written:
                self.written[new] = self.written.pop(old)

    def texts(self, root: Path) -> dict[Path, str]:
        return {root / "ImageSets/Segmentation/trainval.txt": "\n".join(map(str, self.spec))}

    def folders(self, root: Path) -> list[Path]:
        return []

    def read(self, root: Path) -> Account:
        account = super().read(root)
        lines = [line for line in map(str, self.spec) if line.strip()]
        given = len(account.read) // 2 + listed_notes(account.said)
        account.expect(given == len(lines), f"{len(lines)} lines, {given} accounted for")
        return account


def listed_notes(said: list[str]) -> int:
    """How many lines of a list the notes leave out."""
    return sum(int(note.split()[0]) for note in said if "(listed before)" in note or "(marked -1" in note)


class Depth(MaskFolder):
    """images/ and depth/."""

    targets = "depth"

    def ids(self, i: int) -> np.ndarray:
        return np.full((HEIGHT, WIDTH), 1000 + i, np.uint16)

    def expected(self, ids: np.ndarray) -> np.ndarray:
        return ids

    def read(self, root: Path) -> Account:
        _, pairs = depth_pairs.train_and_val(root)
        account = Account(list(map(str, pairs.paths + pairs.depths)), list(pairs.notes), self.folders(root))
        for i, path in enumerate(pairs.depths):
            self.check(account, path, pairs.depth(i))
        return account


class Nyu(Format):
    """NYUd's two lists."""

    def build(self, root: Path, rng: random.Random) -> None:
        for i in range(3):
            photo(root / f"s/{i}.png", i)
            save(root / f"s/d{i}.png", np.full((HEIGHT, WIDTH), 1000 + i, np.uint16))
        self.spec = {"train": ["/s/0.png s/d0.png 518.8", "s/1.png s/d1.png"], "test": ["s/2.png s/d2.png"]}

    def texts(self, root: Path) -> dict[Path, str]:
        spec = self.spec if isinstance(self.spec, dict) else {}
        return {
            root / f"nyu_{split}.txt": "\n".join(map(str, lines if isinstance(lines, list) else [lines]))
            for split, lines in spec.items()
        }

    def read(self, root: Path) -> Account:
        account = Account()
        for split in ("train", "test"):
            found = depth_pairs.nyu(root, split)
            lines = [line for line in map(str, self.spec[split]) if line.strip()]
            given = len(found) + len(found.left_out)
            account.expect(given == len(lines), f"{len(lines)} lines, {given} accounted for")
            for path, depth in zip(found.paths, found.depths, strict=True):
                account.expect(depth.name == f"d{path.name}", f"{path} goes with {depth}")
        return account


class Mat(Format):
    """ImageNet-Segmentation's one file."""

    def build(self, root: Path, rng: random.Random) -> None:
        import h5py

        root.mkdir(parents=True, exist_ok=True)
        self.photos = 2
        with h5py.File(root / "x.mat", "w") as file:
            file.create_group("value")
            for name, shape in (("img", (3, WIDTH, HEIGHT)), ("gt", (WIDTH, HEIGHT))):
                cells = file.create_dataset(f"value/{name}", (2, 1), h5py.ref_dtype)
                for i in range(2):
                    values = file.create_dataset(
                        f"#{name}{i}", data=np.arange(np.prod(shape)).reshape(shape) % 2
                    )
                    target = values
                    if name == "gt":
                        target = file.create_dataset(f"#cell{i}", (1, 1), h5py.ref_dtype)
                        target[0, 0] = values.ref
                    cells[i, 0] = target.ref

    def read(self, root: Path) -> Account:
        account = Account()
        with foreground.foreground(root / "x.mat") as found:
            account.expect(len(found) == self.photos, f"{len(found)} photos of {self.photos}")
            for i in range(len(found)):
                found.mask(i)
        return account


# -- boxes -------------------------------------------------------------------------------------------


class Coco(Format):
    """COCO's JSON."""

    def build(self, root: Path, rng: random.Random) -> None:
        names = [f"{name}.png" for name in NAMES[:4]]
        for i, name in enumerate(names):
            photo(root / "train2014" / name, i)
        sizes = {"height": HEIGHT, "width": WIDTH}
        images = [{"id": i, "file_name": name, **sizes} for i, name in enumerate(names)]
        annotations = [
            {"id": i, "image_id": i % 3, "bbox": [i % 4, 1, 2, 2.5], "iscrowd": int(i == 5), "category_id": 1}
            for i in range(6)
        ]
        self.spec = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "x"}]}

    def texts(self, root: Path) -> dict[Path, str]:
        return {root / "annotations/instances_train2014.json": json.dumps(self.spec, ensure_ascii=False)}

    def read(self, root: Path) -> Account:
        found = boxes.boxed_photos(root)
        account = Account(list(map(str, found.paths)), list(found.notes), [root / "train2014"])
        left_out = [one.path for one in found.left_out]
        boxed = sum(map(len, found.boxes)) + sum(", annotation " in one for one in left_out)
        unsized = sum("size" in one.reason for one in found.left_out)
        total = len(self.spec["annotations"])
        account.expect(boxed == total or unsized > 0, f"{total} annotations, {boxed} accounted for")
        self.check_boxes(account, found)
        return account

    def check_boxes(self, account: Account, found: boxes.Boxed) -> None:
        """Boxes that are sound are those of their photo."""
        names = {
            x["id"]: x["file_name"] for x in self.spec["images"] if isinstance(x, dict) and sound_image(x)
        }
        known = dict(zip((path.name for path in found.paths), found.boxes, strict=True))
        for one in self.spec["annotations"]:
            if not isinstance(one, dict) or not sound_annotation(one) or one["image_id"] not in names:
                continue
            left, top, width, height = one["bbox"]
            rows = known.get(names[one["image_id"]], torch.zeros(0, 4)).tolist()
            box = [left, top, left + width, top + height]
            account.expect(box in rows, f"the box {box} of {names[one['image_id']]} is missing: {rows}")


def sound_image(image: dict[str, Any]) -> bool:
    sizes = image.get("height"), image.get("width")
    return (
        isinstance(image.get("id"), int)
        and isinstance(image.get("file_name"), str)
        and sizes == (HEIGHT, WIDTH)
    )


def sound_annotation(one: dict[str, Any]) -> bool:
    bbox = one.get("bbox")
    return (
        isinstance(one.get("image_id"), int)
        and one.get("iscrowd") == 0
        and isinstance(bbox, list)
        and len(bbox) == 4
        and all(isinstance(x, int | float) and not isinstance(x, bool) and 0 <= x <= 3 for x in bbox)
        and min(bbox[2:]) > 0
    )


class VocBoxes(Format):
    """VOC's XML."""

    def build(self, root: Path, rng: random.Random) -> None:
        for i, name in enumerate("abc"):
            photo(root / f"JPEGImages/{name}.png", i)
        one = {"name": "cat", "bndbox": {"xmin": 1, "ymin": 2, "xmax": 4, "ymax": 5}}
        size = {"width": WIDTH, "height": HEIGHT, "depth": 3}
        self.spec = {
            "list": ["a", "b", "c"],
            "xml": {
                name: {"size": dict(size), "object": [json.loads(json.dumps(one))] * 2} for name in "abc"
            },
        }
        self.spec = json.loads(json.dumps(self.spec))

    def texts(self, root: Path) -> dict[Path, str]:
        lists = "\n".join(map(str, self.spec["list"]))
        xmls = {
            root / f"Annotations/{name}.xml": f"<annotation>{as_xml(spec)}</annotation>"
            for name, spec in self.spec["xml"].items()
        }
        return {root / "ImageSets/Main/trainval.txt": lists, **xmls}

    def read(self, root: Path) -> Account:
        found = boxes.boxed_photos(root)
        account = Account(list(map(str, found.paths)), list(found.notes))
        lines = [line for line in map(str, self.spec["list"]) if line.strip()]
        photos = sum(Path(one.path).parent.name == "JPEGImages" for one in found.left_out)
        given = len(found.paths) + photos + listed_notes(account.said)
        account.expect(given == len(lines), f"{len(lines)} lines, {given} accounted for")
        named = {path.stem for path in found.paths}
        objects = sum(as_xml(self.spec["xml"][name]).count("<object>") for name in named)
        left_out = sum(
            ", object " in x.path and Path(x.path.split(".xml")[0]).name in named for x in found.left_out
        )
        boxed = sum(map(len, found.boxes)) + left_out
        account.expect(boxed == objects, f"{objects} objects, {boxed} accounted for")
        return account


def as_xml(value: Any) -> str:
    if isinstance(value, dict):
        return "".join(
            "".join(f"<{name}>{as_xml(one)}</{name}>" for one in (part if isinstance(part, list) else [part]))
            for name, part in value.items()
        )
    return "" if value is None else str(value).replace("<", "&lt;")


FORMATS: tuple[Callable[[], Format], ...] = (
    Folder, TextList, Training, Shards, Pairs, Archive, WordNet, Numbers, English, Splits, MaskFolder, Binary,
    Mmseg, Ade, VocMasks, Depth, Nyu, Mat, Coco, VocBoxes,
)  # fmt: skip
Refusal = VitregError
