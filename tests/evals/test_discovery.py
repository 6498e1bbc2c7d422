"""Object discovery: against slow reimplementations box for box, on planted objects, at any image size."""

import copy
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from catalog import CATALOG, images, open_clip_visual, timm_model
from PIL import Image
from torch import Tensor

import vitreg
from vitreg.data.datasets.boxes import boxed_photos
from vitreg.data.images import Preprocess
from vitreg.errors import DataError, NonFiniteError, UnsupportedModelError
from vitreg.evals.discovery import BoxedScene, DiscoveryConfig, evaluate, locate, prepared, scenes_of
from vitreg.evals.lost import Found, lost
from vitreg.evals.tokencut import tokencut
from vitreg.features.any_size import at_any_size
from vitreg.features.extraction import extract_features
from vitreg.features.framing import Framing, normalisation_of
from vitreg.fixes import TestTimeRegisters, TokenSplitting
from vitreg.fixes.neurons import RegisterNeuron, RegisterNeurons
from vitreg.hooks.block_edit import edits_of

# -- slow reimplementations, from the papers' descriptions ------------------------------------------


def flood(start: tuple[int, int], inside: list[list[bool]]) -> list[tuple[int, int]]:
    """The cells that one reaches from `start` by steps up, down, left and right."""
    reached, border = {start}, [start]
    while border:
        row, column = border.pop()
        for cell in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            in_grid = 0 <= cell[0] < len(inside) and 0 <= cell[1] < len(inside[0])
            if in_grid and cell not in reached and inside[cell[0]][cell[1]]:
                reached.add(cell)
                border.append(cell)
    return sorted(reached)


def box_of(cells: list[tuple[int, int]]) -> tuple[int, int, int, int]:
    rows, columns = [row for row, _ in cells], [column for _, column in cells]
    return min(columns), min(rows), max(columns) + 1, max(rows) + 1


