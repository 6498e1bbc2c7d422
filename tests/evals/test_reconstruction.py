"""The reconstruction probe: exact on made tokens, fair to flat patches, true where artifacts were planted."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from phantoms import Planted, save_crops
from sklearn.linear_model import Ridge

import vitreg
from vitreg.data.evenly_spaced import evenly_spaced
from vitreg.evals import Metric, evaluate, position, reconstruction
from vitreg.evals.probes import PatchConfig, Patches, by_photo, drawn_patches, fitted
from vitreg.evals.reconstruction import ReconstructionConfig, like_outliers, pixels_of
from vitreg.fixes import TokenSplitting
from vitreg.search.register_neurons import find_register_neurons

GRID = (4, 5)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return save_crops(tmp_path_factory.mktemp("photos"), 80)


@pytest.fixture(scope="module")
def planted(photos) -> Planted:
    return Planted(photos)


@pytest.fixture(scope="module")
def drawn(planted, photos):
    """Real photos and planted outliers; `retold` gives them tokens of our own."""
    return drawn_patches(planted.vit, photos, PatchConfig(patches=20))


def retold(side: Patches, tokens: np.ndarray) -> Patches:
    kept = {name: value for name, value in vars(side).items() if name != "tokens"}
    return Patches(tokens=tokens.astype(np.float32), **kept)


def test_pixels_are_those_of_their_patches(drawn, planted):
    train = drawn[0]
    pixels = pixels_of(planted.vit, train, PatchConfig())
    assert pixels.shape == (len(train.place), 3 * 8 * 8)
    for i in (0, 7, len(pixels) - 1):
        photo = next(iter(vitreg.read_images([train.paths[train.photo[i]]], planted.vit))).pixels[0]
        row, column = divmod(train.place[i], GRID[1])
        cell = photo[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        assert np.array_equal(pixels[i], cell.numpy().ravel())


def test_tokens_that_are_the_pixels_leave_no_error(drawn, planted):
    """Normal tokens are a linear image of the pixels, outliers hold nothing."""
    mix = np.random.default_rng(0).normal(size=(192, 192))
    sides = []
    for side in drawn[:2]:
        pixels = pixels_of(planted.vit, side, PatchConfig())
        sides.append(retold(side, (pixels @ mix) * ~side.outlier[:, None]))
    metrics, notes = reconstruction.measured(planted.vit, *sides, PatchConfig())
    assert metrics["relative error: normal patches"].value < 0.1
    assert metrics["relative error: normal, alike in pixels"].value < 0.2
    assert metrics["relative error: outliers"].value > 0.9
    assert metrics["L2 error: outliers"].value > 5 * metrics["L2 error: normal, alike in pixels"].value
    assert notes[0].startswith("Mean distance from the mean patch: normal patches:")


def test_errors_are_norms_of_residuals(drawn, planted):
    """With empty tokens the best guess is the mean patch, and the errors are known."""
    train, test = (retold(side, np.zeros((len(side.place), 3))) for side in drawn[:2])
    metrics, _ = reconstruction.measured(planted.vit, train, test, PatchConfig())
    known, asked = (pixels_of(planted.vit, side, PatchConfig()) for side in (train, test))
    errors = np.linalg.norm(asked - known.mean(0), axis=1)
    assert metrics["L2 error: outliers"].value == pytest.approx(errors[test.outlier].mean(), rel=1e-3)
    assert metrics["L2 error: normal patches"].value == pytest.approx(errors[~test.outlier].mean(), rel=1e-3)
    assert metrics["relative error: normal patches"].value == pytest.approx(1, rel=1e-3)
    assert metrics["relative error: outliers"].value == pytest.approx(1, rel=1e-3)


def test_outliers_are_compared_with_patches_that_look_like_them():
    """Half of the normal patches are white and flat like the outliers, half are noise."""
    random = np.random.default_rng(0)
    flat = np.tile([True, False], 30)
    outlier = np.zeros(60, dtype=bool)
    outlier[flat.nonzero()[0][:4]] = True
    pixels = np.where(flat[:, None], 2 + 0.01 * random.normal(size=(60, 48)), random.normal(size=(60, 48)))
    place = np.arange(60) % 20
    test = Patches(np.zeros((60, 1), np.float32), place, np.arange(60) // 20, outlier, (Path("x"),) * 3, GRID)
    weights = like_outliers(pixels.astype(np.float32), test)
    assert weights.sum() == pytest.approx(4)  # as much as the outliers count
    assert weights[~flat].sum() == weights[outlier].sum() == 0


def test_the_best_of_several_probes_is_taken():
    random = np.random.default_rng(0)
    x, photo = random.normal(size=(200, 5)).astype(np.float32), np.repeat(np.arange(20), 10)
    y = x @ random.normal(size=(5, 3)).astype(np.float32)
    for strengths in ((1e9, 1.0), (1.0, 1e9)):
        probe = fitted([Ridge(strength) for strength in strengths], x, y, by_photo(photo))
        assert probe[-1].alpha == 1.0


def test_held_out_photos_are_others():
    photo = np.repeat(np.arange(20), 3)
    fit, held = by_photo(photo)
    assert len(set(photo[held])) == 4
    assert not set(photo[fit]) & set(photo[held])


def test_without_artifacts_there_are_no_rows_of_outliers(planted, photos):
    result = evaluate("reconstruction", planted.clean, photos, ReconstructionConfig(patches=20))
    assert list(result.metrics) == ["L2 error: normal patches", "relative error: normal patches"]
    assert "no artifacts, so there are no outliers to probe" in result.full()


def test_comparison_is_of_the_same_patches(planted, photos):
    config = ReconstructionConfig(patches=20)
    before = evaluate("reconstruction", planted.vit, photos, config)
    with planted.splitting.applied_to(planted.vit):
        after = evaluate("reconstruction", planted.vit, photos, config)
    one, other = (r.metrics["L2 error: outliers"].samples[:, 1] for r in (before, after))
    assert np.array_equal(one, other)
    assert other.sum() * len(other) > 0
    assert after.fix is not None


# -- known truth -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def truth(shared, tmp_path_factory) -> dict[str, dict]:
    """Both probes' metrics at the same places of a real model without artifacts: as it is, planted, fixed.

    Tokens are those after the block behind the planted one. Small photos, of which a tenth of the patches is
    marked, so that few are enough.
    """
    folder = shared / "data/imagenet-sample-1000"
    vit = vitreg.load(str(shared / "models/deit_tiny_patch16_224"), size=112)
    config = PatchConfig(limit=120, layer=6, workers=0, cache=tmp_path_factory.mktemp("cache"))
    paths = sorted(folder.iterdir())
    some = [paths[i] for i in evenly_spaced(len(paths), 32)]
    images = [batch.pixels for batch in vitreg.read_images(some, vit, workers=0)]
    phantom = vitreg.plant(vit, images, 5, rate=0.1).vit
    neurons = find_register_neurons(phantom, images, vitreg.diagnose(phantom, images))

    def probed(model: vitreg.Backbone) -> dict:
        train, test, _ = drawn_patches(model, folder, config, marking=phantom)
        return position.measured(train, test)[0] | reconstruction.measured(model, train, test, config)[0]

    found = {"as it was": probed(vit), "planted": probed(phantom)}
    with TokenSplitting.calibrate(phantom, images, neurons).applied_to(phantom):
        return found | {"fixed": probed(phantom)}


@pytest.mark.parametrize("measure", ["top-1", "distance", "L2 error", "relative error"])
def test_planted_outliers_probe_worse_and_a_fix_brings_them_back(truth, measure):
    """The papers' claim, of outliers whose truth is known; places and photos are the same in all three."""
    sides = [truth[side][f"{measure}: outliers"] for side in ("as it was", "planted", "fixed")]
    before, planted, fixed = (replace(x, samples=x.samples * [worse(x), 1]) for x in sides)
    assert planted.less(before).low > 0
    assert fixed.less(planted).high < 0
    assert abs(fixed.less(before).value) < 0.25 * planted.less(before).value


def worse(metric: Metric) -> int:
    """The sign with which more is worse."""
    return -1 if metric.higher_is_better else 1


def test_planted_outliers_probe_worse_than_normal_patches_of_the_same_model(truth):
    planted = truth["planted"]
    assert planted["top-1: outliers"].less(planted["top-1: normal, same places"]).high < 0
    assert planted["distance: outliers"].less(planted["distance: normal, same places"]).low > 0
    assert (
        planted["relative error: outliers"].less(planted["relative error: normal, alike in pixels"]).low > 0
    )


def test_what_planted_outliers_hold_is_hidden_and_not_lost(truth):
    """A probe of their own reads it, and no less than from the same places before."""
    before, planted = truth["as it was"], truth["planted"]
    for measure in ("distance", "relative error"):
        own = planted[f"{measure}: outliers, own probe"]
        assert own.less(planted[f"{measure}: outliers"]).high < 0
        assert own.value < before[f"{measure}: outliers, own probe"].value


def test_normal_patches_keep_what_they_hold(truth):
    for measure in ("distance", "relative error"):
        row = f"{measure}: normal patches"
        assert truth["planted"][row].value == pytest.approx(truth["as it was"][row].value, rel=0.05)
