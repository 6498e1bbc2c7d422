"""Linear classifiers: each head against a plain training loop of its own; choices never see val/."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from coloured_photos import CLASSES, VIT, by_hand, write_photos
from sklearn.linear_model import LogisticRegression

import vitreg
from vitreg.config.settings import with_settings
from vitreg.errors import DataError, UnsupportedModelError
from vitreg.evals import find_task, linear
from vitreg.evals.linear import LinearConfig, evaluate, hold_out, trained
from vitreg.features.pooling import Pooled

LOGISTIC = LinearConfig(protocol="logistic", workers=0, held_out=0.25)
SGD = LinearConfig(protocol="dinov2", workers=0, steps=150, train_batch=32, held_out=0.25)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("coloured")
    write_photos(root / "train", count=24, tint=6.0)
    write_photos(root / "val", count=12, tint=6.0, seed=1)
    return root


def moons(n: int = 90, d: int = 8, classes: int = 3, spread: float = 1.5) -> Pooled:
    labels = torch.arange(n) % classes
    return Pooled({"cls": torch.randn(classes, d)[labels] + spread * torch.randn(n, d)}, labels, ())


# -- DINOv2's protocol -------------------------------------------------------------------------------


def test_each_head_is_what_a_training_loop_of_its_own_gives(monkeypatch):
    """With all photos in each batch, so that their order does not matter."""
    monkeypatch.setattr(linear, "RATES", (0.003, 0.1, 0.7))
    photos, fit = moons(), torch.arange(60)
    config = LinearConfig(steps=40, train_batch=60, seed=3)
    head = trained(photos, ("cls",), fit, config, torch.device("cpu"))["cls"]
    start = torch.empty(9, 8).normal_(0, 0.01, generator=torch.Generator().manual_seed(3))
    for i, rate in enumerate((0.003, 0.1, 0.7)):
        alone = torch.nn.Linear(8, 3)
        alone.weight.data, alone.bias.data = start[3 * i : 3 * i + 3].clone(), torch.zeros(3)
        optimiser = torch.optim.SGD(alone.parameters(), lr=rate * 60 / 256, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 40, eta_min=0)
        for _ in range(40):
            optimiser.zero_grad()
            F.cross_entropy(alone(photos.parts["cls"][:60]), photos.labels[:60]).backward()
            optimiser.step()
            schedule.step()
        assert torch.allclose(head.weight[3 * i : 3 * i + 3], alone.weight, atol=1e-5)
        assert torch.allclose(head.bias[3 * i : 3 * i + 3], alone.bias, atol=1e-5)
        assert not torch.allclose(alone.weight, start[3 * i : 3 * i + 3], atol=1e-3)


def test_batches_go_through_all_photos_before_any_comes_again(monkeypatch):
    photos, seen = moons(), []
    vectors = Pooled.vectors

    def saw(self, pooling, rows=slice(None)):
        if isinstance(rows, torch.Tensor):
            seen.append(rows)
        return vectors(self, pooling, rows)

    monkeypatch.setattr(Pooled, "vectors", saw)
    fit = torch.arange(10, 70)
    trained(photos, ("cls",), fit, LinearConfig(steps=8, train_batch=16), torch.device("cpu"))
    assert [len(rows) for rows in seen] == [16] * 8
    order = torch.cat(seen)
    assert torch.equal(order[:60].sort().values, fit)
    assert torch.equal(order[60:120].sort().values, fit)
    assert not torch.equal(order[:60], order[60:120])


def test_a_head_that_diverges_harms_no_other(monkeypatch, data):
    monkeypatch.setattr(linear, "RATES", (0.05,))
    one = evaluate(VIT, data, replace(SGD, poolings="cls"))
    monkeypatch.setattr(linear, "RATES", (0.05, 1e30))
    two = evaluate(VIT, data, replace(SGD, poolings="cls"))
    assert "learning rates: cls 0.05;" in two.notes[-1]
    assert one.metrics["cls"].value > 0.6
    assert abs(two.metrics["cls"].value - one.metrics["cls"].value) < 0.15  # they start elsewhere


def test_the_best_head_is_chosen_twice(data):
    result = evaluate(VIT, data, SGD)
    found = {name: metric.value for name, metric in result.metrics.items()}
    assert list(found) == ["cls", "mean", "cls+mean", "best head", "best head on val"]
    best = result.notes[-1].rpartition("best head ")[2]
    assert best in ("cls", "cls+mean")  # DINOv2 has no head on the mean patch alone
    assert found["best head"] == found[best]
    assert found["best head on val"] >= max(found["cls"], found["cls+mean"])
    assert found["best head on val"] > 0.6


def test_the_best_head_is_the_best_on_held_out_photos():
    known = moons(spread=0.5)
    photos = Pooled({"cls": torch.randn(90, 8), "mean": known.parts["cls"]}, known.labels, ())
    parts = torch.arange(60), torch.arange(60, 90)
    config = LinearConfig(steps=60, train_batch=60)
    metrics, note = linear._dinov2(photos, photos, ("cls", "cls+mean"), parts, config, torch.device("cpu"))
    assert note.endswith("best head cls+mean")
    assert metrics["best head"].value > 0.95 > metrics["cls"].value + 0.1


# -- logistic regression -----------------------------------------------------------------------------


def test_the_regularisation_is_chosen_on_held_out_photos_and_all_are_fitted(data):
    result = evaluate(VIT, data, LOGISTIC)
    keys, _, labels = by_hand(VIT, data / "train")
    queries, _, truth = by_hand(VIT, data / "val")
    fit, held = hold_out(labels, LOGISTIC, CLASSES)

    def guess(c, rows, asked):
        mean, deviation = keys[rows].mean(0), keys[rows].std(0, correction=0)
        model = LogisticRegression(C=c, max_iter=5000).fit((keys[rows] - mean) / deviation, labels[rows])
        return torch.from_numpy(model.predict((asked - mean) / deviation))

    right = {c: (guess(c, fit, keys[held]) == labels[held]).float().mean() for c in linear.STRENGTHS}
    best = max(right, key=right.__getitem__)
    assert len(set(map(float, right.values()))) > 2
    assert f"C: cls {best:g}," in result.notes[-1]
    hits = guess(best, torch.arange(len(labels)), queries) == truth
    assert result.metrics["cls"].samples[:, 0].tolist() == hits.tolist()
    assert result.metrics["cls"].value > 0.6


def test_one_that_does_not_converge_says_so(monkeypatch, data):
    monkeypatch.setattr(linear, "_ITERATIONS", 2)
    assert "(not converged in 2 iterations)" in evaluate(VIT, data, LOGISTIC).notes[-1]


# -- both --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [LOGISTIC, SGD], ids=["logistic", "dinov2"])
def test_choices_do_not_see_val(config, data, tmp_path):
    shutil.copytree(data / "train", tmp_path / "train")
    for name, other in zip(CLASSES, (*CLASSES[1:], CLASSES[0]), strict=True):
        shutil.copytree(data / "val" / other, tmp_path / "val" / name)
    rotated, result = evaluate(VIT, tmp_path, config), evaluate(VIT, data, config)
    assert rotated.notes == result.notes
    assert rotated.metrics["cls"].value < 0.4 < result.metrics["cls"].value


def test_held_out_photos_are_an_equal_part_of_each_class():
    labels = torch.tensor([0] * 40 + [1] * 20 + [4] * 20)
    fit, held = hold_out(labels, LinearConfig(held_out=0.25), tuple("abcde"))
    assert sorted([*fit.tolist(), *held.tolist()]) == list(range(80))
    assert np.bincount(labels[held]).tolist() == [10, 5, 0, 0, 5]
    again, other = (
        hold_out(labels, LinearConfig(held_out=0.25, seed=seed), tuple("abcde")) for seed in (0, 1)
    )
    assert torch.equal(again[1], held)
    assert not torch.equal(other[1].sort().values, held.sort().values)
    assert len(hold_out(labels, LinearConfig(held_out=0.001), tuple("abcde"))[1]) == 3
    assert len(hold_out(labels, LinearConfig(held_out=0.999), tuple("abcde"))[0]) == 3


def test_auto_is_by_the_number_of_training_photos(monkeypatch, data):
    config = replace(SGD, protocol="auto", poolings="cls", steps=2)
    assert list(evaluate(VIT, data, config).metrics) == ["cls"]
    monkeypatch.setattr(linear, "_FEW", 71)
    assert "best head on val" in evaluate(VIT, data, config).metrics
    assert "best head on val" not in evaluate(VIT, data, replace(config, limit=71)).metrics


def test_too_few_photos_of_a_class(tmp_path):
    write_photos(tmp_path / "train", count=2)
    write_photos(tmp_path / "val", count=1)
    assert evaluate(VIT, tmp_path, LOGISTIC).n == 3
    (tmp_path / "train" / "green" / "0.png").unlink()
    with pytest.raises(DataError, match="class green has 1 training photo; at least 2"):
        evaluate(VIT, tmp_path, LOGISTIC)
    for name in ("red", "green"):
        for path in (tmp_path / "train" / name).iterdir():
            path.write_bytes(b"no photo")
    with pytest.raises(DataError, match=r"all training photos are of one class \(blue\)"):
        evaluate(VIT, tmp_path, LOGISTIC)


def test_one_class_and_other_classes(tmp_path):
    write_photos(tmp_path / "train", CLASSES[:2], 2)
    write_photos(tmp_path / "val", CLASSES, 2)
    with pytest.raises(DataError, match="other classes: red in one only"):
        evaluate(VIT, tmp_path, LOGISTIC)
    write_photos(tmp_path / "one" / "train", CLASSES[:1], 2)
    with pytest.raises(DataError, match=r"one class only \(blue\)"):
        evaluate(VIT, tmp_path / "one", LOGISTIC)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"held_out": "1.5"}, "held_out=1.5: expected a part"),
        ({"steps": "0"}, "steps and train_batch: expected whole numbers from 1 on"),
        ({"train_batch": "-1"}, "steps and train_batch"),
        ({"protocol": "dino"}, "protocol=dino: .*Expected one of"),
    ],
)
def test_settings_out_of_range(data, setting, message):
    with pytest.raises(DataError, match=message):
        evaluate(VIT, data, with_settings(LinearConfig(), setting))


def test_a_pooling_that_the_model_does_not_have(data):
    with pytest.raises(UnsupportedModelError, match="no registers"):
        evaluate(VIT, data, replace(LOGISTIC, poolings="registers"))


def test_both_protocols_on_the_real_model(shared):
    vit = vitreg.load(str(shared / "models" / "vit_tiny_patch16_224.augreg_in21k_ft_in1k"))
    config = LinearConfig(protocol="dinov2", steps=100, held_out=0.25, limit=40, workers=0)
    result = find_task("linear").evaluate(vit, shared / "data" / "imagenette", config)
    assert result.metrics["best head"].value > 0.85
    assert list(result.metrics)[3:5] == ["4cls", "4cls+mean"]
