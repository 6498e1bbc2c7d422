"""The probe of single tokens: which token of which photo, fair rows, clear refusals, the papers' claim."""

import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from catalog import CATALOG
from phantoms import Planted, save_crops

import vitreg
from vitreg.data.datasets.classes import splits
from vitreg.errors import DataError
from vitreg.evals import evaluate, tokens
from vitreg.evals.outlier_masks import outlier_masks, unfixed_diagnosis
from vitreg.evals.tokens import TokensConfig
from vitreg.models.probe import evaluating

pytestmark = pytest.mark.slow

COLOURS = ("dark", "light")


def save_classes(root: Path, train: int, val: int) -> Path:
    """Crops of the bundled photos, by brightness: dark/ and light/ in train/ and val/."""
    crops = sorted(save_crops(root / "crops", 2 * (train + val)).iterdir(), key=brightness)
    half = len(crops) // 2
    for name, photos in zip(COLOURS, (crops[:half], crops[half:]), strict=True):
        for i, photo in enumerate(photos):
            folder = root / ("train" if i % (train + val) < train else "val") / name
            folder.mkdir(parents=True, exist_ok=True)
            shutil.move(photo, folder / photo.name)
    (root / "crops").rmdir()
    return root


def brightness(path: Path) -> float:
    return float(np.asarray(PIL.Image.open(path).convert("L")).mean())


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return save_classes(tmp_path_factory.mktemp("classes"), 40, 15)


@pytest.fixture(scope="module")
def planted(photos) -> Planted:
    return Planted(photos / "train")


def drawn(vit: vitreg.Backbone, photos: Path, seed: int = 0) -> dict[str, np.ndarray]:
    train = splits(photos)[0]
    report = unfixed_diagnosis(vit, train.paths, TokensConfig())
    return tokens._tokens(vit, report, train, TokensConfig(seed=seed)).kinds


@pytest.fixture(scope="module")
def before(planted, photos) -> dict[str, np.ndarray]:
    return drawn(planted.vit, photos)


def test_each_token_is_of_its_kind(before, planted, photos):
    train = splits(photos)[0]
    truth = torch.cat([planted.phantom.marked(batch) for batch in planted.images]).flatten(1).numpy()
    with evaluating(planted.vit.model):
        stream = torch.cat([planted.vit.model.forward_features(batch) for batch in planted.images]).numpy()
    assert len(train.paths) == len(stream) == 80
    for i, marked in enumerate(truth):
        kinds = {kind: rows[i] for kind, rows in before.items()}
        patches = stream[i, 1:]
        assert np.allclose(kinds["CLS"], stream[i, 0], atol=1e-4)
        assert np.allclose(kinds["central patch"], patches[2 * 5 + 2], atol=1e-4)
        assert one_of(kinds["normal patch"], patches[~marked])
        assert one_of(kinds["outlier"], patches[marked]) if marked.any() else np.isnan(kinds["outlier"]).all()


def one_of(token: np.ndarray, tokens: np.ndarray) -> bool:
    return bool(np.isclose(tokens, token, atol=1e-4).all(1).any())


def test_the_draw_follows_the_seed(before, planted, photos):
    assert np.array_equal(drawn(planted.vit, photos)["normal patch"], before["normal patch"])
    assert not np.array_equal(drawn(planted.vit, photos, seed=1)["normal patch"], before["normal patch"])


def test_splitting_changes_former_outliers_alone(before, planted, photos):
    """The same places are drawn; the originals that it carries are the outliers as they were."""
    with planted.splitting.applied_to(planted.vit):
        after = drawn(planted.vit, photos)
    has = ~np.isnan(before["outlier"][:, 0])
    assert 10 < has.sum() < 70
    assert np.allclose(after["normal patch"], before["normal patch"], atol=1e-3)
    assert not np.isclose(after["outlier"][has], before["outlier"][has], atol=1e-3).all(1).any()
    carried = after["test-time register"]
    assert np.array_equal(np.isnan(carried[:, 0]), ~has)
    masks = outlier_masks(
        planted.vit,
        unfixed_diagnosis(planted.vit, splits(photos)[0].paths, TokensConfig()),
        splits(photos)[0].paths,
        TokensConfig(),
    )
    single = masks.sum(1) == 1
    assert single.sum() > 3
    assert np.allclose(carried[single], before["outlier"][single], atol=1e-3)


