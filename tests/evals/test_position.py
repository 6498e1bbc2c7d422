"""The position probe: exact on made tokens, honest where outliers keep to places, true on real models."""

from pathlib import Path

import numpy as np
import pytest
import torch
from phantoms import Planted, save_crops

import vitreg
from vitreg.errors import DataError
from vitreg.evals import evaluate
from vitreg.evals.position import PositionConfig, measured, where_outliers_are
from vitreg.evals.probes import PatchConfig, Patches, drawn_patches
from vitreg.models.probe import evaluating

GRID = (4, 5)
PATCHES = 20


def made(photos: int, outlier: np.ndarray, seed: int, hidden: bool = False) -> Patches:
    """All patches of some photos. Normal tokens hold their place, one-hot; outliers nothing, or elsewhere."""
    random = np.random.default_rng(seed)
    place = np.tile(np.arange(PATCHES), photos)
    mask = outlier.reshape(-1)
    holds = np.eye(PATCHES)[place]
    tokens = np.hstack([holds * ~mask[:, None], holds * (mask[:, None] & hidden)])
    tokens += random.normal(0, 0.1, tokens.shape)
    photo = np.repeat(np.arange(photos), PATCHES)
    paths = tuple(Path(f"{i}.png") for i in range(photos))
    return Patches(tokens.astype(np.float32), place, photo, mask, paths, GRID)


