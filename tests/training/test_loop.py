"""The loop on one processor: what it computes, writes, shows and refuses."""

import math
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_runs import CPU, losses, same, save_classes, tiny, weights

import vitreg
from vitreg.errors import DataError, MissingExtraError, OutputError
from vitreg.training.log import Log, read_log
from vitreg.training.loop import Machine, train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classes(tmp_path_factory.mktemp("photos"))


PLAIN = {"mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0}


def test_micro_batches_make_the_whole_batch(data, tmp_path):
    for micro in (16, 4):
        train(tiny(data, batch_size=16, micro_batch=micro, steps=4, **PLAIN), tmp_path / f"{micro}", CPU)
    whole, parts = (read_log(tmp_path / name) for name in ("16", "4"))
    for name in ("loss", "grad_norm", "train_top1"):
        values = [[line[name] for line in log] for log in (parts, whole)]
        assert values[0] == pytest.approx(values[1], rel=1e-5, abs=1e-5)


def test_the_learning_rate_rises_and_falls_as_half_a_cosine(data, tmp_path):
    run = train(tiny(data, warmup=2, lr=1.0, min_lr=0.1, optimizer="sgd", clip_grad=1e-9), tmp_path, CPU)
    cosine = [0.1 + 0.9 * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]
    assert [line["lr"] for line in run.log] == pytest.approx([0.1, 0.55, *cosine[2:]], rel=1e-4)


def test_a_gradient_is_clipped_to_its_norm(data, tmp_path):
    recipe = tiny(
        data, steps=1, lr=1.0, min_lr=1.0, warmup=0, optimizer="sgd", weight_decay=0.0, clip_grad=0.5
    )
    run = train(recipe, tmp_path, CPU)
    assert run.log[0]["grad_norm"] > 0.5
    held = torch.load(tmp_path / "last.ckpt", weights_only=True)["optimizer"]["state"]
    first = [state["momentum_buffer"] for state in held.values()]  # of one step: its gradient
    assert math.sqrt(sum(float(m.square().sum()) for m in first)) == pytest.approx(0.5, rel=1e-3)


def test_the_log_has_what_is_due(data, tmp_path):
    settings = {"log_every": 3, "evaluate_every": 4, "diagnose_every": 5}
    log = train(tiny(data, **settings), tmp_path, CPU).log
    assert [line["step"] for line in log] == [3, 4, 5, 6, 8]
    assert [line["step"] for line in log if "top1" in line] == [4, 8]
    assert [line["step"] for line in log if "outliers" in line] == [5, 8]
    assert all({"loss", "train_top1", "grad_norm", "lr", "photos_per_second"} <= line.keys() for line in log)


def test_a_diagnosis_is_that_of_the_same_weights_and_changes_nothing(data, tmp_path):
    for every in (0, 4):
        train(tiny(data, diagnose_every=every), tmp_path / f"{every}", CPU)
    assert losses(tmp_path / "4") == losses(tmp_path / "0")
    assert same(weights(tmp_path / "4"), weights(tmp_path / "0"))
    recipe = tiny(data)
    vit = vitreg.load(str(tmp_path / "4" / "model"), size=recipe.image_size)
    found = vitreg.diagnose(vit, list(recipe.objective().photos), examples=0)
    line = read_log(tmp_path / "4")[-1]
    ratio = max(layer.max_norm / layer.median_norm for layer in found.layers)
    assert line["norm_ratio"] == pytest.approx(ratio, rel=1e-4)
    assert line["outliers"] == pytest.approx(100 * found.outlier_fraction, rel=1e-4)
    assert line["norm_ratio"] != read_log(tmp_path / "4")[3]["norm_ratio"]


def test_what_comes_out_is_a_model(data, tmp_path):
    run = train(tiny(data, registers=2), tmp_path, CPU)
    assert run.written == {"model": tmp_path / "model"}
    vit = vitreg.load(str(run.written["model"]))
    held = torch.load(tmp_path / "last.ckpt", weights_only=True)["objective"]
    state = {f"vit.{name}": value for name, value in vit.model.state_dict().items()}
    assert same(state, {name: value for name, value in held.items() if name.startswith("vit.")})
    assert vit.layout.registers == 2


def test_bfloat16_is_near_and_nothing_is_said(data, tmp_path, capfd):
    train(tiny(data, steps=4), tmp_path / "full", CPU)
    train(tiny(data, steps=4), tmp_path / "half", replace(CPU, precision="bf16-mixed"))
    full, half = (losses(tmp_path / name) for name in ("full", "half"))
    assert full != half
    assert half == pytest.approx(full, abs=0.03)
    assert {value.dtype for value in weights(tmp_path / "half").values() if value.is_floating_point()} == {
        torch.float32
    }
    assert capfd.readouterr() == ("", "")


def test_events_for_tensorboard_are_those_of_the_log(data, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries that tensorboard imports
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tiny(data, steps=3), tmp_path, replace(CPU, tensorboard=True))
    log = train(tiny(data, steps=5), tmp_path, replace(CPU, tensorboard=True)).log
    events = EventAccumulator(str(tmp_path)).Reload()
    for name in ("loss", "lr", "grad_norm"):
        found = events.Scalars(name)
        assert [event.step for event in found] == [1, 2, 3, 4, 5]
        assert [event.value for event in found] == pytest.approx([line[name] for line in log], rel=1e-4)


def test_the_log_of_what_is_not_finite_is_still_json(tmp_path):
    Log(tmp_path, 0).write(1, {"loss": 0.123456789, "norm_ratio": math.inf})
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1, "loss": 0.123457, "norm_ratio": null}\n'


