"""A run that was killed, stopped or broken off goes on as if nothing had been."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_runs import CPU, Hit, Hits, full_disk, losses, same, save_classes, tiny, weights

from vitreg.errors import DataError, NonFiniteError, OutputError
from vitreg.training.log import read_log
from vitreg.training.loop import train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classes(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """A run that nothing befell."""
    folder = tmp_path_factory.mktemp("whole")
    train(tiny(data), folder, CPU)
    return folder


@pytest.fixture
def hit(monkeypatch: pytest.MonkeyPatch):
    return lambda *what: monkeypatch.setattr(Hits, "now", Hit(*what))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_killed_in_mid_epoch_and_run_again(data, whole, tmp_path):
    """Checkpoints are at 3 and 6; an epoch has 6 steps. With data workers and without."""
    jobs = [
        {"out": str(tmp_path / f"w{workers}"), "name": name, "fork": True}
        | {"settings": {"data": str(data)}, "machine": {"workers": workers}, "hit": what}
        for workers in (0, 2)
        for name, what in (("killed", ["kill", 5]), ("again", []))
    ]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).parents[1] / "run_training.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "jobs.json")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    for workers in (0, 2):
        folder = tmp_path / f"w{workers}"
        found = [json.loads(Path(f"{folder}.0.{name}.json").read_text()) for name in ("killed", "again")]
        assert found == [{"status": -signal.SIGKILL}, {"status": 0}]
        assert losses(folder) == losses(whole)
        assert same(weights(folder), weights(whole))
        assert (folder / "model" / "model.safetensors").read_bytes() == (
            whole / "model" / "model.safetensors"
        ).read_bytes()


def test_a_run_that_is_done_stays_as_it_is(data, whole):
    before = weights(whole)
    run = train(tiny(data), whole, CPU)
    assert (run.step, run.stopped, sorted(run.written)) == (8, False, ["model"])
    assert same(weights(whole), before)
    assert len(losses(run.log)) == 8


def test_a_log_that_ran_ahead_of_the_checkpoint_is_cut(data, whole, tmp_path, hit):
    hit("term", 4)
    train(tiny(data), tmp_path, CPU)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 5, "loss": 9.0}\n{"step": 6, "lo')
    hit()
    assert losses(train(tiny(data), tmp_path, CPU).log) == losses(whole)


@pytest.mark.parametrize("how", ["term", "int"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_signal_finishes_the_step_and_the_next_call_goes_on(data, whole, tmp_path, hit, how, workers):
    """SIGTERM, or Ctrl-C."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    hit(how, 4)
    run = train(tiny(data), tmp_path, replace(CPU, workers=workers))
    assert (run.step, run.stopped, run.written, run.interrupted) == (4, True, {}, how == "int")
    assert len(losses(run.log)) == 4
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    hit()
    run = train(tiny(data), tmp_path, CPU)
    assert (run.step, run.stopped) == (8, False)
    assert losses(run.log) == losses(whole)
    assert same(weights(tmp_path), weights(whole))


def test_a_second_interrupt_does_not_wait(data, tmp_path, hit):
    before = signal.getsignal(signal.SIGINT)
    hit("impatient", 5)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(data), tmp_path, CPU)
    assert signal.getsignal(signal.SIGINT) is before
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2, 3, 4]
    hit()
    assert train(tiny(data), tmp_path, CPU).step == 8  # from the checkpoint of step 3


def test_ctrl_c_at_the_command_line(data, tmp_path):
    """It goes to data workers, too. One line and a shell's exit code, no traceback."""
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "from training_runs import Hit, Hits, tiny\n"
        f"Hits.now = Hit('ctrl-c', 4)\nrecipe = tiny({str(data)!r})\n",
        encoding="utf-8",
    )
    out = tmp_path / "run"
    command = ["train", recipe, "-o", out, "--accelerator", "cpu", "--workers", "1"]
    command += ["--registers", "0", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "vitreg", *map(str, command)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        start_new_session=True,
    )
    said = f"stopped at step 4 of 8 of {out / 'registers-0'}; the same command goes on from there.\n"
    assert (done.returncode, done.stdout, done.stderr) == (130, said, "")
    run = train(tiny(data), out / "registers-0", CPU)
    assert (run.step, run.stopped) == (8, False)


def test_more_steps_and_another_learning_rate_may_be_asked_for(data, tmp_path):
    train(tiny(data, steps=3), tmp_path, CPU)
    run = train(tiny(data, steps=4, lr=5e-4, min_lr=4e-4, clip_grad=0.1), tmp_path, CPU)
    assert len(losses(run.log)) == 4
    assert 4e-4 < run.log[-1]["lr"] < 5e-4


# -- a checkpoint that does not fit ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": 1}, r"last\.ckpt is of another run: it had seed=0 \(now 1\)\. Give the same settings"),
        ({"registers": 2, "image_size": 64}, r"it had image_size=32 \(now 64\), registers=0 \(now 2\)"),
        ({"steps": 2}, r"last\.ckpt is of step 8, and steps=2\. Set more steps"),
    ],
)
def test_of_other_settings(data, whole, settings, message):
    before = contents(whole)
    with pytest.raises(DataError, match=message):
        train(tiny(data, **settings), whole, CPU)
    assert contents(whole) == before


