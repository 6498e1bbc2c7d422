"""Data sets damaged at random: every reader is right, says what it leaves out, or refuses in our words.

    python benchmarks/mutated_folders.py 1000 [--seed 0]

Each folder is a small sound one of one of the readers' formats (mutated_formats.py), mutated once to three
times: entries of its JSON, XML, lists and tars are dropped, doubled, set to null or to another type; text is
written in another encoding; files are cut, emptied, replaced, renamed, linked. It fails if a reader raises
anything but a VitregError, waits, loses a photo, a mask or a box that neither its results nor its notes,
warnings or failures account for, or reads a sound one wrongly. The seed of each failure is printed; `--only
SEED` runs that folder alone.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from mutated_formats import FORMATS, HEIGHT, WIDTH, Account, Format, Shards, photo, save
from PIL import Image

import vitreg.data.listing
from vitreg.data.listing import printable
from vitreg.errors import VitregError

LIMIT = 60  # seconds, after which a reader is said to wait
ENDINGS = (".png", ".jpg", ".jpeg", ".heic", ".cr2", ".jxl", ".tif")
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "latin-1", "utf-32")
ODD_VALUES: tuple[Any, ...] = (
    None, -1, 0, 1, 2, "", "x", "1", "a", "a -1", 1.5, 1e30, float("nan"), float("inf"), True, [], {}, [1, 2],
    "\0", "é", "../x", "n" * 300,
)  # fmt: skip


# -- mutations of what is written --------------------------------------------------------------------


def mutate_entries(spec: Any, rng: random.Random) -> str:
    """Change one entry somewhere in lists and dictionaries, in place; returns what was done."""
    place = spec
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return "nothing"
        key = rng.choice(keys)
        if not (isinstance(place[key], dict | list) and place[key] and rng.random() < 0.85):
            break
        place = place[key]
    what = rng.choice(("drop", "set", "double", "copy"))
    if what == "drop":
        del place[key]
    elif what == "double" and isinstance(place, list):
        place.insert(rng.randrange(len(place) + 1), place[key])
    elif what == "copy":  # of a neighbour's value, so that ids are no longer unique
        place[key] = place[rng.choice(keys)]
    else:
        place[key] = rng.choice(ODD_VALUES)
    return f"{what} {key!r}"


def mutate_members(spec: Any, rng: random.Random) -> str:
    """Rename, link, double, drop or move a member of a tar."""
    members = rng.choice(list(spec.values()))
    i = rng.randrange(len(members))
    what = rng.choice(("hide", "mac", "link", "symlink", "double", "drop", "move", "caption"))
    name = members[i][0]
    if what in ("hide", "mac"):
        members[i] = [f"{'.' if what == 'hide' else '._'}{name}", *members[i][1:]]
    elif what in ("link", "symlink"):
        members[i] = [*members[i][:2], what]
    elif what == "double":
        members.append(list(members[i]))
    elif what == "drop":
        del members[i]
    elif what == "move":
        members.append(members.pop(i))
    else:
        members[i] = [name.replace("txt", "json"), *members[i][1:]]
    return f"{what} {name}"


# -- mutations of files ------------------------------------------------------------------------------


def cut(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content) + 1)])


def flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(rng.randrange(1, 20)):
        if content:
            content[rng.randrange(len(content))] = rng.randrange(256)
    path.write_bytes(bytes(content))


def replace(path: Path, rng: random.Random) -> None:
    path.write_bytes(
        rng.choice((b"", b"<html>404</html>", bytes(300), b"\0\0\0\x18ftypheic", b"\xff\x0a", b"{}"))
    )


def remove(path: Path, rng: random.Random) -> None:
    path.unlink()


def rename(path: Path, rng: random.Random) -> None:
    stem, ending = path.stem, path.suffix
    names = [
        f".{path.name}", f"._{path.name}", f"-{path.name}", stem, f"{stem}\n{ending}", f"{stem} ,{ending}",
        f"{path.name}.bak", f"{stem}{ending.upper()}", f"{stem}{rng.choice(ENDINGS)}",
        os.fsdecode(b"caf\xe9") + ending,
    ]  # fmt: skip
    path.rename(path.with_name(rng.choice(names)))


def double(path: Path, rng: random.Random) -> None:
    shutil.copy(
        path, path.with_suffix(rng.choice(ENDINGS)) if rng.random() < 0.5 else path.with_name("zz.png")
    )


def link(path: Path, rng: random.Random) -> None:
    """A link in its place, or beside it: to the file, to nothing, to itself, to a folder above."""
    what = rng.choice(("moved", "dangling", "itself", "up", "beside", "folder"))
    if what == "moved":
        target = path.with_name(f"{path.name}.real")
        path.rename(target)
        path.symlink_to(target)
    elif what in ("dangling", "itself"):
        path.unlink()
        path.symlink_to(path if what == "itself" else "/nowhere/at/all")
    elif what == "up":
        path.with_name("up").symlink_to(path.parent.parent)
    elif what == "folder":
        path.with_name("n02102040").symlink_to(path.parent)
    else:
        path.with_name(f"link-{path.name}").symlink_to(path)


def pipe(path: Path, rng: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def hide_folder(path: Path, rng: random.Random) -> None:
    hidden = path.parent / ".hidden" / path.name
    hidden.parent.mkdir(exist_ok=True)
    path.rename(hidden)


def to_folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    photo(path / "inside.png")


def other_pixels(path: Path, rng: random.Random) -> None:
    """A picture of another kind, if it is one."""
    try:
        with Image.open(path) as image:
            grey = np.array(image.convert("L"))
    except Exception:
        return
    kinds: dict[str, Callable[[], None]] = {
        "deep": lambda: save(path, grey.astype(np.uint16) * 16),
        "int32": lambda: save(path.with_suffix(".tif"), grey.astype(np.int32) - 1),
        "huge": lambda: save(path.with_suffix(".tif"), grey.astype(np.int32) * 10_000_000),
        "float": lambda: save(path.with_suffix(".tif"), grey.astype(np.float32) / 7),
        "alpha": lambda: save(path, np.stack([grey] * 3 + [grey], -1)),
        "grey as rgb": lambda: save(path, np.stack([grey] * 3, -1)),
        "palette": lambda: Image.fromarray(grey).convert("RGB").quantize(4).save(path),
        "jpeg": lambda: Image.fromarray(grey).save(path, "jpeg"),
        "other size": lambda: save(path, grey[: HEIGHT - 1]),
        "turned": lambda: Image.fromarray(grey).save(path, exif=exif(6)),
        "one value": lambda: save(path, np.full((HEIGHT, WIDTH), rng.choice((0, 1, 255)), np.uint8)),
    }
    kinds[rng.choice(list(kinds))]()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


FILE_MUTATIONS = (
    cut,
    flip,
    replace,
    remove,
    rename,
    double,
    link,
    pipe,
    hide_folder,
    to_folder,
    other_pixels,
)


# -- one folder --------------------------------------------------------------------------------------


def mutated(kind: Format, root: Path, rng: random.Random) -> list[str]:
    """Build a folder and mutate it; returns what was done."""
    kind.build(root, rng)
    done = []
    count = rng.randrange(1, 4)
    of_entries = rng.randrange(count + 1) if kind.spec else 0
    for _ in range(of_entries):
        change = mutate_members if isinstance(kind, Shards) else mutate_entries
        done.append(change(kind.spec, rng))
    if isinstance(kind, Shards):
        kind.write(root)
    write_texts(kind, root, rng, done)
    for _ in range(count - of_entries):
        files = sorted(path for path in root.rglob("*") if path.is_file())
        if files:
            path, change = rng.choice(files), rng.choice(FILE_MUTATIONS)
            with contextlib.suppress(OSError):  # a mutation of before is in its way
                change(path, rng)
            done.append(f"{change.__name__} {printable(str(path.relative_to(root)))}")
    return done


def write_texts(kind: Format, root: Path, rng: random.Random, done: list[str]) -> None:
    try:
        texts = kind.texts(root)
    except Exception:  # the mutation leaves nothing that could be written
        texts = {}
    for path, text in texts.items():
        if len(path.name) > 200 or "\0" in str(path):
            continue
        encoding = rng.choice(ENCODINGS) if rng.random() < 0.3 else "utf-8"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode(encoding, "replace"))
        done += [encoding] if encoding != "utf-8" else []


def trial(seed: int) -> tuple[str, list[str], str, list[str]]:
    """One folder: its format, what was done to it, what came of it, and what is wrong."""
    rng = random.Random(seed)
    kind = FORMATS[seed % len(FORMATS)]()
    with tempfile.TemporaryDirectory(prefix="mutated-") as folder:
        root = Path(folder).resolve() / "data"
        done = mutated(kind, root, rng)
        touched = [one for one in done if one.split()[0] in {change.__name__ for change in FILE_MUTATIONS}]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            signal.alarm(LIMIT)
            try:
                account = kind.read(root)
            except VitregError as error:
                bad = "\n" in str(error) or not str(error)
                return type(kind).__name__, done, "refused", [f"a message of several lines: {error}"] * bad
            except BaseException:
                return type(kind).__name__, done, "raised", [traceback.format_exc()]
            finally:
                signal.alarm(0)
        account.said += [str(warning.message) for warning in caught]
        members = [] if touched else account.members
        counted = [] if any(one.endswith((".txt", ".json", ".xml")) for one in touched) else account.wrong
        wrong = [*counted, *lost(account, root), *lost_members(account, members)]
        said = "said" if account.said else "read"
        return type(kind).__name__, done, said, wrong


def lost(account: Account, root: Path) -> list[str]:
    """The photos on disk of which the reader says nothing."""
    read = {real(path) for path in account.read}
    said = "\n".join(account.said) + "\n"
    missing = []
    for top in account.roots:
        for where, _, names in os.walk(top):
            for name in names:
                path = os.path.join(where, name)
                is_photo = os.path.splitext(name)[1].lower() in ENDINGS and not name.startswith("._")
                if is_photo and real(path) not in read and not is_said(path, root, said):
                    missing.append(f"lost: {printable(path)}")
    return missing


def real(path: str) -> str:
    """The path with its folder's links followed, as the readers print it."""
    return printable(os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path)))


