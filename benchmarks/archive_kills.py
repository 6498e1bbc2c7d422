"""Does an extraction survive the death of its workers and of its driver? On real photos, with damaged ones.

    python benchmarks/archive_kills.py MODEL PHOTOS [--shard-size 50]

A clean run with two workers makes the answer. Then the same is done with one worker killed (SIGKILL) in the
middle, then the driver, and, when it goes on, both workers. The outputs must be the same, byte by byte, every
good photo must be there once, every damaged one in the manifest, and shards that were finished when the
driver died must not have been made again.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pyarrow.dataset


def damage(folder: Path, photos: list[Path]) -> set[str]:
    """Ten files that no decoder can read; returns their names."""
    whole = photos[0].read_bytes()
    contents = {
        "empty.jpg": b"",
        "text.jpg": b"this is no photo",
        "truncated.jpg": whole[: len(whole) // 2],
        "header-only.jpg": whole[:20],
        "zeros.png": bytes(1000),
        "html.png": b"<html><body>404 Not Found</body></html>",
        "half.png": b"\x89PNG\r\n\x1a\n" + whole[:100],
        "riff.webp": b"RIFF\x10\x00\x00\x00WEBPVP8 ",
        "gif.gif": b"GIF89a\xff\xff",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (folder / "dangling.jpg").symlink_to(folder / "nowhere.jpg")
    return {*contents, "dangling.jpg"}


def start(args: argparse.Namespace, data: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "vitreg", "features", args.model, str(data), "-o", str(out)]
    options = ["--workers", "2", "--shard-size", str(args.shard_size), "--tokens", "cls,mean,patches"]
    return subprocess.Popen(command + options, stdout=subprocess.DEVNULL)


def finished(out: Path) -> set[str]:
    return {path.name for path in out.glob("done/0*.json")}


def wait_for(out: Path, shards: int, driver: subprocess.Popen[bytes]) -> None:
    while len(finished(out)) < shards:
        if driver.poll() is not None:
            raise SystemExit(f"the driver ended with {driver.returncode} before {shards} shards were done")
        time.sleep(0.05)


def workers(out: Path) -> list[int]:
    """Process ids of those that are at a shard now."""
    found = []
    for path in out.glob("trying/0*"):
        try:
            found.append(json.loads(path.read_text(encoding="utf-8"))["pid"])
        except (OSError, ValueError):  # just done
            continue
    return found


def kill(pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def hashes(out: Path) -> dict[str, str]:
    files = [*out.glob("vectors/*"), *out.glob("patches/*")]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("photos", type=Path)
    parser.add_argument("--shard-size", type=int, default=50)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        data = root / "data"
        data.mkdir()
        photos = sorted(path for path in args.photos.iterdir() if path.is_file())
        for path in photos:
            (data / path.name).symlink_to(path.resolve())
        bad = damage(data, photos)

        clean, killed = root / "clean", root / "killed"
        began = time.perf_counter()
        assert start(args, data, clean).wait() == 0
        print(f"clean run: {time.perf_counter() - began:.0f} s")

        driver = start(args, data, killed)
        wait_for(killed, 3, driver)
        kill(workers(killed)[:1])
        print(f"one worker killed with {len(finished(killed))} shards done")
        wait_for(killed, 8, driver)
        orphans = workers(killed)
        driver.kill()
        driver.wait()
        time.sleep(5)
        alive = [pid for pid in orphans if Path(f"/proc/{pid}").exists()]
        before = {name: (killed / "done" / name).stat().st_mtime_ns for name in finished(killed)}
        print(f"driver killed with {len(before)} shards done; workers alive 5 s later: {len(alive)}")

        began = time.perf_counter()
        driver = start(args, data, killed)
        wait_for(killed, len(before) + 2, driver)
        print(f"started again: two more shards after {time.perf_counter() - began:.0f} s")
        while len(pids := workers(killed)) < 2:
            time.sleep(0.01)
        kill(pids)
        print(f"{len(pids)} workers killed with {len(finished(killed))} shards done")
        assert driver.wait() == 0

        names = Counter(pyarrow.dataset.dataset(killed / "vectors").to_table(["name"])["name"].to_pylist())
        manifest = json.loads((killed / "manifest.json").read_text(encoding="utf-8"))
        same = {
            "files are the clean run's": hashes(clean) == hashes(killed) and bool(hashes(killed)),
            "every good photo once": names == Counter(path.name for path in photos),
            "every bad photo in the manifest": {image["name"] for image in manifest["failed"]} == bad,
            "finished shards not made again": all(
                (killed / "done" / name).stat().st_mtime_ns == when for name, when in before.items()
            ),
            "nothing left over": not [*killed.rglob("*.tmp"), *killed.glob("trying/*")],
        }
        for image in manifest["failed"]:
            print(f"  {image['name']}: {image['reason']}")
        for what, holds in same.items():
            print(f"{what}: {'yes' if holds else 'NO'}")
        sys.exit(not all(same.values()))


if __name__ == "__main__":
    main()