def test_of_another_architecture(whole, tmp_path):
    """The same settings, but photos of four classes."""
    other = save_classes(tmp_path, 4, 1, classes=4)
    message = (
        r"last\.ckpt is of another architecture: 2 tensors differ, such as vit\.head\.bias, which is \(3,\)"
        r" there and \(4,\) here\. Give the recipe"
    )
    with pytest.raises(DataError, match=message):
        train(tiny(other), whole, CPU)


def test_cut_off_or_not_ours(data, whole, tmp_path):
    path = tmp_path / "last.ckpt"
    path.write_bytes((whole / "last.ckpt").read_bytes()[:-1000])
    with pytest.raises(
        DataError, match=r"last\.ckpt is not a complete checkpoint \(RuntimeError\)\. Delete it"
    ):
        train(tiny(data), tmp_path, CPU)
    for other in (
        {"weight": torch.zeros(2)},
        [1, 2],
        {"objective": 1, "optimizer": 2, "step": 3, "recipe": 4},
    ):
        torch.save(other, path)
        with pytest.raises(DataError, match=r"last\.ckpt is not a checkpoint of vitreg\. Move it away"):
            train(tiny(data), tmp_path, CPU)


def test_code_in_a_checkpoint_is_not_run(data, tmp_path):
    torch.save({"objective": Evil(tmp_path / "ran")}, tmp_path / "last.ckpt")
    with pytest.raises(DataError, match="is not a complete checkpoint"):
        train(tiny(data), tmp_path, CPU)
    assert not (tmp_path / "ran").exists()


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_log_that_is_damaged(data, tmp_path, hit):
    hit("term", 4)
    train(tiny(data), tmp_path, CPU)
    (tmp_path / "log.jsonl").write_text("nothing\n")
    with pytest.raises(DataError, match=r"log\.jsonl has a line that is not JSON: .* Take it out"):
        train(tiny(data), tmp_path, CPU)


# -- a full disk, and numbers that are none --------------------------------------------------------


def test_a_full_disk_leaves_the_checkpoint_before_it(data, whole, tmp_path, hit):
    hit("term", 4)
    train(tiny(data), tmp_path, CPU)
    before = (tmp_path / "last.ckpt").read_bytes()
    hit()
    message = (
        r"cannot write the checkpoint .*last\.ckpt: File too large\. The one before it is whole: see to space"
    )
    with full_disk(100_000), pytest.raises(OutputError, match=message):
        train(tiny(data), tmp_path, CPU)
    assert (tmp_path / "last.ckpt").read_bytes() == before
    assert sorted(contents(tmp_path)) == ["last.ckpt", "log.jsonl"]
    assert losses(train(tiny(data), tmp_path, CPU).log) == losses(whole)


def test_a_full_disk_before_the_first_checkpoint(data, tmp_path):
    with full_disk(100_000), pytest.raises(OutputError, match=r"There was none before it\. See to space"):
        train(tiny(data), tmp_path, CPU)
    assert sorted(contents(tmp_path)) == ["log.jsonl"]


def test_a_full_disk_while_logging(data, tmp_path):
    with full_disk(300), pytest.raises(OutputError, match=r"cannot write .*log\.jsonl: File too large"):
        train(tiny(data), tmp_path, CPU)


@pytest.mark.parametrize(
    ("what", "clip_grad", "message"),
    [
        ("nan-loss", 1.0, "^loss of step 5 is nan"),
        ("nan-gradient", 1.0, "^grad_norm of step 5 is nan"),
        ("nan-gradient", None, "^grad_norm of step 5 is nan"),
        ("nan-weight", 1.0, "^loss of step 6 is nan"),
    ],
)
def test_what_is_no_number_stops_the_run(data, whole, tmp_path, hit, what, message, clip_grad):
    recipe = tiny(data, clip_grad=clip_grad)
    hit(what, 5)
    message += (
        r"\. .*last\.ckpt is of step 3, from before it\. Run it again with a lower learning rate \(lr\)"
    )
    with pytest.raises(NonFiniteError, match=message):
        train(recipe, tmp_path, CPU)
    held = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert held["step"] == 3
    assert all(value.isfinite().all() for value in held["objective"].values())
    hit()
    run = train(replace(recipe, lr=5e-4), tmp_path, CPU)
    assert len(losses(run.log)) == 8
    assert losses(run.log)[:3] == losses(whole)[:3] or clip_grad is None


def test_weights_that_are_no_number_are_not_written(data, tmp_path, hit):
    """They would be found by the loss after the checkpoint only."""
    hit("nan-weight", 6)
    with pytest.raises(NonFiniteError, match=r"a weight after step 6 is not a number\. .* is of step 3"):
        train(tiny(data), tmp_path, CPU)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["step"] == 3
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_no_number_before_the_first_checkpoint(data, tmp_path, hit):
    hit("nan-loss", 2)
    with pytest.raises(NonFiniteError, match=r"loss of step 2 is nan\. There is no checkpoint"):
        train(tiny(data), tmp_path, CPU)
