"""k nearest neighbours against scikit-learn's, and the one vector per photo that they and `linear` use."""

from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
import torch
from catalog import CATALOG
from coloured_photos import CLASSES, VIT, by_hand, write_photos
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

import vitreg
from vitreg.config.settings import with_settings
from vitreg.data.datasets.classes import Labelled
from vitreg.errors import DataError, UnsupportedModelError
from vitreg.evals import knn
from vitreg.evals.knn import KnnConfig, evaluate, vote
from vitreg.features.framing import Framing, Normalisation
from vitreg.features.observer import Observer
from vitreg.features.pooling import pooled, poolings_of
from vitreg.fixes import TestTimeRegisters, TokenSplitting
from vitreg.fixes.neurons import RegisterNeuron, RegisterNeurons

QUICK = KnnConfig(workers=0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("coloured")
    write_photos(root / "train", count=12, tint=4.0)
    write_photos(root / "val", tint=4.0, seed=1)
    return root


def sklearn_guess(train: Tensor, labels: Tensor, val: Tensor, k: int, temperature: float = 0.07) -> Tensor:
    classifier = KNeighborsClassifier(
        k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / temperature)
    )
    return torch.from_numpy(classifier.fit(train.numpy(), labels.numpy()).predict(val.numpy()))


# -- the vote ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [2**26, 700])
def test_votes_are_those_of_scikit_learn(monkeypatch, at_once):
    monkeypatch.setattr(knn, "_AT_ONCE", at_once)
    labels = torch.randint(0, 7, (300,))
    centres = torch.randn(7, 16)
    keys = (centres[labels] + 2 * torch.randn(300, 16)) * torch.rand(300, 1) * 9
    queries = centres[torch.randint(0, 7, (120,))] + 2 * torch.randn(120, 16)
    guesses = vote(queries, keys, labels, [1, 10, 200, 300])
    for k, guess in guesses.items():
        assert torch.equal(guess, sklearn_guess(keys, labels, queries, k)), k
    assert not torch.equal(guesses[1], guesses[200])


def test_a_low_temperature_lets_the_nearest_decide():
    keys, labels = torch.tensor([[0.9, 0.436], [0.5, 0.866], [0.5, -0.866]]), torch.tensor([0, 1, 1])
    query = torch.tensor([[1.0, 0.0]])
    assert vote(query, keys, labels, [3], temperature=0.07)[3].tolist() == [0]
    assert vote(query, keys, labels, [3], temperature=10.0)[3].tolist() == [1]
    assert vote(query, keys, labels, [3], temperature=1e-5)[3].tolist() == [0]  # exp(1 / T) would overflow


# -- the task ----------------------------------------------------------------------------------------


def test_accuracy_is_that_of_the_models_own_features(data):
    result = evaluate(VIT, data, KnnConfig(workers=0, k=(1, 5, 20)))
    train, val = by_hand(VIT, data / "train"), by_hand(VIT, data / "val")
    both = [torch.cat(parts[:2], 1) for parts in (train, val)]
    pairs = {"cls": (train[0], val[0]), "mean": (train[1], val[1]), "cls+mean": both}
    seen = set()
    for name, (keys, queries) in pairs.items():
        for k in (1, 5, 20):
            right = sklearn_guess(keys, train[2], queries, k) == val[2]
            assert result.metrics[f"{name} k={k}"].samples[:, 0].tolist() == right.tolist()
            seen.add(result.metrics[f"{name} k={k}"].value)
    assert len(result.metrics) == 9
    assert result.n == 18
    assert len(seen) > 2
    assert max(seen) < 1


def test_last_four_layers_are_joined_last_first(data):
    vit = vit_with(CATALOG["open_clip timm tower"].backbone())  # of 6 layers
    paths = sorted((data / "val").rglob("*.png"))
    joined = pooled(vit, labelled(paths), ["4cls+mean"], QUICK).vectors("4cls+mean").unflatten(1, (5, -1))
    pixels = torch.stack([vit.preprocess(PIL.Image.open(path)) for path in paths])
    expected = ["cls@5", "cls@4", "cls@3", "cls@2", "mean@5"]
    features = Observer(vit, expected)(pixels)
    for i, name in enumerate(expected):
        assert torch.allclose(joined[:, i], features[name], atol=1e-5), name


def test_a_photo_that_cannot_be_read_is_named_and_has_no_say(data, tmp_path):
    write_photos(tmp_path / "train", tint=4.0)
    write_photos(tmp_path / "val", tint=4.0)
    for split, name in (("train", "blue"), ("val", "green")):
        (tmp_path / split / name / "2.png").write_bytes(b"no photo")
    result = evaluate(VIT, tmp_path, KnnConfig(workers=0, k=1, poolings="cls"))
    keys, queries = by_reading(tmp_path / "train"), by_reading(tmp_path / "val")
    right = sklearn_guess(keys[0], keys[1], queries[0], 1) == queries[1]
    assert result.metrics["cls k=1"].samples[:, 0].tolist() == right.tolist()
    assert [note.startswith("1 photos could not be read") for note in result.notes] == [True, True]


def by_reading(folder) -> tuple[Tensor, Tensor]:
    for path in folder.rglob("2.png"):
        if path.read_bytes() == b"no photo":
            path.unlink()
    cls, _, labels = by_hand(VIT, folder)
    return cls, labels


# -- poolings ----------------------------------------------------------------------------------------


def labelled(paths, classes=CLASSES) -> Labelled:
    return Labelled("", tuple(paths), tuple(classes.index(path.parent.name) for path in paths), classes)


