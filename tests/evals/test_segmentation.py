"""The linear segmentation head: geometry, loss and metrics against plain formulas, and that it learns."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from catalog import timm_model
from PIL import Image
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

import vitreg
from vitreg.errors import DataError
from vitreg.evals.dense_head import DenseConfig, Frame, Tokens, former_outliers, splits_of
from vitreg.evals.segmentation import (
    SegmentationConfig,
    class_counts,
    confusion,
    cross_entropy,
    evaluate,
    mean_iou,
    right_and_known,
    segmentation_metrics,
)
from vitreg.evals.tasks import find_task
from vitreg.features.config import Config
from vitreg.plots.style import png


@pytest.fixture(scope="module")
def vit():
    """Random weights; windows of 32 pixels, patches of 8."""
    torch.manual_seed(0)
    return vitreg.wrap(timm_model("vit_tiny_patch16_224", img_size=32, patch_size=8)().eval(), image_size=32)


def coloured(root: Path, count: int, seed: int = 0) -> Path:
    """Photos of 48 x 64 pixels whose blocks are red, green or blue, which is their class."""
    colours = np.array([[220, 30, 30], [30, 200, 40], [20, 40, 220]])
    random = np.random.default_rng(seed)
    for i in range(count):
        ids = np.kron(random.integers(0, 3, (3, 4)), np.ones((16, 16), int))
        for folder in ("images", "masks"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(colours[ids].astype(np.uint8)).save(root / "images" / f"{i:02}.png")
        Image.fromarray(ids.astype(np.uint8)).save(root / "masks" / f"{i:02}.png")
    return root


QUICK = SegmentationConfig(steps=200, batch=4, folds=2, side=48)


# -- geometry ----------------------------------------------------------------------------------------


def test_patches_hold_the_pixels_at_their_place(vit):
    """At the frame's own scale: windows of 32 pixels in 48 x 64 begin at 0, 16 and at 0, 24, 32."""
    frame = Frame.of(vit, 48)
    pixels = np.arange(48 * 64).reshape(48, 64)
    cut = frame.cut(pixels)
    corners = frame.windows.corners(48, 64)
    assert cut.shape == (len(corners), 16, 64)
    top, left = corners[-1]
    expected = pixels[top + 8 : top + 16, left + 24 : left + 32]  # row 1, column 3 of 4 x 4 patches
    assert cut[-1, 4 + 3].tolist() == expected.flatten().tolist()


def test_a_mask_of_another_size_is_scaled_to_the_pixels_at_the_centres(vit):
    frame = Frame.of(vit, 48)
    small = np.arange(48 * 48).reshape(48, 48)
    big = np.full((144, 144), -1)
    big[1::3, 1::3] = small
    torch.testing.assert_close(frame.cut(big), frame.cut(small))


def test_joined_windows_give_back_a_map_that_is_known_at_the_patches(vit):
    """A map that is linear in both directions survives bilinear interpolation and averaging."""
    frame = Frame.of(vit, 48)
    rows, columns = np.mgrid[:48, :64].astype(np.float32)
    outputs = torch.stack([frame.cut(rows).mean(2), frame.cut(columns).mean(2)], 2)
    joined = frame.join(outputs, 96, 128)
    expected = torch.from_numpy(np.stack(np.mgrid[:96, :128]) / 2 - 0.25).float()
    # Within half a patch of a window's edge its map is flat: at most 4 pixels off, less where averaged.
    assert (joined - expected).abs().max() < 4
    assert (joined - expected).abs().mean() < 0.6
    exact = (slice(None), slice(40, 41), slice(16, 40))  # row 20 of the frame lies inside all its windows
    assert (joined - expected)[exact].abs().max() < 0.6


def test_one_window_is_bilinear_interpolation(vit):
    outputs = torch.randn(1, 16, 5)
    grid = outputs[0].T.reshape(1, 5, 4, 4)
    frame = Frame.of(vit, None)
    torch.testing.assert_close(
        frame.join(outputs, 32, 32), F.interpolate(grid, size=(32, 32), mode="bilinear")[0]
    )


def test_overlapping_windows_are_averaged(vit):
    frame = Frame.of(vit, None)  # 32 x 48: windows at 0 and 16
    joined = frame.join(torch.stack([torch.zeros(16, 1), torch.ones(16, 1)]), 32, 48)[0]
    assert joined[0, [0, 15, 16, 31, 32, 47]].tolist() == [0, 0, 0.5, 0.5, 1, 1]


