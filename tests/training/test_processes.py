"""Two processes train as one does, end together, and only the first of them writes."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import CPU, losses, same, save_classes, tiny, weights

import vitreg
from vitreg.training.log import read_log
from vitreg.training.loop import train

pytestmark = pytest.mark.slow

PLAIN = {"mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0, "micro_batch": None}
RANDOM = {"micro_batch": 2, "diagnose_every": 3}
# On a CPU, FSDP mixes up the two moments of Adam when it gathers them; this has one.
SGD = RANDOM | {"optimizer": "sgd"}

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


class Runs:
    """What two processes did, once for all tests here."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = save_classes(folder / "data")
        jobs = [
            self._job("plain", PLAIN, machine={"strategy": "ddp"}),
            self._job("random", RANDOM),
            self._job("nan", RANDOM, hit=["nan-loss", 5, 1]),
            self._job("term", RANDOM, "first", hit=["term", 4, 1]),
            self._job("term", RANDOM, "again"),
            self._job("full", RANDOM, "first", hit=["term", 4, 1]),
            self._job("full", RANDOM, "again", disk=20_000),
            self._job("nolog", RANDOM, disk=300),
            self._job("fsdp", SGD, "first", fsdp=True, hit=["term", 4, 1]),
            self._job("fsdp", SGD, "again", fsdp=True),
        ]
        (folder / "jobs.json").write_text(json.dumps(jobs))
        script = Path(__file__).parents[1] / "run_training.py"
        self.done = subprocess.run(
            [*TORCHRUN, str(script), str(folder / "jobs.json")],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=300,
        )

    def _job(self, out: str, settings: dict[str, Any], name: str = "run", **more: Any) -> dict[str, Any]:
        settings = {"data": str(self.data)} | settings
        return {"out": str(self.folder / out), "settings": settings, "name": name, **more}

    def __getitem__(self, out: str) -> list[dict[str, Any]]:
        """What each process says of a run."""
        return self.named(out, "run")

    def named(self, out: str, name: str) -> list[dict[str, Any]]:
        assert self.done.returncode == 0, self.done.stderr
        return [json.loads((self.folder / f"{out}.{rank}.{name}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def alone(runs: Runs) -> Path:
    """The same by one process."""
    for name, settings in (("plain", PLAIN), ("random", RANDOM), ("sgd", SGD)):
        train(tiny(runs.data, **settings), runs.folder / "alone" / name, CPU)
    return runs.folder / "alone"


def test_the_command_line_is_told_once(runs, alone):
    """Two processes of torchrun; a bar is for terminals."""
    settings = asdict(tiny("", **PLAIN)) | {"expected": "as alone", "log_every": 5}
    recipe = runs.folder / "plain.py"
    recipe.write_text(
        f"from vitreg.training.supervised import Supervised\nrecipe = Supervised(**{settings})\n"
    )
    told = ["--data", str(runs.data), "--accelerator", "cpu", "--set", "log_every=1"]
    done = subprocess.run(
        [*TORCHRUN, "-m", "vitreg", "train", str(recipe), *told, "-o", str(runs.folder / "command")],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("expected: as alone") == 1
    assert close(runs.folder / "command", alone / "plain")


def close(first: Path, second: Path) -> bool:
    """Logged losses, gradients and diagnoses, to 1e-5; losses have six digits."""
    losses(first), losses(second)
    for a, b in zip(read_log(first), read_log(second), strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"photos_per_second"}:
            assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-5), key
    return True


@pytest.mark.parametrize("name", ["plain", "random"])
def test_two_processes_log_what_one_logs(runs, alone, name):
    assert runs[name][0]["step"] == 8
    assert close(runs.folder / name, alone / name)
    first, second = weights(runs.folder / name), weights(alone / name)
    for key, value in first.items():
        torch.testing.assert_close(value, second[key], rtol=1e-3, atol=1e-5, msg=key)


def test_the_runs_differ(alone):
    assert losses(alone / "plain") != losses(alone / "random")


def test_only_the_first_process_writes_and_none_prints(runs):
    assert [sorted(found["written"]) for found in runs["random"]] == [["model"], []]
    files = {path.name for path in (runs.folder / "random").iterdir()}
    assert files == {"last.ckpt", "log.jsonl", "model"}
    assert runs.done.stdout == ""
    assert runs.done.stderr == ""


def test_a_loss_that_is_no_number_in_one_process_ends_both(runs):
    for found in runs["nan"]:
        assert found["error"] == "NonFiniteError"
        assert "loss of step 5 is nan" in found["message"]
        assert "last.ckpt is of step 3" in found["message"]
    assert torch.load(runs.folder / "nan" / "last.ckpt", weights_only=True)["step"] == 3


def test_a_signal_to_one_process_stops_both_and_they_go_on(runs):
    for found in runs.named("term", "first"):
        assert (found["step"], found["stopped"]) == (4, True)
    for found in runs.named("term", "again"):
        assert (found["step"], found["stopped"]) == (8, False)
    assert losses(runs.folder / "term") == losses(runs.folder / "random")
    assert same(weights(runs.folder / "term"), weights(runs.folder / "random"))


@pytest.mark.parametrize(
    ("out", "name", "what"), [("full", "again", "checkpoint"), ("nolog", "run", "log.jsonl")]
)
def test_a_full_disk_ends_all_processes(runs, out, name, what):
    for found in runs.named(out, name):
        assert found["error"] == "OutputError"
        assert "cannot write" in found["message"]
        assert what in found["message"]
        assert found["seconds"] < 20
    assert not list((runs.folder / out).glob(".*"))
    if out == "full":
        assert torch.load(runs.folder / out / "last.ckpt", weights_only=True)["step"] == 4


def test_fsdp_trains_as_one_process_does(runs, alone):
    assert [found["stopped"] for found in runs.named("fsdp", "first")] == [True, True]
    assert [found["step"] for found in runs.named("fsdp", "again")] == [8, 8]
    assert losses(runs.folder / "fsdp") == pytest.approx(losses(alone / "sgd"), rel=1e-5)
    found, expected = (
        torch.load(run / "last.ckpt", weights_only=True) for run in (runs.folder / "fsdp", alone / "sgd")
    )
    for name, value in expected["objective"].items():
        torch.testing.assert_close(found["objective"][name], value, rtol=1e-3, atol=1e-5, msg=name)
    decays = [group["weight_decay"] for group in found["optimizer"]["param_groups"]]
    assert decays == [0, 0.05]
    assert vitreg.load(str(runs.folder / "fsdp" / "model")).anatomy.width == 48
