"""Extractions on a local Ray: complete, the same whatever dies, flat in memory, and clear about mistakes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pyarrow.dataset
import pytest
from archives import BAD, contents, photos, png, rows, tar, tiny
from typer.testing import CliRunner

import vitreg
from vitreg.archive import ray_engine as engine
from vitreg.archive import run
from vitreg.archive.ray_engine import share
from vitreg.cli.main import app
from vitreg.errors import (
    ArchiveError,
    DataError,
    ImageError,
    MissingExtraError,
    OutputError,
    UnsupportedModelError,
)

pytestmark = pytest.mark.slow

TWO = {"workers": 2, "batch_size": 4, "shard_images": 5, "dtype": "float32"}


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    """One Ray for all tests of this file; extractions use the one that is there."""
    with engine.ray_session(2):
        yield


def names(out: Path) -> Counter:
    return Counter(pyarrow.dataset.dataset(out / "vectors").to_table(["name"])["name"].to_pylist())


def at_work(out: Path) -> list[int]:
    """Process ids of the workers that are at a shard now."""
    found = []
    for path in out.glob("trying/0*"):
        try:
            found.append(json.loads(path.read_text())["pid"])
        except (OSError, ValueError):  # done meanwhile
            continue
    return found


def kill_at_work(out: Path, workers: int, killed: list[int]) -> None:
    """SIGKILL so many workers, each as soon as it is seen at a shard."""
    until = time.monotonic() + 60
    while time.monotonic() < until and len(killed) < workers:
        for pid in {*at_work(out)} - {*killed}:
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
        time.sleep(0.002)


@pytest.mark.usefixtures("ray")
def test_every_good_photo_once_and_every_bad_one_named(tmp_path, monkeypatch):
    photos(tmp_path / "in", 23, bad=True)
    vit, arguments = tiny(), (tmp_path / "in", tmp_path / "out")
    with vitreg.TestTimeRegisters({1: [3]}).applied_to(vit) as handle:
        found = vitreg.extract_archive(vit, *arguments, tokens=["cls", "registers"], **TWO)
        assert vitreg.applied(vit.model) == [handle]  # as it was
        monkeypatch.setattr(run, "run_shards", lambda *_: pytest.fail("complete, and worked again"))
        (tmp_path / "out/manifest.json").unlink()  # as if the driver had died just before
        assert vitreg.extract_archive(vit, *arguments, tokens=["cls", "registers"], **TWO) == found
    assert names(tmp_path / "out") == Counter(f"{'ab'[n % 2]}/{n:04d}.png" for n in range(23))
    assert found.complete
    assert (found.images, found.done, {image.path for image in found.failed}) == (23, 5, set(BAD))
    document = json.loads((tmp_path / "out/manifest.json").read_text())
    assert document["complete"]
    assert {image["name"] for image in document["failed"]} == set(BAD)
    assert document["plan"]["settings"]["fix"].startswith("registers ")
    assert document["plan"]["settings"]["features"] == {"cls": [32], "test_registers": [1, 32]}
    assert document["workers"][0]["torch"]
    text = str(found)
    assert "23 images, 2 not read; 5 of 5 shards, complete" in text
    assert "cls: 32" in text
    assert "1 x the file is empty (first: empty.jpg)" in text
    assert "limits" in text


@pytest.mark.usefixtures("ray")
def test_workers_that_are_killed_change_nothing(tmp_path):
    tar(tmp_path / "in/0.tar", {f"{i}.png": png(i, 300) for i in range(40)})
    tar(tmp_path / "in/1.tar", {f"{i}.png": png(i, 300) for i in range(40)})
    tar(tmp_path / "in/2.tar", {f"{i}.png": png(i, 300) for i in range(40)} | {"bad.jpg": b"no photo"})
    options = TWO | {"tokens": ["cls", "patches"]}
    clean = vitreg.extract_archive(tiny(), tmp_path / "in", tmp_path / "clean", **options)
    killed: list[int] = []
    killer = threading.Thread(target=kill_at_work, args=(tmp_path / "killed", 2, killed))
    killer.start()
    found = vitreg.extract_archive(tiny(), tmp_path / "in", tmp_path / "killed", **options)
    killer.join()
    assert len(killed) >= 2
    assert contents(tmp_path / "clean") == contents(tmp_path / "killed") != {}
    assert (found.images, found.failed, found.bytes) == (clean.images, clean.failed, clean.bytes)
    assert not [*(tmp_path / "killed").rglob("*.tmp"), *(tmp_path / "killed").glob("trying/*")]


def wait_until(holds: Callable[[], bool], driver: subprocess.Popen) -> None:
    until = time.monotonic() + 90
    while not holds():
        assert driver.poll() is None, driver.communicate()
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_driver_that_is_killed_goes_on_where_it_was(tmp_path):
    """With a Ray of its own, which must die with it."""
    photos(tmp_path / "in", 40)
    out = tmp_path / "out"
    command = [
        *(sys.executable, "-m", "vitreg", "features", "timm:test_vit.r160_in1k", str(tmp_path / "in")),
        *("-o", str(out), "--random-weights", "--batch-size", "2", "--shard-size", "2", "--workers", "1"),
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as driver:
        wait_until(lambda: len([*out.glob("done/0*.json")]) >= 3 and bool(at_work(out)), driver)
        [orphan] = at_work(out) or [0]
        driver.kill()
    until = time.monotonic() + 30
    while orphan and Path(f"/proc/{orphan}").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not Path(f"/proc/{orphan}").exists() or not orphan
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("done/0*.json")}
    assert 3 <= len(before) < 20
    assert not (out / "manifest.json").exists()
    ended = subprocess.run(command, **pipes)
    assert ended.returncode == 0, ended.stderr
    assert "40 images, 0 not read; 20 of 20 shards, complete" in ended.stdout
    assert "Ray" not in ended.stderr
    assert "ray" not in ended.stderr
    assert before.items() <= {path.name: path.stat().st_mtime_ns for path in out.glob("done/0*.json")}.items()
    assert set(names(out).values()) == {1}
    assert len(names(out)) == 40


@pytest.mark.nightly
@pytest.mark.usefixtures("ray")
def test_memory_does_not_grow_with_the_archive(tmp_path):
    """10,000 photos, a hundred times as many: beside what it needs anyway, a worker holds no more."""
    one = png(0, 16)
    tar(tmp_path / "few/0.tar", {f"{i}.png": one for i in range(100)})
    for number in range(4):
        tar(tmp_path / f"many/{number}.tar", {f"{i}.png": one for i in range(2500)})
    options = {"workers": 1, "batch_size": 50, "shard_images": 100, "dtype": "float32"}
    options |= {"tokens": ["patches"], "layers": [0, 1]}
    vit = tiny(embed_dim=128)
    peaks = {}
    for name in ("few", "many"):
        found = vitreg.extract_archive(vit, tmp_path / name, tmp_path / f"out-{name}", **options)
        peaks[name] = found.workers[0]["peak_mib"]
    assert found.images == 10_000
    assert found.bytes > 160e6  # to hold them all would show
    assert peaks["many"] < peaks["few"] + 80, peaks


@pytest.mark.usefixtures("ray")
def test_a_disk_that_fills_up_stops_the_run_and_the_manifest_stays_true(tmp_path):
    """A name that cannot be written stands in for the full disk (which test_worker.py has)."""
    photos(tmp_path / "in", 15)
    options = TWO | {"workers": 1}
    out = tmp_path / "out"
    (out / "vectors/000001-000.parquet").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"000001-000.parquet is a folder"):
        vitreg.extract_archive(tiny(), tmp_path / "in", out, **options)
    document = json.loads((out / "manifest.json").read_text())
    written = {str(path.relative_to(out)) for path in out.glob("vectors/*.parquet") if path.is_file()}
    assert not document["complete"]
    entries = [json.loads(path.read_text()) for path in out.glob("done/*.json")]
    assert {file["file"] for entry in entries for file in entry["files"]} <= written
    assert document["done"] == len(entries) < 3
    assert document["images"] == sum(entry["images"] for entry in entries)
    (out / "vectors/000001-000.parquet").rmdir()  # there is room again
    assert vitreg.extract_archive(tiny(), tmp_path / "in", out, **options).complete
    assert len(rows(out)["name"]) == 15


@pytest.mark.usefixtures("ray")
def test_when_no_photo_can_be_read(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"no photo")
    with pytest.raises(ImageError, match=r"none of 2 photos could be read: a.jpg: not an image"):
        vitreg.extract_archive(tiny(), tmp_path / "in", tmp_path / "out", **TWO)


@pytest.mark.usefixtures("ray")
def test_a_model_that_cannot_travel(tmp_path):
    vit, lock = tiny(), threading.Lock()

    def preprocess(image):
        with lock:
            return vit.preprocess(image)

    mine = vitreg.wrap(vit.model, preprocess, image_size=32, name="mine")
    with pytest.raises(UnsupportedModelError, match=r"mine cannot be sent to workers: .*lock.*load can"):
        vitreg.extract_archive(mine, photos(tmp_path / "in", 1), tmp_path / "out")


# -- before any work -------------------------------------------------------------------------------------


def test_an_output_folder_inside_of_the_archive(tmp_path):
    photos(tmp_path, 3)
    with pytest.raises(DataError, match="lies inside of"):
        vitreg.extract_archive(tiny(), tmp_path, tmp_path / "out")


def test_an_output_folder_beside_the_tar_is_welcome(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "run_shards", lambda *_: iter(()))
    monkeypatch.setattr(run, "ray_session", nullcontext)
    tar(tmp_path / "x.tar", {"0.png": png(0)})
    with pytest.raises(ImageError, match="none of 0 photos"):  # for nobody has worked
        vitreg.extract_archive(tiny(), tmp_path / "x.tar", tmp_path / "out")
    assert (tmp_path / "out/plan.json").exists()


def test_what_cannot_be_stored(tmp_path):
    with pytest.raises(
        DataError, match=r"cannot be stored as 'bfloat16'\..*Expected one of float16, float32"
    ):
        vitreg.extract_archive(tiny(), tmp_path, tmp_path / "out", dtype="bfloat16")
    with pytest.raises(ValueError, match="shard_images is 0"):
        vitreg.extract_archive(tiny(), tmp_path, tmp_path / "out", shard_images=0)


def test_no_permission_to_write(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        vitreg.extract_archive(tiny(), photos(tmp_path / "in", 1), tmp_path / "file/out")


@pytest.mark.parametrize("module", ["ray", "pyarrow"])
def test_without_ray_the_extra_is_named(tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"^{module}.* pip install 'vitreg\[ray\]'"):
        vitreg.extract_archive(tiny(), photos(tmp_path / "in", 1), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_cluster_that_does_not_answer(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "nosuch-scheme://nowhere")
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(ArchiveError, match=r"Ray does not start at nosuch-scheme://nowhere: .*RAY_ADDRESS"):
        vitreg.extract_archive(tiny(), photos(tmp_path / "in", 1), tmp_path / "out")


def test_a_manifest_that_is_not_there(tmp_path):
    with pytest.raises(ArchiveError, match=r"has no manifest.json: no run has ended there"):
        vitreg.Extraction.read(str(tmp_path))


@pytest.mark.parametrize(
    ("hosts", "workers", "unit", "expected"),
    [
        ([{"CPU": 2}], None, "CPU", (1, 2)),
        ([{"CPU": 2}], 2, "CPU", (2, 1)),
        ([{"CPU": 2}], 5, "CPU", (5, 1)),
        ([{"CPU": 16}, {"CPU": 6}], None, "CPU", (5, 4)),
        ([{"CPU": 16}, {"CPU": 6}], 3, "CPU", (3, 6)),
        ([{"CPU": 32, "GPU": 4}, {"CPU": 64}], None, "GPU", (4, 8)),
        ([{"CPU": 2, "GPU": 4}], 1, "GPU", (1, 1)),
        ([{"CPU": 4}], 8, "GPU", (8, 4)),  # GPUs are yet to come
    ],
)
def test_workers_share_what_there_is(hosts, workers, unit, expected):
    assert share(hosts, workers, unit) == expected


def test_the_command_refuses_layers_that_are_no_numbers(tmp_path):
    ended = CliRunner().invoke(app, ["features", "x", "y", "-o", "z", "--layers", "last", "--random-weights"])
    assert ended.exit_code == 2