def anywhere(photos: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((photos, PATCHES)) < 0.1


def probed(outlier, hidden: bool = False):
    return measured(made(60, outlier(60, 1), 3, hidden), made(30, outlier(30, 2), 4, hidden))


def test_outliers_that_hold_nothing_cannot_be_placed():
    metrics, notes = probed(anywhere)
    assert metrics["top-1: normal patches"].value > 0.99
    assert metrics["top-1: normal, same places"].value > 0.99
    assert metrics["top-1: outliers"].value < 0.25
    assert metrics["top-1: outliers, own probe"].value < 0.25
    assert metrics["distance: normal patches"].value < 0.05 < 1 < metrics["distance: outliers"].value
    assert notes[0].startswith("Outliers are not bound to places")


def test_what_outliers_hold_in_another_form_their_own_probe_finds():
    """A probe of all patches, of which outliers are few, is not to be taken for what outliers hold."""
    metrics, _ = probed(lambda photos, seed: anywhere(photos, seed), hidden=True)
    assert metrics["top-1: outliers, own probe"].value > 0.95


def test_outliers_bound_to_places_are_called_confounded():
    """They hold nothing, and yet their places are guessed."""

    def corners(photos: int, seed: int) -> np.ndarray:
        mask = np.zeros((photos, PATCHES), dtype=bool)
        mask[:, [0, PATCHES - 1]] = True
        mask[::10, 0] = False
        return mask

    metrics, notes = probed(corners)
    assert metrics["top-1: outliers"].value > 0.4
    assert metrics["top-1: outliers, by usual place"].value == pytest.approx(30 / 57)
    assert notes[0].startswith("CONFOUNDED")
    assert "holds 52.6% of them (an even spread: 5.0%)" in notes[0]
    assert "53% of them lie where no normal test patch does" in notes[0]


def test_normal_patches_are_weighted_to_the_places_of_outliers():
    test = made(3, np.zeros((3, PATCHES), dtype=bool), 0)
    test.outlier[[3, 7, PATCHES + 3]] = True  # two of three photos at place 3, one at place 7
    weights = where_outliers_are(test)
    assert weights.sum() == 3
    assert weights[2 * PATCHES + 3] == 2
    assert weights[PATCHES + 7] == weights[2 * PATCHES + 7] == 0.5


def test_distance_is_in_patches():
    """Outliers lie in row 1, column 2 of the training photos, in row 3, column 3 of the test photos."""
    masks = np.zeros((2, 60, PATCHES), dtype=bool)
    masks[0, :, 7] = masks[1, :, 18] = True
    metrics, _ = measured(made(60, masks[0], 3), made(60, masks[1], 4))
    assert metrics["distance: outliers, by usual place"].value == pytest.approx(5**0.5)
    assert metrics["top-1: outliers, by usual place"].value == 0


# -- what is drawn ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return save_crops(tmp_path_factory.mktemp("photos"), 60)


@pytest.fixture(scope="module")
def planted(photos) -> Planted:
    return Planted(photos)


@pytest.fixture(scope="module")
def drawn(planted, photos):
    return drawn_patches(planted.vit, photos, PatchConfig(patches=4))


def test_no_photo_is_both_trained_and_tested_on(drawn, photos):
    train, test, _ = drawn
    assert sorted(train.paths + test.paths) == sorted(photos.iterdir())
    assert (len(train.paths), len(test.paths)) == (45, 15)


def test_outliers_are_those_that_were_planted(drawn, planted):
    truth = torch.cat([planted.phantom.marked(batch) for batch in planted.images]).flatten(1).numpy()
    for side in drawn[:2]:
        names = [int(path.stem) for path in side.paths]
        assert np.array_equal(side.outlier, truth[names][side.photo, side.place])
    assert drawn[1].outlier.sum() == truth[names].sum() > 5  # of the test photos, all


def test_training_patches_are_drawn_evenly(drawn):
    train, test, _ = drawn
    assert np.bincount(train.photo).tolist() == [4] * 45
    assert np.bincount(test.photo).min() >= 16
    assert len(set(train.place)) == 20


def test_tokens_are_those_of_their_places(drawn, planted):
    train = drawn[0]
    photo = next(iter(vitreg.read_images([train.paths[0]], planted.vit))).pixels
    with evaluating(planted.vit.model):
        tokens = planted.vit.model.forward_features(photo)[0, 1:]  # after the final norm
    assert np.allclose(train.tokens[:4], tokens[train.place[:4]].numpy(), atol=1e-4)


def test_a_fix_changes_tokens_and_nothing_else_of_the_draw(drawn, planted, photos):
    with planted.splitting.applied_to(planted.vit):
        fixed = drawn_patches(planted.vit, photos, PatchConfig(patches=4))
    for before, after in zip(drawn[:2], fixed[:2], strict=True):
        assert before.paths == after.paths
        assert all(
            np.array_equal(getattr(before, k), getattr(after, k)) for k in ("place", "photo", "outlier")
        )
        same = np.isclose(before.tokens, after.tokens, atol=1e-3).all(1)
        assert np.array_equal(same, ~before.outlier)
    assert fixed[2] == drawn[2]


def test_the_outliers_may_be_those_of_another_model(drawn, planted, photos):
    other = drawn_patches(planted.clean, photos, PatchConfig(patches=4), marking=planted.vit)
    assert np.array_equal(other[1].outlier, drawn[1].outlier)
    assert np.array_equal(other[1].place, drawn[1].place)


def test_without_artifacts_there_are_no_rows_of_outliers(planted, photos):
    result = evaluate("position", planted.clean, photos, PositionConfig(patches=20))
    assert list(result.metrics) == ["top-1: normal patches", "distance: normal patches"]
    assert result.n == 15
    assert "no artifacts, so there are no outliers to probe" in result.full()


def test_too_few_photos_are_refused(planted, photos):
    with pytest.raises(DataError, match=r"found 12 photos in .*, expected at least 20"):
        evaluate("position", planted.clean, photos, PositionConfig(limit=12))


def test_a_layer_that_is_not_there_is_refused(planted, photos):
    with pytest.raises(DataError, match=r"layer=3: the blocks of .* are 0 to 2"):
        evaluate("position", planted.clean, photos, PositionConfig(layer=3))


def test_an_unreadable_photo_is_named(planted, tmp_path):
    save_crops(tmp_path, 24)
    (tmp_path / "000.png").write_bytes(b"no picture")
    result = evaluate("position", planted.vit, tmp_path, PositionConfig(patches=4))
    assert result.n == 5  # a quarter of 23
    assert "1 photos could not be read" in result.full()


def test_real_outliers_are_bound_to_corners(shared):
    vit = vitreg.load(str(shared / "models/vit_tiny_patch16_224.augreg_in21k_ft_in1k"))
    config = PositionConfig(limit=40, workers=0)
    result = evaluate("position", vit, shared / "data/imagenet-sample-1000", config)
    assert any(note.startswith("CONFOUNDED") for note in result.notes)
    assert result.metrics["top-1: outliers, by usual place"].value == pytest.approx(0.25, abs=0.04)
    assert result.metrics["top-1: outliers"].value > 5 * result.metrics["top-1: normal patches"].value