def is_said(path: str, root: Path, said: str) -> bool:
    """Whether the reader names the file, or a folder that it lies in, in full or from the root on."""
    while len(path) > len(str(root)):
        for name in (printable(path), printable(os.path.relpath(path, root))):
            if any(name + end in said for end in (",", ":", "\n", ". ", " is left out")):
                return True
        path = os.path.dirname(path)
    return False


def lost_members(account: Account, members: list[str]) -> list[str]:
    said = "\n".join(account.said) + "\n"
    read = Counter(account.read)
    return [
        f"lost: {name}, {count} times, {read[name]} read"
        for name, count in Counter(members).items()
        if read[name] < count and not any(name + end in said for end in (",", ":", "\n"))
    ]


def run(seeds: range) -> tuple[Counter[str], list[tuple[int, str, list[str], list[str]]]]:
    """Outcomes, and the failures: seed, format, what was done, what is wrong."""
    vitreg.data.listing.SHOWN = 10**9  # notes name everything
    signal.signal(signal.SIGALRM, waited)
    outcomes: Counter[str] = Counter()
    failures = []
    for seed in seeds:
        name, done, outcome, wrong = trial(seed)
        outcomes[outcome] += 1
        if wrong:
            failures.append((seed, name, done, wrong))
    return outcomes, failures


class Waits(BaseException):
    """No Exception, which readers might take for a file's own."""


def waited(*_: object) -> None:
    raise Waits(f"the reader still waits after {LIMIT} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", type=int, nargs="?", default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int)
    asked = parser.parse_args()
    begun = time.time()
    found = (
        range(asked.only, asked.only + 1)
        if asked.only is not None
        else range(asked.seed, asked.seed + asked.folders)
    )
    counts, bad = run(found)
    for seed, name, done, wrong in bad:
        print(f"--only {seed} ({name}; {'; '.join(done)})", *wrong[:3], sep="\n  ")
    print(f"{len(found)} folders in {time.time() - begun:.0f} s: {dict(counts)}, {len(bad)} failures")
