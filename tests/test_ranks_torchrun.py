"""The command under torchrun: one result, one message, one exit code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from phantoms import save_crops
from ranked import differences
from typer.testing import CliRunner

from vitreg.cli.main import app

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent


def torchrun(processes: int, *command: str) -> subprocess.CompletedProcess[str]:
    """One that hangs fails; most of the time is its start."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*launcher, f"--nproc-per-node={processes}", *command],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        timeout=240,
    )


def told(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines that are ours, not torchrun's."""
    return [line for line in done.stderr.splitlines() if line.startswith("vitreg:")]


def test_three_processes_write_what_one_writes(shared: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for photo in sorted((shared / "data" / "imagenet-sample-1000").iterdir())[::100]:
        (photos / photo.name).symlink_to(photo)
    (photos / "n01440764_bad.jpg").write_text("bad")
    model = str(shared / "models" / "vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    command = ["diagnose", model, str(photos), "--batch-size", "2", "--workers", "0"]
    alone, three = tmp_path / "alone.json", tmp_path / "three.json"
    expected = CliRunner().invoke(app, [*command, "--json", str(alone)])
    assert expected.exit_code == 0, expected.output
    report = tmp_path / "report.html"
    done = torchrun(3, "-m", "vitreg", *command, "--json", str(three), "--report", str(report))
    assert done.returncode == 0, done.stderr
    whole = json.loads(alone.read_text())
    assert (whole["images"], whole["verdict"], len(whole["failed_images"])) == (10, "artifacts", 1)
    assert differences(json.loads(three.read_text()), whole) == []
    assert done.stdout.splitlines()[:-2] == expected.stdout.splitlines()[:-1]
    assert done.stdout.splitlines()[-2:] == [f"JSON: {three}", f"report: {report}"]
    assert told(done) == []


RANDOM = (
    "timm:vit_tiny_patch16_224",
    "--random-weights",
    "--size",
    "32",
    "--batch-size",
    "2",
    "--workers",
    "0",
)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("kill", "vitreg: another of the processes has died or was stopped"),
        ("nan", "vitreg: a value is NaN"),
    ],
)
def test_a_process_that_ends_early_ends_all_with_one_message(tmp_path: Path, how: str, message: str) -> None:
    photos, out = save_crops(tmp_path / "photos", 20), tmp_path / "found.json"
    model, *options = RANDOM
    command = ("diagnose", model, str(photos), *options, "--json", str(out))
    done = torchrun(3, str(HERE / "hit_rank.py"), how, "1", *command)
    assert done.returncode == 1
    (line,) = told(done)
    assert line.startswith(message)
    assert done.stdout == ""
    assert not out.exists()


def test_an_error_of_all_is_told_once(tmp_path: Path) -> None:
    done = torchrun(2, "-m", "vitreg", "diagnose", str(tmp_path / "nowhere"), str(tmp_path))
    assert done.returncode == 1
    (line,) = told(done)
    assert "nowhere" in line