def vit_with(vit: vitreg.Backbone) -> vitreg.Backbone:
    """The same with a preprocess."""
    return replace(vit, preprocess=Framing(Normalisation((2, 2, 2), (-1, -1, -1)), size=vit.image_size))


def test_a_model_offers_what_it_has():
    assert poolings_of(VIT, ()) == ("cls", "mean", "cls+mean")  # three layers: no 4cls
    assert "registers" in poolings_of(CATALOG["timm dinov2 registers"].backbone(), ())
    assert poolings_of(CATALOG["timm siglip"].backbone(), ()) == ("mean",)
    deep = CATALOG["open_clip timm tower"].backbone()
    assert poolings_of(deep, ()) == ("cls", "mean", "cls+mean", "4cls", "4cls+mean")
    with TestTimeRegisters({0: [3]}).applied_to(VIT):
        assert poolings_of(VIT, ()) == ("cls", "mean", "cls+mean", "test_registers")
    assert poolings_of(VIT, ["mean"]) == ("mean",)


def test_registers_trained_and_test_time_are_their_mean(data):
    vit = CATALOG["timm dinov2 registers"].backbone()
    paths = sorted((data / "val").rglob("*.png"))
    pixels = torch.stack([vit.preprocess(PIL.Image.open(path)) for path in paths])
    with TestTimeRegisters({0: [3, 7]}, registers=2, share="split").applied_to(vit) as handle:
        found = pooled(vit, labelled(paths), ["registers", "test_registers"], QUICK)
        with torch.no_grad():
            tokens = vit.model.forward_features(pixels)
            carried = vit.model.norm(handle.carried)
    assert carried.shape[1] == 2
    assert torch.allclose(found.vectors("registers"), tokens[:, 1:5].mean(1), atol=1e-5)
    assert torch.allclose(found.vectors("test_registers"), carried.mean(1), atol=1e-5)


def test_photos_without_a_split_token_have_zeros_and_are_counted(data):
    paths = sorted((data / "val").rglob("*.png"))
    pixels = torch.stack([VIT.preprocess(PIL.Image.open(path)) for path in paths])
    with torch.no_grad(), vitreg.trace(VIT, neurons=True) as t:
        VIT(pixels)
    peaks = t.neurons[0][:, t.layout.patch_slice, 3].amax(1)
    level = float(peaks.sort().values[-5:-3].mean())  # between the fourth and the fifth of the photos
    neurons = RegisterNeurons((RegisterNeuron(0, 3, threshold=level),))
    with TokenSplitting(neurons).applied_to(VIT):
        found = pooled(VIT, labelled(paths), ["test_registers"], QUICK)
    empty = ~found.vectors("test_registers").any(1)
    assert torch.equal(empty, peaks < level)
    assert int(empty.sum()) == len(paths) - 4
    assert found.notes == (
        f"{len(paths) - 4} of {len(paths)} photos have no test_registers: zeros stand for them",
    )


# -- what is refused ---------------------------------------------------------------------------------


def test_a_pooling_that_the_model_does_not_have(data):
    with pytest.raises(UnsupportedModelError, match=r"no registers, .* It has cls, mean, cls\+mean\."):
        evaluate(VIT, data, KnnConfig(workers=0, poolings="registers"))
    with pytest.raises(UnsupportedModelError, match="no cls@-4, which the pooling 4cls needs"):
        evaluate(VIT, data, KnnConfig(workers=0, poolings=("4cls",)))
    with pytest.raises(DataError, match=r"no pooling is called 'clss'\. Did you mean cls"):
        evaluate(VIT, data, KnnConfig(workers=0, poolings="clss"))


def test_more_neighbours_than_photos(data):
    result = evaluate(VIT, data, KnnConfig(workers=0, poolings="cls"))
    assert list(result.metrics) == ["cls k=10", "cls k=20"]
    assert result.notes == ("k=100, 200 left out: there are only 36 training photos",)
    assert "cls k=36" in evaluate(VIT, data, KnnConfig(workers=0, k=36)).metrics
    with pytest.raises(DataError, match=r"36 training photos, fewer than k=50\. Use --set k=36"):
        evaluate(VIT, data, KnnConfig(workers=0, k=50))


@pytest.mark.parametrize("settings", [{"k": "0"}, {"k": "[]"}, {"k": "[-1, 5]"}, {"temperature": "0"}])
def test_settings_out_of_range(data, settings):
    with pytest.raises(DataError, match=f"^{next(iter(settings))}=.*expected"):
        evaluate(VIT, data, with_settings(QUICK, settings))


def test_data_that_do_not_hold_together(tmp_path):
    write_photos(tmp_path / "one" / "train", CLASSES[:1], 2)
    write_photos(tmp_path / "one" / "val", CLASSES[:1], 2)
    write_photos(tmp_path / "other" / "train", CLASSES, 2)
    write_photos(tmp_path / "other" / "val", CLASSES[:2], 2)
    for name, message in (
        ("one", r"one class only \(blue\)"),
        ("other", "other classes: red in one only"),
        ("absent", "there is no folder .*train. Expected train/CLASS"),
    ):
        with pytest.raises(DataError, match=message):
            evaluate(VIT, tmp_path / name)


# -- the real model ----------------------------------------------------------------------------------


def test_the_real_model_knows_its_neighbours(shared):
    vit = vitreg.load(str(shared / "models" / "vit_tiny_patch16_224.augreg_in21k_ft_in1k"))
    result = evaluate(vit, shared / "data" / "imagenette", KnnConfig(workers=0, k=5, limit=40))
    assert result.metrics["cls k=5"].value > 0.85
    assert result.metrics["mean k=5"].value > 0.6