def test_tensorboard_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"tensorboard is not installed.*vitreg\[train\]"):
        Log(tmp_path, 0, tensorboard=True)


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": "nowhere"}, r"there is no folder nowhere/train\. Expected train/CLASS"),
        ({"batch_size": 64}, r"found 48 photos, expected at least as many as a batch has, 64"),
        ({"optimizer": "adamww"}, r"timm has no optimizer 'adamww'\. Did you mean adamw\?"),
    ],
)
def test_a_recipe_that_cannot_be_trained(data, tmp_path, settings, message):
    with pytest.raises(DataError, match=message):
        train(tiny(**{"data": data} | settings), tmp_path / "run", CPU)
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        ({"precision": "16-mixed"}, r"precision=16-mixed needs loss scaling\. Use bf16-mixed"),
        ({"precision": "fp7"}, "cannot train on this machine as asked: .*fp7"),
        ({"accelerator": "abacus"}, "cannot train on this machine as asked: .*abacus"),
        ({"strategy": "fsdp"}, "cannot train on this machine as asked: .*FSDP is only available on GPU"),
    ],
)
def test_a_machine_that_there_is_not(data, tmp_path, machine, message):
    with pytest.raises(DataError, match=message):
        train(tiny(data), tmp_path, Machine(**{"accelerator": "cpu"} | machine))


def test_a_folder_that_cannot_be_written(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot make the folder .*file: File exists\. Choose another"):
        train(tiny(data), tmp_path / "file", CPU)
    with pytest.raises(OutputError, match=r"cannot (make the folder|write) /proc"):
        train(tiny(data), "/proc/vitreg", CPU)


def test_a_damaged_photo_is_replaced_by_the_next(data, tmp_path):
    save_classes(tmp_path / "photos", 4, 1)
    (tmp_path / "photos" / "train" / "c1" / "001.png").write_bytes(b"no photo")
    with pytest.warns(UserWarning, match=r"001\.png is left out"):
        run = train(tiny(tmp_path / "photos", batch_size=12, steps=2), tmp_path / "run", CPU)
    assert run.step == 2


def test_ten_damaged_photos_in_a_row(data, tmp_path):
    for path in save_classes(tmp_path / "photos", 8, 1).glob("train/*/*"):
        path.write_bytes(b"no photo")
    with (
        pytest.warns(UserWarning, match="is left out"),
        pytest.raises(DataError, match=r"ten photos in a row cannot be read, the first of them .*png"),
    ):
        train(tiny(tmp_path / "photos"), tmp_path / "run", CPU)