def test_windows_are_two_thirds_apart(vit):
    assert Frame.of(vit, None).windows.stride == (24, 24)


# -- loss and metrics --------------------------------------------------------------------------------


def test_the_loss_is_that_of_all_pixels_with_their_patchs_logits():
    ids, logits = torch.randint(-1, 5, (2, 16, 64)), torch.randn(2, 16, 5)
    spread = logits[:, :, None].expand(-1, -1, 64, -1)
    expected = F.cross_entropy(spread.flatten(0, 2), ids.flatten(), ignore_index=-1)
    found = cross_entropy(logits.flatten(0, 1), class_counts(ids, 5).flatten(0, 1))
    torch.testing.assert_close(found, expected)


def test_no_known_pixel_costs_nothing():
    assert cross_entropy(torch.randn(3, 5), torch.zeros(3, 5)) == 0


def test_metrics_are_torchmetrics_on_all_photos_at_once():
    truth, guess = torch.randint(-1, 6, (7, 20, 30)), torch.randint(0, 5, (7, 20, 30))
    truth[truth == 4] = 3  # class 4 is guessed only, class 5 is neither
    truth[truth == 5] = 0
    confusions = torch.stack([confusion(g, t, 6) for g, t in zip(guess, truth, strict=True)])
    metrics = segmentation_metrics(confusions)
    jaccard = MulticlassJaccardIndex(6, average="none", ignore_index=-1)(guess, truth)
    assert jaccard[5] == 0  # torchmetrics counts a class that is nowhere as 0; it is left out here
    assert metrics["mIoU"].value == pytest.approx(float(jaccard[:5].mean()), abs=1e-6)
    accuracy = MulticlassAccuracy(6, average="micro", ignore_index=-1)(guess, truth)
    assert metrics["pixel accuracy"].value == pytest.approx(float(accuracy), abs=1e-6)


def test_mean_iou_by_hand():
    """Class 0: 2 of 4 pixels, class 1: 3 of 6, class 2 nowhere."""
    assert mean_iou(np.array([[2, 3, 0, 4, 6, 0]], float)).tolist() == [0.5]


def test_right_pixels_of_patches():
    counts = torch.tensor([[[3.0, 1.0], [0.0, 2.0], [0.0, 0.0]]])
    logits = torch.tensor([[[0.1, 0.0], [5.0, 1.0], [1.0, 0.0]]])
    assert right_and_known(logits, counts).tolist() == [[[3, 4], [0, 2], [0, 0]]]


# -- splits ------------------------------------------------------------------------------------------


def test_each_photo_is_predicted_once_by_a_head_that_has_not_seen_it():
    splits = splits_of(0, [""] * 11, 3)
    assert sorted(i for _, test in splits for i in test) == list(range(11))
    for train, test in splits:
        assert sorted(train + test) == list(range(11))
        assert test == list(range(test[0], test[-1] + 1))  # a run of neighbours


def test_the_datas_own_split():
    assert splits_of(2, [""] * 5, 3) == [([0, 1], [2, 3, 4])]


@pytest.mark.parametrize(("photos", "k"), [(1, 5), (10, 1)])
def test_nothing_to_split(photos, k):
    with pytest.raises(DataError, match=f"{photos} photos in {k} folds"):
        splits_of(0, [""] * photos, k)


# -- the whole ---------------------------------------------------------------------------------------


def test_a_head_learns_colours_and_says_that_it_was_cross_validated(vit, tmp_path):
    result = evaluate(vit, coloured(tmp_path, 8), QUICK)
    assert result.n == 8
    assert result.metrics["pixel accuracy"].value > 0.9
    assert result.metrics["mIoU"].value > 0.8
    assert "pixel accuracy, former outliers" not in result.metrics  # random weights have none
    assert "2-fold cross-validation over runs of neighbouring names" in " ".join(result.notes)
    assert result.picture is not None
    assert len(result.picture().axes) == 3 * 4
    assert png(result.picture())


def test_masks_that_photos_do_not_show_are_not_learnt(vit, tmp_path):
    """The other way round: with the masks of other photos the head is near chance."""
    root = coloured(tmp_path, 8)
    coloured(tmp_path / "other", 8, seed=1)
    for path in (tmp_path / "other" / "masks").iterdir():
        path.replace(root / "masks" / path.name)
    assert evaluate(vit, root, QUICK).metrics["pixel accuracy"].value < 0.6


