"""The linear depth head: units, loss and metrics against plain formulas, layouts, and that it learns."""

import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from catalog import timm_model
from PIL import Image
from torchmetrics.functional import mean_squared_error

import vitreg
from vitreg.config.settings import with_settings
from vitreg.data.datasets.depth_pairs import read_depth, train_and_val
from vitreg.errors import DataError
from vitreg.evals.dense_head import splits_of
from vitreg.evals.depth import (
    DepthConfig,
    Maps,
    depth_metrics,
    depth_of,
    evaluate,
    log_depths,
    mean_depth,
    median_ratio,
    photo_errors,
    scale_invariant_loss,
    spaced_layers,
    within,
)
from vitreg.plots.style import png


@pytest.fixture(scope="module")
def vit():
    """Random weights; windows of 32 pixels, patches of 8."""
    torch.manual_seed(0)
    return vitreg.wrap(timm_model("vit_tiny_patch16_224", img_size=32, patch_size=8)().eval(), image_size=32)


def save(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def shaded(root: Path, names: list[str], depth: str = "depth") -> Path:
    """Photos of 32 x 48 pixels in blocks of grey; the lighter, the nearer: 4000 to 1000 (mm)."""
    random = np.random.default_rng(0)
    for name in names:
        near = np.kron(random.random((2, 3)), np.ones((16, 16)))
        save(root / "images" / f"{name}.png", np.repeat(255 * near[..., None], 3, 2).astype(np.uint8))
        stored = (4000 - 3000 * near).astype(np.uint16)
        stored[:4, :4] = 0
        save(root / depth / f"{name}.png", stored)
    return root


QUICK = DepthConfig(steps=300, batch=4, folds=2, unit="mm", bins=64)
NAMES = [f"{i:02}" for i in range(12)]

# -- units and bins ----------------------------------------------------------------------------------


def maps(root: Path, **settings: object) -> Maps:
    config = with_settings(DepthConfig(), {name: str(value) for name, value in settings.items()})
    return Maps.of(train_and_val(root)[1], config)


def test_millimetres_become_metres(tmp_path):
    root = shaded(tmp_path, ["a"])
    stored = read_depth(root / "depth" / "a.png")
    assert stored[0, 0] == 0
    assert stored.max() > 1000
    np.testing.assert_allclose(maps(root, unit="mm")[0], stored / 1000)
    np.testing.assert_allclose(maps(root, unit="m")[0], stored)
    np.testing.assert_allclose(maps(root, unit="m", depth_scale=256)[0], stored / 256)


def test_an_unknown_unit_is_each_photos_median(tmp_path):
    found = maps(shaded(tmp_path, ["a"]))[0]
    assert np.median(found[found > 0]) == 1
    assert found[0, 0] == 0


def test_depths_out_of_range_have_no_value(tmp_path):
    found = maps(shaded(tmp_path, NAMES), unit="mm", min_depth=2, max_depth=3)[0]
    assert set(np.unique(found // 1)) <= {0, 2}
    assert found.any()


def test_bins_span_the_training_photos(tmp_path):
    root = shaded(tmp_path, ["a", "b"])
    save(root / "depth" / "b.png", np.full((32, 48), 9000, np.uint16))
    of_all = maps(root, unit="mm")
    bins = of_all.bins([0], 11)
    known = of_all[0][of_all[0] > 0]
    assert (bins[0], bins[-1], len(bins)) == (known.min(), known.max(), 11)
    torch.testing.assert_close(bins.diff(), torch.full((10,), float(known.max() - known.min()) / 10))
    assert maps(root, unit="mm", min_depth=0.5, max_depth=12).bins([0], 2).tolist() == [0.5, 12]


def test_layers_are_evenly_spaced(vit):
    assert spaced_layers(vit, 1) == [2]
    assert spaced_layers(vit, 3) == [0, 1, 2]


# -- outputs, loss, metrics --------------------------------------------------------------------------


def test_a_depth_is_the_mean_of_the_bins_under_the_outputs():
    bins = torch.linspace(1, 5, 5)
    assert depth_of(torch.zeros(2, 5), bins).tolist() == [3, 3]
    one = torch.tensor([-9.0, 0, 0, 1e6, 0])
    assert depth_of(one, bins).item() == pytest.approx(4, abs=1e-4)
    # By hand: weights 0.1 0.1 0.1 0.1 1.1
    assert depth_of(torch.tensor([-1.0, 0, 0, 0, 1]), bins).item() == pytest.approx(
        (0.1 * 10 + 1.1 * 5) / 1.5
    )


def test_the_loss_is_that_of_all_pixels_but_for_a_constant():
    """Eigen et al.'s loss of each pixel with its patch's depth, for two heads: equal differences."""
    cells = torch.rand(2, 16, 64) * 5 + 0.5
    cells[torch.rand(2, 16, 64) < 0.3] = 0
    cells[0, 3] = 0
    bins = torch.linspace(0.5, 6, 32)
    differences = []
    heads = [torch.randn(32, 32) for _ in range(2)]
    for loss in (partial(pixel_loss, cells), partial(patch_loss, cells)):
        one, other = (loss(outputs, bins) for outputs in heads)
        differences.append(float(one - other))
    assert differences[0] == pytest.approx(differences[1], rel=1e-4)
    assert abs(differences[0]) > 1e-4


def pixel_loss(cells: torch.Tensor, outputs: torch.Tensor, bins: torch.Tensor) -> torch.Tensor:
    guess = depth_of(outputs, bins)[:, None].expand(-1, 64).flatten()
    truth = cells.flatten()
    error = guess[truth > 0].log() - truth[truth > 0].log()
    return (error**2).mean() - 0.85 * error.mean() ** 2


def patch_loss(cells: torch.Tensor, outputs: torch.Tensor, bins: torch.Tensor) -> torch.Tensor:
    return scale_invariant_loss(outputs, log_depths(cells).flatten(0, 1), bins)


def test_metrics_by_hand():
    truth = np.array([[1.0, 2.0, 0.0, 4.0, 1.0]], np.float32)
    guess = np.array([[1.2, 2.0, 7.0, 2.0, 1.3]], np.float32)
    rmse, near, silog = photo_errors(guess, truth)
    known = torch.from_numpy(truth > 0)
    expected = mean_squared_error(
        torch.from_numpy(guess)[known], torch.from_numpy(truth)[known], squared=False
    )
    assert rmse == pytest.approx(float(expected), rel=1e-6)
    assert near == pytest.approx(2 / 4)
    errors = [np.log(1.2), 0, np.log(0.5), np.log(1.3)]
    assert silog == pytest.approx(100 * np.sqrt(np.mean(np.square(errors)) - np.mean(errors) ** 2))


def test_the_log_error_does_not_mind_a_scale_and_the_median_takes_it_out():
    random = np.random.default_rng(0)
    truth, guess = random.uniform(1, 5, (2, 9, 11)).astype(np.float32)
    truth[0] = 0
    assert photo_errors(guess, truth)[2] == pytest.approx(photo_errors(7 * guess, truth)[2], rel=1e-5)
    assert median_ratio(guess, truth) == pytest.approx(7 * median_ratio(7 * guess, truth), rel=1e-5)
    assert median_ratio(truth / 3, truth) == pytest.approx(3)


def test_patches_within_a_factor():
    cells = torch.tensor([[[2.0, 2.4, 2.6, 0.0], [0.0, 0.0, 0.0, 0.0]]])
    assert within(torch.tensor([[[2.0], [1.1]]]), cells).tolist() == [[[2, 3], [0, 0]]]


def test_the_constant_is_the_geometric_mean_of_known_depths():
    cells = [torch.tensor([[[1.0, 4.0, 0.0], [0.0, 0.0, 0.0]]]), torch.tensor([[[8.0, 0.0, 0.0]]])]
    assert mean_depth([log_depths(c) for c in cells]) == pytest.approx(32 ** (1 / 3))


def test_without_a_unit_there_is_no_rmse():
    errors = np.ones((3, 3))
    assert list(depth_metrics(errors, True)) == ["RMSE, m", "delta1", "SILog"]
    assert list(depth_metrics(errors, False)) == ["delta1, scaled to the median", "SILog"]
    assert not depth_metrics(errors, True)["RMSE, m"].higher_is_better


# -- layouts and splits ------------------------------------------------------------------------------


def nyu_of(root: Path) -> Path:
    for scene, name in (("kitchen_1", "a"), ("office_2", "b"), ("bathroom", "c")):
        save(root / scene / f"rgb_{name}.png", np.zeros((480, 640, 3), np.uint8))
        save(root / scene / f"depth_{name}.png", np.full((480, 640), 2500, np.uint16))
    (root / "nyu_train.txt").write_text(
        "/kitchen_1/rgb_a.png /kitchen_1/depth_a.png 518.8\noffice_2/rgb_b.png office_2/depth_b.png\n\n"
    )
    (root / "nyu_test.txt").write_text("bathroom/rgb_c.png bathroom/depth_c.png 518.8\n")
    return root


def test_nyu_is_in_millimetres_and_tested_in_eigens_crop(tmp_path):
    train, test = train_and_val(nyu_of(tmp_path))
    assert train is not None
    assert [path.name for path in train.paths] == ["rgb_a.png", "rgb_b.png"]
    both = Maps.of(test.after(train), DepthConfig())
    assert len(both.pairs) == 3
    for i in range(3):
        assert np.unique(both[i]).tolist() == [0, 2.5]
        rows, columns = both[i].nonzero()
        assert (rows.min(), rows.max(), columns.min(), columns.max()) == (45, 470, 41, 600)
    assert Maps.of(train, DepthConfig()).bins([], 2).tolist() == pytest.approx([0.001, 10])


def test_scenes_are_held_out_as_a_whole(tmp_path):
    names = ["desk_1.5", "desk_2.25", "slam5_1", "slam12_1", "slam12_2"]
    _, pairs = train_and_val(shaded(tmp_path, names))
    assert [Path(scene).name for scene in pairs.scenes] == ["desk", "desk", "slam12", "slam12", "slam5"]
    for train, test in splits_of(0, pairs.scenes, 5):
        assert not {pairs.scenes[i] for i in train} & {pairs.scenes[i] for i in test}


def test_only_some_photos(tmp_path):
    root = shaded(tmp_path, ["desk_1", "slam5_1", "slam5_2"])
    assert [path.stem for path in train_and_val(root, only="slam5")[1].paths] == ["slam5_1", "slam5_2"]
    with pytest.raises(DataError, match=r"no photo of .* has 'sofa' in its name. The first is .*desk_1"):
        train_and_val(root, only="sofa")


def test_the_shared_data(shared):
    train, pairs = train_and_val(shared / "data" / "depth", limit=9)
    assert train is None
    assert len(pairs) == 9


# -- the whole ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_head_learns_that_light_is_near(vit, tmp_path):
    result = evaluate(vit, shaded(tmp_path, NAMES), QUICK)
    assert result.n == 12
    stated = [float(x) for x in re.findall(r"constant depth: RMSE, m ([0-9.]+)", " ".join(result.notes))]
    assert len(stated) == 1
    assert 0.6 < stated[0] < 1.2  # of depths between 1 and 4 m: their deviation, 3 / sqrt(12), near enough
    shuffled = evaluate(vit, with_depths_of_others(tmp_path), QUICK)
    assert result.metrics["delta1"].value > shuffled.metrics["delta1"].value + 0.2
    assert result.metrics["RMSE, m"].value < 0.6 * shuffled.metrics["RMSE, m"].value
    assert result.metrics["SILog"].value < 0.6 * shuffled.metrics["SILog"].value
    assert "whole scenes" not in " ".join(result.notes)
    assert result.picture is not None
    assert len(result.picture().axes) == 3 * 4
    assert png(result.picture())


def with_depths_of_others(root: Path) -> Path:
    files = sorted((root / "depth").iterdir())
    contents = [file.read_bytes() for file in files]
    for file, content in zip(files, contents[3:] + contents[:3], strict=True):
        file.write_bytes(content)
    return root


def test_an_unknown_unit_is_said(vit, tmp_path):
    result = evaluate(vit, shaded(tmp_path, NAMES), DepthConfig(steps=5, batch=4, folds=2))
    assert list(result.metrics) == ["delta1, scaled to the median", "SILog"]
    assert "The unit of depth is unknown" in result.notes[-1]


def test_the_unit_does_not_change_what_no_scale_changes(vit, tmp_path):
    """A data set in tenths of millimetres: the same figures, but for rounding."""
    few = DepthConfig(steps=20, batch=4, folds=2)
    root = shaded(tmp_path, NAMES)
    before = evaluate(vit, root, few)
    for path in (root / "depth").iterdir():
        save(path, (read_depth(path) * 10).astype(np.uint16))
    after = evaluate(vit, root, few)
    assert after.metrics["SILog"].value == pytest.approx(before.metrics["SILog"].value, rel=1e-3)


def test_scenes_are_counted_in_the_notes(vit, tmp_path):
    root = shaded(tmp_path, ["desk_1", "desk_2", "room_1", "room_2"])
    notes = " ".join(evaluate(vit, root, DepthConfig(steps=2)).notes)
    assert "2-fold cross-validation over whole scenes" in notes
    assert "The 4 photos are of 2 scenes" in notes


# -- bad data ----------------------------------------------------------------------------------------


def bad(root: Path, message: str) -> None:
    with pytest.raises(DataError, match=message):
        train_and_val(root)


def test_depth_without_a_valid_pixel(tmp_path):
    root = shaded(tmp_path, ["a"])
    save(root / "depth" / "a.png", np.zeros((32, 48), np.uint16))
    bad(root, r"a.png has no valid pixel: all are 0")


def test_depth_without_a_pixel_in_range(tmp_path):
    with pytest.raises(DataError, match=r"a.png has no valid pixel between 0 and 0.5 m. Set unit"):
        maps(shaded(tmp_path, ["a"]), unit="mm", max_depth=0.5)[0]


def test_depth_of_another_size(tmp_path):
    root = shaded(tmp_path, ["a"])
    save(root / "depth" / "a.png", np.ones((48, 32), np.uint16))
    bad(root, r"a.png is 32 x 48 pixels, but its photo is 48 x 32")


def test_depth_of_8_bits(tmp_path):
    root = shaded(tmp_path, ["a"])
    save(root / "depth" / "a.png", np.ones((32, 48), np.uint8))
    bad(root, r"a.png is an 8-bit picture \(L\)")


def test_a_photo_or_a_depth_map_alone(tmp_path):
    root = shaded(tmp_path, ["a", "b"])
    (root / "depth" / "b.png").rename(root / "depth" / "c.png")
    bad(root, r"b.png has no depth map. Expected a file called b")
    (root / "images" / "b.png").unlink()
    bad(root, r"c.png has no photo. Expected a file called c")


def test_a_split_file_that_names_a_missing_file(tmp_path):
    root = nyu_of(tmp_path)
    (root / "office_2" / "depth_b.png").unlink()
    bad(root, r"nyu_train.txt, line 2 names office_2/depth_b.png, but there is no")


def test_a_split_file_with_a_bad_line_or_none(tmp_path):
    root = nyu_of(tmp_path)
    (root / "nyu_test.txt").write_text("bathroom/rgb_c.png\n")
    bad(root, r"nyu_test.txt, line 1: expected a photo, its depth map")
    (root / "nyu_test.txt").write_text("\n")
    bad(root, r"nyu_test.txt is empty")


def test_a_depth_map_that_cannot_be_read(tmp_path):
    root = shaded(tmp_path, ["a"])
    (root / "depth" / "a.png").write_bytes(b"no picture")
    bad(root, r"the depth map .*a.png cannot be read")


def test_another_layout(tmp_path):
    bad(tmp_path, r"has no layout that is known here. Expected NYUd")
