"""Object discovery of large photos: the answer of the whole matrix, in bounded memory."""

import itertools
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch
from catalog import CATALOG
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from voc_files import voc_object, voc_xml

from vitreg.errors import DataError
from vitreg.evals import patch_pairs as pairs
from vitreg.evals.discovery import DiscoveryConfig, evaluate
from vitreg.evals.lost import Found, extent_around, lost, lost_by_bias
from vitreg.evals.tokencut import MOST_SOLVED, tokencut
from vitreg.features.framing import Framing, Normalisation
from vitreg.features.keys import preprocess_key

# Below and beyond what is solved as a whole; flat, tall, of a number of patches that no byte divides.
GRIDS = [(3, 4), (7, 8), (1, 90), (16, 16), (17, 16), (2, 150)]


def scenes(rows: int, columns: int) -> Iterator[tuple[str, Tensor]]:
    """Features (p, d) of many kinds; exact numbers where it comes to ties."""
    n, generator = rows * columns, torch.Generator().manual_seed(rows)
    yield "noise", torch.randn(n, 8, generator=generator)
    yield "noise in which hardly any two are alike", torch.randn(n, 64, generator=generator)
    yield "all alike", torch.ones(n, 3)
    yield "none alike", torch.eye(n)
    yield "two halves", torch.where(torch.arange(n)[:, None] < n // 3, -1.0, 1.0).expand(n, 2)
    yield "some patches are nothing", torch.where(torch.arange(n)[:, None] < n // 3, 0.0, 1.0).expand(n, 2)
    angle = 2 * torch.pi * torch.arange(n) / n
    yield "a ring", torch.stack([angle.cos(), angle.sin()], 1)
    for name, others in (("an object", [(1, 1)]), ("two objects", [(1, 1), (2, 2)]), ("twins", [(1, 1)] * 2)):
        features = torch.zeros(rows, columns, 3)
        features[..., 0] = 1
        for i, (height, width) in enumerate(others):
            top, left = i * (rows - height), i * (columns - width)
            features[top : top + height, left : left + width] = torch.eye(3)[i + 1]
        yield name, features.flatten(0, 1)
    inside = torch.zeros(rows, columns, dtype=torch.bool)
    inside[rows // 4 : rows // 2 + 1, columns // 3 : columns // 2 + 1] = True
    noisy = 0.05 * torch.randn(rows, columns, 8, generator=generator)
    noisy[..., 0] += torch.where(inside, -1.0, 1.0)
    yield "a noisy object", noisy.flatten(0, 1)


def dense_tokencut(features: Tensor, grid: tuple[int, int], tau: float) -> Found:
    """By all eigenvectors of the whole matrix."""
    unit = torch.nn.functional.normalize(features.double(), dim=1).numpy()
    weights = np.where(unit @ unit.T > tau, 1.0, 1e-5)
    values, vectors = scipy.linalg.eigh(np.diag(weights.sum(1)) - weights, np.diag(weights.sum(1)))
    if values[2] - values[1] < 1e-9:
        return Found((0, 0, grid[1], grid[0]), True)
    y = vectors[:, 1]
    seed = int(np.argmax(abs(y) > abs(y).max() * (1 - 1e-9)))
    y = y * np.sign(y[seed])
    return Found(extent_around(seed, y - y.mean() > 1e-9 * y.max(), grid), False)


def dense_lost(features: Tensor, grid: tuple[int, int], bias: float, similar: int) -> Found:
    rows = features.double().numpy()
    products = rows @ rows.T + bias
    rarest = np.argsort((products > 0).sum(1), kind="stable")[:similar]
    seed = int(rarest[0])
    votes = products[rarest[products[seed, rarest] > 0]].sum(0)
    return Found(extent_around(seed, votes > 0, grid), bool((votes > 0).all()))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_tokencut_is_that_of_the_whole_matrix(grid, monkeypatch):
    monkeypatch.setattr(pairs, "BLOCK_BYTES", 40_000)
    degenerate = set()
    for (name, features), tau in itertools.product(scenes(*grid), (-0.3, 0.4)):
        found = tokencut(features, grid, tau)
        assert found == dense_tokencut(features, grid, tau), (name, tau)
        degenerate.add(found.degenerate)
    assert degenerate == {True, False}


@pytest.mark.parametrize("grid", [(17, 16), (24, 32), (40, 60)], ids=str)
def test_many_patches_that_are_all_alike_have_no_best_cut(grid):
    assert tokencut(torch.ones(grid[0] * grid[1], 3), grid) == Found((0, 0, grid[1], grid[0]), True)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("bytes_of_a_block", [4_000, pairs.BLOCK_BYTES])
def test_lost_is_that_of_the_whole_matrix(grid, bytes_of_a_block, monkeypatch):
    monkeypatch.setattr(pairs, "BLOCK_BYTES", bytes_of_a_block)
    biases = (0.0, -0.25, 0.5)
    for (_, features), similar in itertools.product(scenes(*grid), (1, 100)):
        if features.shape[1] > 3:  # sums of so many are rounded by the order in which they are added
            continue
        expected = [dense_lost(features, grid, bias, similar) for bias in biases]
        assert lost_by_bias(features, grid, biases, similar) == expected
        assert [lost(features, grid, bias, similar) for bias in biases] == expected


@pytest.mark.parametrize(("method", "most"), [(lost, 0), (tokencut, 1 / 8)])
def test_memory_is_bounded(method, most, monkeypatch):
    """Blocks, a few copies of the features and Lanczos' vectors; beside them TokenCut's bit for each pair."""
    grid, block = (60, 45), 1 << 20
    monkeypatch.setattr(pairs, "BLOCK_BYTES", block)
    features = dict(scenes(*grid))["a noisy object"]
    p, d = features.shape
    assert p > 10 * MOST_SOLVED
    tracemalloc.start()
    try:
        found = method(features, grid)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert not found.degenerate
    # A block and what is compared in it; LOST's votes of 100 patches are a block or less.
    assert peak < most * p * p + 3 * block + 8 * p * (3 * d + 60)
    assert peak < p * p  # a matrix of float64 has eight times as much


# -- at most so many patches -----------------------------------------------------------------------


@given(
    size=st.tuples(st.integers(1, 4000), st.integers(1, 4000)),
    patch=st.tuples(st.integers(1, 32), st.integers(1, 32)),
    most=st.integers(1, 5000),
)
@settings(deadline=None, max_examples=300)
def test_a_photo_is_scaled_down_to_so_many_patches(size, patch, most):
    framing = Framing(Normalisation((1, 1, 1), (0, 0, 0)), patch=patch, most=most)
    grid = [-(-length // side) for length, side in zip(size, patch, strict=True)]
    found = framing.scaled_size(*size)
    if grid[0] * grid[1] <= most:
        assert found == size
        return
    rows, columns = found[0] // patch[0], found[1] // patch[1]
    assert found == (rows * patch[0], columns * patch[1])
    assert 1 <= rows * columns <= most
    if min(rows, columns) > 10 and min(grid) > 10:
        assert rows * columns > 0.7 * most
        assert rows / columns == pytest.approx(size[0] * patch[1] / size[1] / patch[0], rel=0.2)


@pytest.fixture
def voc(tmp_path):
    """A small photo and a large one."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    for i, (height, width) in enumerate([(32, 40), (160, 240)]):
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"JPEGImages/{i}.jpg")
        text = voc_xml(voc_object(1, 1, width, height), size=(height, width))
        (tmp_path / f"Annotations/{i}.xml").write_text(text, encoding="utf-8")
    (tmp_path / "ImageSets/Main/trainval.txt").write_text("0\n1\n", encoding="utf-8")
    return tmp_path


def test_what_was_scaled_down_is_said(voc, tmp_path):
    def preprocess(image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(image.resize((40, 32)), np.float32)).permute(2, 0, 1) / 127.5 - 1

    vit = replace(CATALOG["timm vit"].backbone(), preprocess=preprocess)
    config = DiscoveryConfig(workers=0, cache=tmp_path / "cache")
    assert "scaled down" not in " ".join(evaluate(vit, voc, config).notes)
    result = evaluate(vit, voc, replace(config, most_patches=100))  # no features of the larger size
    note = "1 of 2 photos, 1.jpg among them, have more than 100 patches and were scaled down"
    assert note in " ".join(result.notes)
    assert result.metrics["CorLoc of the whole photo"].value == 1
    squeezed = evaluate(vit, voc, replace(config, most_patches=100, resolution="model"))
    assert "scaled down" not in " ".join(squeezed.notes)
    with pytest.raises(DataError, match="most_patches=3: expected 4 or more"):
        evaluate(vit, voc, replace(config, most_patches=3))


def test_features_of_another_bound_are_others():
    framing = Framing(Normalisation((1, 1, 1), (0, 0, 0)), patch=(8, 8))
    keys = {preprocess_key(replace(framing, most=most)) for most in (None, 5000, 70000)}
    assert len(keys) == 3