def test_equal_seeds_make_equal_results_and_others_others(vit, tmp_path):
    root = coloured(tmp_path, 6)
    few = SegmentationConfig(steps=5, batch=2, folds=2, side=48)
    values = [evaluate(vit, root, c).metrics["mIoU"].value for c in (few, few)]
    assert values[0] == values[1]
    other = SegmentationConfig(steps=5, batch=2, folds=2, side=48, seed=1)
    assert evaluate(vit, root, other).metrics["mIoU"].value != values[0]


def test_a_split_trains_on_one_part_and_tests_on_the_other(vit, tmp_path):
    coloured(tmp_path / "train", 6)
    coloured(tmp_path / "val", 3, seed=1)
    result = evaluate(vit, tmp_path, QUICK)
    assert result.n == 3
    assert result.notes == ("Ids 0 to 2 of the masks are classes, 255 none.",)
    assert result.metrics["pixel accuracy"].value > 0.9


def test_a_photo_that_breaks_off_is_left_out_and_named(vit, tmp_path):
    root = coloured(tmp_path, 6)
    path = root / "images" / "03.png"
    path.write_bytes(path.read_bytes()[:-60])
    result = evaluate(vit, root, SegmentationConfig(steps=5, folds=2))
    assert result.n == 5
    assert "1 photos could not be read" in result.notes[1]
    assert "03.png" in result.notes[1]


def test_several_layers_are_concatenated(vit, tmp_path):
    root, config = coloured(tmp_path, 2), DenseConfig()
    paths, frame = sorted((root / "images").iterdir()), Frame.of(vit, None)
    one, two = (Tokens.of(vit, paths, frame, layers, config) for layers in ([2], [1, 2]))
    assert two[0].shape == (*one[0].shape[:2], 2 * vit.anatomy.width)
    torch.testing.assert_close(two[0][..., vit.anatomy.width :], one[0])


def test_cls_tokens_follow_the_patches(vit, tmp_path):
    root = coloured(tmp_path, 1)
    paths, frame = sorted((root / "images").iterdir()), Frame.of(vit, None)
    tokens = Tokens.of(vit, paths, frame, [2], DenseConfig(), cls=True)
    x = tokens[0][..., vit.anatomy.width :]
    torch.testing.assert_close(x, tokens.found.of("cls@2", 0)[:, None].float().expand_as(x))


@pytest.mark.parametrize("settings", [{"layers": 0}, {"steps": 0}, {"batch": 0}])
def test_settings_that_make_no_sense(settings):
    (name,) = settings
    with pytest.raises(DataError, match=f"setting {name}=0: expected 1 or more"):
        SegmentationConfig(**settings)


@pytest.mark.parametrize("task", ["segmentation", "depth"])
def test_more_layers_than_the_model_has(vit, tmp_path, task):
    root = coloured(tmp_path, 2)
    for path in (root / "masks").iterdir():
        (root / "depth").mkdir(exist_ok=True)
        Image.fromarray(np.ones((48, 64), np.uint16)).save(root / "depth" / path.name)
    found = find_task(task)
    with pytest.raises(DataError, match=r"setting layers=4: .* has 3"):
        found.evaluate(vit, root, found.config(layers=4, folds=2))  # type: ignore[call-arg]


def test_a_side_shorter_than_a_window(vit):
    with pytest.raises(DataError, match="setting side=24: a window of the model takes 32"):
        Frame.of(vit, 24)


@pytest.fixture(scope="module")
def real(shared):
    return {
        name: vitreg.load(str(shared / "models" / folder))
        for name, folder in (
            ("artifacts", "vit_tiny_patch16_224.augreg_in21k_ft_in1k"),
            ("none", "deit_tiny_patch16_224"),
        )
    }


def test_former_outliers_are_the_corners_of_windows(real, shared):
    paths = sorted((shared / "data" / "camvid" / "val" / "images").iterdir())[:3]
    frame = Frame.of(real["artifacts"], None)
    found = former_outliers(real["artifacts"], paths, [0, 2], frame, Config(workers=0))
    assert sorted(found) == [0, 2]
    for mask in found.values():
        assert {0, 13, 182, 195} <= set(mask[0].nonzero().flatten().tolist())
    assert not former_outliers(real["none"], paths, [0, 2], Frame.of(real["none"], None), Config(workers=0))


def test_camvid_has_a_figure_for_former_outliers(real, shared):
    result = evaluate(
        real["artifacts"],
        shared / "data" / "camvid",
        SegmentationConfig(ignore=11, limit=4, steps=20, workers=0),
    )
    assert result.n == 4
    assert 0 < result.metrics["pixel accuracy, former outliers"].value < 1
