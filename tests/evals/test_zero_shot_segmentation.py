"""Zero-shot segmentation: the CLS attention as a heatmap, against scikit-learn on all pixels at once."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from catalog import CATALOG
from PIL import Image
from sklearn.metrics import accuracy_score, jaccard_score

import vitreg
from vitreg.data.datasets.foreground import foreground
from vitreg.errors import DataError, MissingExtraError, UnsupportedModelError
from vitreg.evals import find_task
from vitreg.evals.zero_shot_segmentation import HeatmapConfig, evaluate, heatmap
from vitreg.features.framing import Framing, normalisation_of

SIZES = [(60, 80), (90, 70), (64, 64)]  # (height, width) of the photos


def to_tensor(image: Image.Image) -> torch.Tensor:
    pixels = np.array(image.resize((40, 32)), dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(pixels).permute(2, 0, 1)


def model(name: str = "timm vit") -> vitreg.Backbone:
    entry = CATALOG[name]
    return vitreg.wrap(entry.module(), to_tensor, image_size=entry.image_size)


def pictures(seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Photos with a mask each: a rectangle of some class, its border ignored."""
    random = np.random.default_rng(seed)
    found = []
    for number, (h, w) in enumerate(SIZES):
        mask = np.zeros((h, w), dtype=np.uint8)
        mask[h // 5 : h // 2, w // 4 : w // 2 + 5 * number] = 255
        mask[h // 5 + 2 : h // 2 - 2, w // 4 + 2 : w // 2 + 5 * number - 2] = number + 1
        found.append((random.integers(0, 256, (h, w, 3), dtype=np.uint8), mask))
    return found


def voc(root: Path) -> Path:
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for number, (photo, mask) in enumerate(pictures()):
        Image.fromarray(photo).save(root / f"JPEGImages/{number}.jpg")
        Image.fromarray(mask).save(root / f"SegmentationClass/{number}.png")
    (root / "ImageSets/Segmentation/trainval.txt").write_text("0\n1\n2\n")
    return root


def attention_of(vit: vitreg.Backbone, photo: Path, layer: int) -> torch.Tensor:
    pixels = Framing(normalisation_of(vit), size=vit.image_size)(Image.open(photo))
    with vitreg.trace(vit, attention="cls") as t:
        vit(pixels[None])
    rows = t.attention[layer, 0, :, 0, t.layout.patch_slice]
    return rows.mean(0).reshape(vit.layout.grid)


def pooled_precision(truth: np.ndarray, heat: np.ndarray) -> float:
    """The mean precision at each positive, best first (the heats here have no ties)."""
    truth, heat = np.concatenate([truth, ~truth]), np.concatenate([heat, 1 - heat])
    ranked = truth[np.argsort(-heat, kind="stable")]
    precision = np.cumsum(ranked) / np.arange(1, len(ranked) + 1)
    return float(precision[ranked].mean())


@pytest.mark.parametrize("layer", [-1, 1])
def test_figures_are_those_of_all_pixels_together(tmp_path: Path, layer: int) -> None:
    vit, root = model(), voc(tmp_path)
    guesses, truths, precisions = [], [], []
    for number, (_, mask) in enumerate(pictures()):
        attention = attention_of(vit, root / f"JPEGImages/{number}.jpg", layer)
        heat = F.interpolate(attention[None, None], mask.shape, mode="bilinear").double().numpy()[0, 0]
        guess, known = heat > heat.mean(), mask != 255
        guesses.append(guess[known])
        truths.append(mask[known] > 0)
        scaled = (heat - heat.min()) / (heat.max() - heat.min())
        precisions.append(pooled_precision(mask[known] > 0, scaled[known]))
    guess, truth = np.concatenate(guesses), np.concatenate(truths)

    result = evaluate(vit, root, HeatmapConfig(layer=layer))
    assert result.n == 3
    assert result.metrics["mIoU"].value == pytest.approx(jaccard_score(truth, guess, average="macro"))
    assert result.metrics["pixel accuracy"].value == pytest.approx(accuracy_score(truth, guess))
    assert result.metrics["mAP"].value == pytest.approx(np.mean(precisions), abs=1e-3)
    share = 1 - truth.mean()
    assert f"every pixel background would score mIoU {share / 2:.2%}" in result.notes[-1]


def test_a_perfect_heatmap_scores_everything() -> None:
    from vitreg.evals.zero_shot_segmentation import _precision, _sums

    mask = np.zeros((32, 32), dtype=np.int64)
    mask[:8] = 1
    heat = heatmap(torch.tensor(mask).float(), mask)
    assert _sums(heat, mask).tolist() == [256, 256, 768, 768, 1024, 1024]
    assert _precision(heat, mask) == (1.0, 1.0)


def test_a_photo_of_one_class_has_no_say_in_the_precision(tmp_path: Path) -> None:
    vit, root = model(), voc(tmp_path)
    full = evaluate(vit, root)
    Image.new("L", (80, 60), 0).save(root / "SegmentationClass/0.png")
    result = evaluate(vit, root)
    assert np.isnan(result.metrics["mAP"].samples[:, 0]).tolist() == [True, False, False]
    assert result.metrics["mAP"].value == pytest.approx(full.metrics["mAP"].samples[1:].mean())


def test_even_attention_finds_nothing() -> None:
    """Constant heat is above its mean nowhere: no division by its spread of zero."""
    from vitreg.evals.zero_shot_segmentation import _sums

    mask = np.ones((8, 8), dtype=np.int64)
    heat = heatmap(torch.full((2, 2), 0.25), mask)
    assert heat.max() == 0
    assert _sums(heat, mask).tolist() == [0, 64, 0, 64, 0, 64]


def test_masks_squeezed_to_a_square_weigh_the_same(tmp_path: Path) -> None:
    result = evaluate(model(), voc(tmp_path), HeatmapConfig(side=48))
    known = result.metrics["pixel accuracy"].samples[:, 5]
    ignored = [(np.array(mask) == 255).mean() for _, mask in pictures()]
    assert known / 48**2 == pytest.approx(1 - np.array(ignored), abs=0.02)
    assert known.max() <= 48**2


def test_the_picture_shows_each_photo(tmp_path: Path) -> None:
    result = evaluate(model(), voc(tmp_path))
    assert result.picture is not None
    figure = result.picture()
    assert len(figure.axes) == 9
    assert figure.axes[0].images[0].get_array().shape == (60, 80, 3)


def test_a_model_without_cls_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="no CLS token"):
        evaluate(model("timm siglip"), voc(tmp_path))


# -- ImageNet-Segmentation ---------------------------------------------------------------------------


def matlab(path: Path, masks: int = len(SIZES)) -> Path:
    """A file with cells of references, as MATLAB 7.3 writes them; the last photo is grey."""
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        images, cells = [], []
        for number, (photo, mask) in enumerate(pictures()):
            pixels = photo[..., 0] if number == len(SIZES) - 1 else photo
            images.append(file.create_dataset(f"#refs#/i{number}", data=pixels.T).ref)
            inner = file.create_dataset(f"#refs#/m{number}", data=(mask.clip(0, 254) > 0).astype(np.uint8).T)
            cell = file.create_dataset(f"#refs#/c{number}", (1, 1), dtype=h5py.ref_dtype)
            cell[0, 0] = inner.ref
            cells.append(cell.ref)
        for name, references in (("img", images), ("gt", cells[:masks])):
            rows = file.create_dataset(f"value/{name}", (len(references), 1), dtype=h5py.ref_dtype)
            rows[:, 0] = references
    return path


def test_imagenet_segmentation_is_unpacked_once(tmp_path: Path) -> None:
    mat, cache = matlab(tmp_path / "gtsegs_ijcv.mat"), tmp_path / "cache"
    with foreground(mat, cache) as photos:
        for number, (photo, mask) in enumerate(pictures()):
            assert (photos.mask(number) == (mask > 0)).all()
            pixels = np.array(Image.open(photos.paths[number]))
            assert (pixels == (photo if number < 2 else photo[..., 0])).all()
        times = [path.stat().st_mtime_ns for path in photos.paths]
        photos.masks[1].unlink()  # as if the run had stopped there
    with foreground(mat, cache) as again:
        now = [path.stat().st_mtime_ns for path in again.paths]
        assert [now[0], now[2]] == [times[0], times[2]]
        assert now[1] > times[1]
        assert len(again) == 3


def test_without_a_cache_nothing_stays(tmp_path: Path) -> None:
    mat = matlab(tmp_path / "gtsegs_ijcv.mat")
    result = evaluate(model(), mat)
    assert result.n == 3
    assert result.data == str(mat)
    assert [path.name for path in tmp_path.iterdir()] == ["gtsegs_ijcv.mat"]
    with foreground(mat) as photos:
        folder = photos.paths[0].parent
        assert folder.is_dir()
    assert not folder.exists()


def test_another_file_of_that_name_is_unpacked_anew(tmp_path: Path) -> None:
    mat, cache = matlab(tmp_path / "gtsegs_ijcv.mat"), tmp_path / "cache"
    with foreground(mat, cache) as photos:
        first = photos.paths[0]
    mat.unlink()
    matlab(mat)
    with foreground(mat, cache) as photos:
        assert photos.paths[0].parent != first.parent


def test_bad_data_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(path: Path, message: str) -> None:
        with pytest.raises(DataError, match=message), foreground(path, tmp_path / "cache"):
            pass

    (tmp_path / "text.mat").write_text("no HDF5")
    refuses(tmp_path / "text.mat", "not laid out as gtsegs_ijcv.mat")
    refuses(matlab(tmp_path / "short.mat", masks=2), "3 photos, but 2 masks")
    refuses(tmp_path / "none.mat", "there is no file")
    for part in ("images", "annotations"):
        for split in ("training", "validation"):
            folder = tmp_path / "ade" / part / split
            folder.mkdir(parents=True)
            pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
            Image.fromarray(pixels).save(folder / "ADE_1.png")
    refuses(tmp_path / "ade", "no background class")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(MissingExtraError, match=r"vitreg\[eval\]"), foreground(tmp_path / "text.mat"):
        pass


def test_the_registered_task_is_this_one() -> None:
    task = find_task("zero-shot-segmentation")
    assert task.config is HeatmapConfig
    assert replace(task.config(), limit=3).settings() == {"limit": 3, "layer": -1, "side": None}


# -- the real model ----------------------------------------------------------------------------------


def test_without_artifacts_attention_shows_the_foreground(shared: Path) -> None:
    """The ViT-Ti's corners draw a third of the attention: without them it finds more of the foreground."""
    vit = vitreg.load(str(shared / "models/vit_tiny_patch16_224.augreg_in21k_ft_in1k"))
    fix = vitreg.TestTimeRegisters({7: [417]})
    data = shared / "data/VOCdevkit/VOC2012"
    before = evaluate(vit, data, HeatmapConfig(workers=0, side=96, limit=30))
    with fix.applied_to(vit):
        after = evaluate(vit, data, HeatmapConfig(workers=0, side=96, limit=30))
    assert before.n == 30
    for name in ("mIoU", "mAP", "AP of the foreground"):
        assert after.metrics[name].less(before.metrics[name]).low > 0.005