def test_photos_without_an_outlier_are_left_out_and_counted(planted, photos):
    with planted.register.applied_to(planted.vit):
        result = evaluate("tokens", planted.vit, photos)
    assert list(result.metrics) == [
        "normal patch", "outlier", "central patch", "CLS", "test-time register", "normal patch, same photos",
    ]  # fmt: skip
    assert result.n == 30
    none = np.isnan(result.metrics["outlier"].samples[:, 0])
    assert 0 < none.sum() < 30
    assert np.array_equal(none, np.isnan(result.metrics["normal patch, same photos"].samples[:, 0]))
    assert not np.isnan(result.metrics["CLS"].samples).any()
    assert any(f"and {none.sum()} of 30 val photos have none" in note for note in result.notes)


def test_classes_are_told_apart_by_what_tokens_hold():
    """One kind holds the class in one dimension, at a small scale beside a constant; the other does not."""
    random = np.random.default_rng(0)
    sides = []
    for images in (100, 60):
        labels = np.arange(images) % 2
        noise = random.normal(size=(2, images, 8))
        noise[0, :, 3] = 500 + 0.01 * (labels + 0.1 * noise[0, :, 3])
        sides.append(tokens._Tokens(labels, {"knows": noise[0], "guesses": noise[1]}, ()))
    known, asked = (np.ones(len(side.labels), dtype=bool) for side in sides)
    known[::7] = False
    assert tokens._right(*sides, "knows", known, asked).all()
    assert 0.3 < tokens._right(*sides, "guesses", known, asked).mean() < 0.7


def test_the_held_out_fifth_is_of_all_classes():
    labels = np.repeat([0, 1, 2], [10, 5, 3])
    fit, held = tokens._one_fold(labels)
    assert sorted([*fit, *held]) == list(range(18))
    assert np.bincount(labels[held], minlength=3).tolist() == [2, 1, 0]


def test_without_artifacts_there_is_no_row_of_outliers(planted, photos):
    result = evaluate("tokens", planted.clean, photos)
    assert list(result.metrics) == ["normal patch", "central patch", "CLS"]
    assert "no artifacts, so there are no outliers to probe" in result.full()


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("timm dinov2 registers", ["normal patch", "central patch", "CLS", "trained register"]),
        ("timm siglip", ["normal patch", "central patch"]),
    ],
)
def test_rows_are_of_the_tokens_that_a_model_has(photos, name, rows):
    result = evaluate("tokens", CATALOG[name].backbone(), photos, TokensConfig(limit=20))
    assert list(result.metrics) == rows


def test_test_time_registers_are_those_after_the_last_block(planted, photos):
    with planted.register.applied_to(planted.vit):
        result = evaluate("tokens", planted.vit, photos, TokensConfig(layer=1))
    assert "outlier" in result.metrics
    assert "test-time register" not in result.metrics


def test_too_few_photos_of_each_class_are_refused(planted, tmp_path):
    data = save_classes(tmp_path, 3, 2)
    with pytest.raises(
        DataError, match=r"train/ of .* at most 3 photos of a class, but at least 5 are needed"
    ):
        evaluate("tokens", planted.clean, data)


def test_a_kind_with_too_few_photos_gets_no_row(planted, photos):
    """Of the evenly spread photos, few have an outlier."""
    result = evaluate("tokens", planted.vit, photos, TokensConfig(limit=10))
    assert "outlier" not in result.metrics
    assert any(note.startswith("No row for outlier: of photos with one, train/ has") for note in result.notes)


def test_a_layer_that_is_not_there_is_refused(planted, photos):
    with pytest.raises(DataError, match=r"layer=3: the blocks of .* are 0 to 2"):
        evaluate("tokens", planted.clean, photos, TokensConfig(layer=3))


def test_real_outliers_know_the_class(shared):
    """The papers' claim, on a real model with artifacts and 50 + 50 photos of 10 classes."""
    vit = vitreg.load(str(shared / "models/vit_tiny_patch16_224.augreg_in21k_ft_in1k"))
    result = evaluate("tokens", vit, shared / "data/imagenette", TokensConfig(limit=50, workers=0))
    assert result.metrics["outlier"].less(result.metrics["normal patch"]).low > 0
    assert result.metrics["outlier"].value > 0.7