def slow_lost(features: np.ndarray, columns: int, bias: float, k: int) -> tuple[int, int, int, int]:
    patches = range(len(features))
    products = [features @ features[p] + bias for p in patches]
    degree = [int((products[p] > 0).sum()) for p in patches]
    in_order = sorted(patches, key=lambda p: (degree[p], p))
    seed = in_order[0]
    votes = np.zeros(len(features))
    for p in in_order[:k]:
        if products[seed][p] > 0:
            votes += products[p]
    inside = [[bool(v > 0) for v in votes[p : p + columns]] for p in patches[::columns]]
    return box_of(flood((seed // columns, seed % columns), inside))


def slow_tokencut(features: np.ndarray, columns: int, tau: float) -> tuple[int, int, int, int]:
    unit = np.array([f / np.sqrt((f * f).sum()) for f in features])
    weights = np.array([np.where(unit @ u > tau, 1.0, 1e-5) for u in unit])
    degrees = np.diag([row.sum() for row in weights])
    _, vectors = scipy.linalg.eigh(degrees - weights, degrees, subset_by_index=[1, 1])
    y = vectors[:, 0]
    seed = next(p for p in range(len(y)) if abs(y[p]) > max(abs(y)) * (1 - 1e-9))  # the first, up to rounding
    if y[seed] < 0:
        y = -y
    mean = sum(y) / len(y)
    inside = [[bool(v > mean) for v in y[p : p + columns]] for p in range(0, len(y), columns)]
    return box_of(flood((seed // columns, seed % columns), inside))


def overlap(one: Any, other: Any) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    both = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return both / (sum(areas) - both)


# -- the real model on 60 photos -------------------------------------------------------------------


@dataclass(frozen=True)
class Real:
    vit: vitreg.Backbone
    data: Path
    cache: Path
    scenes: list[BoxedScene]
    features: list[Tensor]


@pytest.fixture(scope="module")
def real(shared, tmp_path_factory) -> Real:
    vit = vitreg.load(str(shared / "models/vit_tiny_patch16_224.augreg_in21k_ft_in1k"))
    data, cache = shared / "data/VOCdevkit/VOC2012", tmp_path_factory.mktemp("features")
    framing = Framing(normalisation_of(vit), patch=(16, 16))
    photos = boxed_photos(data)
    config = DiscoveryConfig(cache=cache, workers=0)
    found = extract_features(at_any_size(vit), photos.paths, ["keys"], config, framing)
    return Real(vit, data, cache, scenes_of(photos, found.index, framing, (16, 16)), list(found.each("keys")))


def plain(features: Tensor) -> np.ndarray:
    return features.double().numpy()


@pytest.fixture(scope="module")
def slow(real) -> list[dict[str, tuple[int, int, int, int]]]:
    """What the slow ones find in centred keys."""
    found = []
    for scene, keys in zip(real.scenes, real.features, strict=True):
        centred = plain(keys) - sum(plain(keys)) / len(keys)
        columns = scene.grid[1]
        boxes = slow_lost(centred, columns, 0.0, 100), slow_tokencut(centred, columns, 0.2)
        found.append(dict(zip(("LOST", "TokenCut"), boxes, strict=True)))
    return found


def test_both_are_the_slow_ones_box_for_box(real, slow):
    config = DiscoveryConfig(centre=True)
    for scene, keys, expected in zip(real.scenes, real.features, slow, strict=True):
        found = locate(prepared(keys, config), scene.grid, config, 0.0)
        assert {name: one.box for name, one in found.items()} == expected, scene.path


@pytest.mark.parametrize(("normalise", "bias", "similar"), [(False, 0.0, 100), (True, -0.25, 40)])
def test_lost_is_the_slow_one_box_for_box(real, normalise, bias, similar):
    config = DiscoveryConfig(method="lost", normalise=normalise, similar=similar)
    for scene, keys in zip(real.scenes, real.features, strict=True):
        rows = plain(keys)
        if normalise:
            rows = np.array([f / np.sqrt((f * f).sum()) for f in rows])
        found = locate(prepared(keys, config), scene.grid, config, bias)
        assert found["LOST"].box == slow_lost(rows, scene.grid[1], bias, similar), scene.path


def test_tokencut_is_the_slow_one_box_for_box(real):
    config = DiscoveryConfig(method="tokencut", tau=0.4)
    for scene, keys in zip(real.scenes, real.features, strict=True):
        found = locate(prepared(keys, config), scene.grid, config, 0.0)
        assert found["TokenCut"].box == slow_tokencut(plain(keys), scene.grid[1], 0.4), scene.path


def test_corloc_is_the_slow_one(real, slow):
    """From the XML to the percentage, by code that shares nothing with the task's but the features."""
    right = {"LOST": 0, "TokenCut": 0, "whole": 0}
    for scene, found in zip(real.scenes, slow, strict=True):
        tree = ET.parse(real.data / "Annotations" / f"{scene.path.stem}.xml")
        width, height = (int(tree.findtext(f"size/{side}") or 0) for side in ("width", "height"))
        truth = []
        for box in tree.iter("bndbox"):
            left, top, right_, bottom = (
                float(box.findtext(n) or 0) for n in ("xmin", "ymin", "xmax", "ymax")
            )
            truth.append((left - 1, top - 1, right_, bottom))
        for name, (a, b, c, d) in (found | {"whole": (0, 0, 99, 99)}).items():
            pixels = (16 * a, 16 * b, min(16 * c, width), min(16 * d, height))
            right[name] += max(overlap(pixels, box) for box in truth) >= 0.5
    result = evaluate(real.vit, real.data, DiscoveryConfig(centre=True, cache=real.cache, workers=0))
    values = {name: metric.value for name, metric in result.metrics.items()}
    assert values == {
        "LOST CorLoc": pytest.approx(right["LOST"] / 60),
        "TokenCut CorLoc": pytest.approx(right["TokenCut"] / 60),
        "CorLoc of the whole photo": pytest.approx(right["whole"] / 60),
    }
    assert result.n == 60
    assert values["LOST CorLoc"] > 0.2  # centring makes it more than a constant
    assert not any("degenerate" in note for note in result.notes)


def test_plain_lost_is_degenerate_and_says_so(real):
    result = evaluate(real.vit, real.data, DiscoveryConfig(method="lost", cache=real.cache, workers=0))
    assert result.metrics["LOST CorLoc"].value == result.metrics["CorLoc of the whole photo"].value == 0.2
    assert any("LOST is degenerate on 59 of 60 photos" in note for note in result.notes)
    assert any("centre=true" in note for note in result.notes)


def test_a_swept_bias_is_the_best_of_the_held_out_photos(real, monkeypatch):
    biases = (0.0, -0.1, -0.2, -0.3)
    monkeypatch.setattr("vitreg.evals.discovery.BIASES", biases)
    config = DiscoveryConfig(method="lost", normalise=True, bias="sweep", cache=real.cache, workers=0)
    result = evaluate(real.vit, real.data, config)
    samples = result.metrics["LOST CorLoc"].samples[:, 0]
    held = np.isnan(samples).nonzero()[0]
    assert len(held) == 30
    corlocs = {}
    for bias in biases:
        boxes = [
            real.scenes[i].box(locate(prepared(real.features[i], config),
                                      real.scenes[i].grid, config, bias)["LOST"]) for i in held
        ]  # fmt: skip
        right = [
            max(overlap(box.tolist(), t) for t in real.scenes[i].truth.tolist()) >= 0.5
            for box, i in zip(boxes, held, strict=True)
        ]
        corlocs[bias] = sum(right) / 30
    best = max(biases, key=lambda bias: (corlocs[bias], bias))
    assert f"LOST's bias {best:g} was chosen on 30 of the photos" in " ".join(result.notes)
    assert corlocs[best] > corlocs[0.0]
    fixed = evaluate(real.vit, real.data, replace(config, bias=best))
    np.testing.assert_array_equal(
        samples[~np.isnan(samples)], fixed.metrics["LOST CorLoc"].samples[~np.isnan(samples), 0]
    )
    again = evaluate(real.vit, real.data, config)
    np.testing.assert_array_equal(again.metrics["LOST CorLoc"].samples[:, 0], samples)
    other = evaluate(real.vit, real.data, replace(config, seed=1))
    assert np.isnan(other.metrics["LOST CorLoc"].samples[:, 0]).nonzero()[0].tolist() != held.tolist()


@pytest.mark.parametrize(
    "fix",
    [
        TestTimeRegisters({7: [417]}),
        TokenSplitting(
            RegisterNeurons(
                (
                    RegisterNeuron(5, 485, threshold=0.365),
                    RegisterNeuron(6, 189, threshold=0.427),
                    RegisterNeuron(6, 59, threshold=0.181),
                    RegisterNeuron(7, 417, threshold=12.9),
                )
            )
        ),
    ],
    ids=["registers", "splitting"],
)
def test_fixes_work_at_native_size_and_have_features_of_their_own(real, fix, tmp_path):
    config = DiscoveryConfig(cache=tmp_path, workers=0)
    vit, paths = at_any_size(real.vit), [scene.path for scene in real.scenes[:2]]
    framing = Framing(normalisation_of(vit), patch=(16, 16))

    def extract() -> list[Tensor]:
        found = extract_features(vit, paths, ["keys", "norms@9"], config, framing)
        return [*found.each("keys"), *found.each("norms@9")]

    before = extract()
    with fix.applied_to(vit):
        fixed = extract()
    assert [len(x) for x in fixed] == [len(x) for x in before] == [18 * 32, 23 * 32] * 2
    for one, other in zip(fixed, before, strict=True):
        assert not torch.equal(one, other)
    assert all(float(norms.max()) > 300 for norms in before[2:])
    assert all(float(norms.max()) < 100 for norms in fixed[2:])
    for one, other in zip(extract(), before, strict=True):
        assert torch.equal(one, other)


# -- what is planted is found ----------------------------------------------------------------------


def planted(rows: int, columns: int, box: tuple[int, int, int, int]) -> Tensor:
    """Features that point one way in the box (left, top, right, bottom), and another elsewhere."""
    left, top, right, bottom = box
    inside = torch.zeros(rows, columns, dtype=torch.bool)
    inside[top:bottom, left:right] = True
    features = 0.05 * torch.randn(rows, columns, 8)
    features[..., 0] += torch.where(inside, -1.0, 1.0)
    return features.flatten(0, 1)


def test_both_find_a_planted_object():
    features = planted(9, 12, (3, 2, 7, 5))
    assert lost(features, (9, 12)) == Found((3, 2, 7, 5), False)
    assert tokencut(features, (9, 12)) == Found((3, 2, 7, 5), False)


def test_the_object_connects_over_edges_not_corners():
    features = planted(9, 12, (3, 2, 6, 5))
    grid = features.view(9, 12, -1)
    grid[5:7, 6:8] = grid[3, 4]  # touches the object at a corner
    assert lost(features, (9, 12)).box == (3, 2, 6, 5)
    grid[5, 5] = grid[3, 4]
    assert lost(features, (9, 12)).box == (3, 2, 8, 7)


def test_ties_go_to_the_first_patch():
    """Two objects of one size: each patch of either has as few positive products."""
    features = -torch.ones(6, 10, 1)
    features[1:3, 6:8] = features[3:5, 1:3] = 1
    assert lost(features.flatten(0, 1), (6, 10)).box == (6, 1, 8, 3)
    assert lost(features.flip(0).flatten(0, 1), (6, 10)).box == (1, 1, 3, 3)


def test_only_the_rarest_vote():
    """With k = 1 the seed alone votes, and its likes are few."""
    features = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 1, 0.1], [-1, 1, 1], [-1, -0.5, 3]])
    assert lost(features, (1, 5), similar=1).box == slow_lost(plain(features), 5, 0.0, 1)
    assert lost(features, (1, 5), similar=3).box == slow_lost(plain(features), 5, 0.0, 3)
    assert lost(features, (1, 5), similar=1).box != lost(features, (1, 5), similar=3).box


def test_nothing_is_positive():
    """A bias that leaves no product positive leaves the seed."""
    assert lost(torch.eye(6), (2, 3), bias=-1.0) == Found((0, 0, 1, 1), False)


def test_tokencut_without_a_best_cut_is_degenerate():
    for features in (torch.ones(12, 3), torch.eye(12), torch.zeros(12, 3)):
        assert tokencut(features, (3, 4)) == Found((0, 0, 4, 3), True)
    assert tokencut(torch.ones(1, 3), (1, 1)) == Found((0, 0, 1, 1), True)


def test_degenerate_lost_is_the_whole_photo():
    assert lost(torch.rand(20, 5) + 0.1, (4, 5)) == Found((0, 0, 5, 4), True)


# -- a small model on photos that are made here ----------------------------------------------------


@pytest.fixture
def small() -> vitreg.Backbone:
    def preprocess(image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(image.resize((40, 32)), np.float32)).permute(2, 0, 1) / 127.5 - 1

    return with_preprocess("timm vit", preprocess)


def with_preprocess(name: str, preprocess: Preprocess) -> vitreg.Backbone:
    return replace(CATALOG[name].backbone(), preprocess=preprocess)


@pytest.fixture
def config() -> DiscoveryConfig:
    return DiscoveryConfig(workers=0)


@pytest.mark.parametrize("resolution", ["native", "model"])
@pytest.mark.parametrize("features", ["keys", "queries", "values"])
def test_everything_runs_on_photos_of_any_size(small, voc, config, resolution, features):
    result = evaluate(small, voc, replace(config, resolution=resolution, features=features))
    assert list(result.metrics) == ["LOST CorLoc", "TokenCut CorLoc", "CorLoc of the whole photo"]
    assert result.metrics["CorLoc of the whole photo"].value == 0.5
    assert result.n == 6
    assert result.config["resolution"] == resolution


def test_one_method_only(small, voc, config):
    found = evaluate(small, voc, replace(config, method="tokencut", limit=3))
    assert list(found.metrics) == ["TokenCut CorLoc", "CorLoc of the whole photo"]
    assert found.n == 3


def test_boxes_are_in_pixels_of_the_photo(voc):
    photos = boxed_photos(voc)
    native = Framing(
        normalisation_of(with_preprocess("timm vit", lambda _: torch.zeros(3, 4, 4))), patch=(8, 8)
    )
    scene = scenes_of(photos, [0], native, (8, 8))[0]  # 30x50 pixels
    assert scene.grid == (4, 7)
    assert scene.box(Found((1, 2, 7, 4), False)).tolist() == [8, 16, 50, 30]
    squeezed = scenes_of(photos, [0], replace(native, size=(32, 40)), (8, 8))[0]
    assert squeezed.grid == (4, 5)
    assert squeezed.box(Found((1, 2, 5, 4), False)).tolist() == [10, 15, 50, 30]


def test_the_picture(small, voc, config):
    result = evaluate(small, voc, config)
    assert result.picture is not None
    figure = result.picture()
    drawn = [ax for ax in figure.axes if ax.images]
    assert [ax.get_title(loc="left") for ax in drawn] == [f"{i}.jpg" for i in range(6)]
    assert all(len(ax.patches) == 3 for ax in drawn)  # an object, LOST, TokenCut
    colours = {patch.get_edgecolor() for patch in drawn[0].patches}
    assert len(colours) == len({str(patch.get_linestyle()) for patch in drawn[0].patches}) == 3


def test_unreadable_photos_are_left_out(small, voc, config):
    (voc / "JPEGImages/2.jpg").write_bytes(b"no photo")
    result = evaluate(small, voc, config)
    assert result.n == 5
    assert any("2.jpg" in note for note in result.notes)
    assert result.metrics["CorLoc of the whole photo"].value == 0.6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bias": "sweep"}, "set normalise=true"),
        ({"bias": "sweep", "normalise": True, "held_out": 1.0}, "0 < held_out < 1"),
        ({"bias": "sweep", "normalise": True, "limit": 1}, "found one photo"),
        ({"bias": "sweep", "normalise": True, "method": "tokencut"}, "TokenCut has no bias"),
        ({"similar": 0}, "similar=0: in LOST at least one"),
    ],
)
def test_settings_that_do_not_hold_together(small, voc, config, settings, message):
    with pytest.raises(DataError, match=message):
        evaluate(small, voc, replace(config, **settings))


def test_features_that_are_not_finite(config):
    with pytest.raises(NonFiniteError, match="the model's keys hold NaN"):
        prepared(torch.full((36, 4), float("nan")), config)


# -- models at any size ----------------------------------------------------------------------------

ANY = ["timm vit", "timm dinov2 registers", "timm siglip", "timm rope mixed", "timm oblong patches",
       "hf dinov2", "open_clip vit", "open_clip coca"]  # fmt: skip


def flags(model: torch.nn.Module) -> Iterator[Any]:
    for module in model.modules():
        yield from (v for k, v in vars(module).items() if not k.startswith("_"))
        yield from (id(p) for p in module.parameters(recurse=False))


@pytest.mark.parametrize("name", ANY)
def test_any_whole_number_of_patches_and_the_model_is_unchanged(name):
    vit = CATALOG[name].backbone()
    before = list(flags(vit.model))
    anywhere = at_any_size(vit)
    for grid in ((6, 3), (2, 7)):
        pixels = torch.randn(2, 3, *vit.anatomy.pixels(grid))
        with vitreg.trace(anywhere, qkv=True) as t, torch.no_grad():
            anywhere(pixels)
        assert t.layout.grid == grid
        assert t.k.shape[3] == vit.anatomy.prefix + vit.anatomy.registers + grid[0] * grid[1]
    own = images(vit)
    with vitreg.trace(vit, residuals=True) as one, torch.no_grad():
        vit(own)
    with vitreg.trace(anywhere, residuals=True) as other, torch.no_grad():
        anywhere(own)
    assert torch.equal(one.residuals, other.residuals)
    assert list(flags(vit.model)) == before


def test_timm_at_another_size_is_timm_built_for_it():
    """timm's own resampling when it loads a checkpoint; it takes the old grid to be a square."""
    from timm.models.vision_transformer import checkpoint_filter_fn

    square, built = (timm_model("vit_small_patch16_224", img_size=size)().eval() for size in (32, (56, 24)))
    built.load_state_dict(checkpoint_filter_fn(copy.deepcopy(square.state_dict()), built))
    pixels = torch.randn(2, 3, 56, 24)
    with torch.no_grad():
        torch.testing.assert_close(at_any_size(vitreg.wrap(square))(pixels), built(pixels))


def test_open_clip_at_another_size_is_open_clip_built_for_it():
    """open_clip's own resampling when it loads a checkpoint."""
    from open_clip.model import resize_pos_embed

    square, built = (open_clip_visual(image_size=size)().eval() for size in ((32, 32), (56, 24)))
    weights = {f"visual.{name}": value.clone() for name, value in square.state_dict().items()}
    whole = torch.nn.Module()
    whole.visual = built
    resize_pos_embed(weights, whole)
    built.load_state_dict({name.removeprefix("visual."): value for name, value in weights.items()})
    pixels = torch.randn(2, 3, 56, 24)
    with torch.no_grad():
        torch.testing.assert_close(at_any_size(vitreg.wrap(square))(pixels), built(pixels))


def test_a_fix_stays_on_at_another_size():
    vit = CATALOG["open_clip vit"].backbone()
    anywhere, pixels = at_any_size(vit), torch.randn(1, 3, 48, 56)
    with torch.no_grad():
        before = anywhere(pixels)
        with TestTimeRegisters({0: [3, 7]}).applied_to(anywhere):
            assert any(map(edits_of, vit.anatomy.block_modules(vit.model)))
            fixed = at_any_size(vit)(pixels)
            torch.testing.assert_close(anywhere(pixels), fixed)
        torch.testing.assert_close(anywhere(pixels), before)
    assert not torch.allclose(fixed, before)


def test_a_model_of_one_size_is_refused_but_squeezes(voc, config, small):
    vit = replace(CATALOG["torchvision vit"].backbone(), preprocess=small.preprocess)
    with pytest.raises(UnsupportedModelError, match=r"images of 32x32 pixels only.*--set resolution=model"):
        evaluate(vit, voc, config)
    assert evaluate(vit, voc, replace(config, resolution="model")).n == 6
