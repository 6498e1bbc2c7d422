"""Features on disk: resumed, never stale, in order, the same as plain forward passes give."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from catalog import CATALOG, images
from checkpoints import tiny_timm
from PIL import Image

import vitreg
from vitreg.data.evenly_spaced import evenly_spaced
from vitreg.errors import ImageError, UnsupportedModelError
from vitreg.features import extraction as module
from vitreg.features.config import Config
from vitreg.features.extraction import extract_features
from vitreg.features.framing import Framing, Windows, normalisation_of
from vitreg.features.keys import model_key, preprocess_key
from vitreg.features.observer import Observer
from vitreg.hooks.block_edit import without_edits


@pytest.fixture
def vit() -> vitreg.Backbone:
    return vitreg.wrap(tiny_timm(depth=3))


@pytest.fixture
def paths(tmp_path) -> list[Path]:
    """Twelve small photos; with chunks of 5, three files."""
    random = np.random.default_rng(0)
    found = [tmp_path / f"photos/{i:02d}.png" for i in range(12)]
    found[0].parent.mkdir()
    for i, path in enumerate(found):
        Image.fromarray(random.integers(0, 256, (30 + i, 64, 3), dtype=np.uint8)).save(path)
    return found


@pytest.fixture
def config(tmp_path, monkeypatch) -> Config:
    monkeypatch.setattr(module, "_CHUNK", 5)
    return Config(cache=tmp_path / "cache", batch_size=4, workers=0)


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """The number of images of each forward pass."""
    seen: list[int] = []
    plain = Observer.__call__

    def counted(self, pixels):
        seen.append(len(pixels))
        return plain(self, pixels)

    monkeypatch.setattr(Observer, "__call__", counted)
    return seen


def plain_cls(vit, paths) -> torch.Tensor:
    pixels = torch.stack([vit.preprocess(Image.open(path).convert("RGB")) for path in paths])
    with torch.no_grad():
        return vit.model.forward_features(pixels)[:, 0]


@pytest.mark.parametrize("cached", [True, False])
def test_features_are_those_of_a_plain_pass_in_order(vit, paths, config, cached):
    found = extract_features(vit, paths, ["cls"], config if cached else replace(config, cache=None))
    assert found.index == tuple(range(12))
    torch.testing.assert_close(found["cls"], plain_cls(vit, paths), atol=1e-5, rtol=1e-5)


def test_a_second_run_reads_what_the_first_one_wrote(vit, paths, config, passes):
    first = extract_features(vit, paths, ["cls", "patches"], config)
    assert sum(passes) == 12
    passes.clear()
    again = extract_features(vit, paths, ["patches", "cls"], config)
    assert passes == []
    assert torch.equal(first["patches"], again["patches"])


def test_an_interrupted_run_goes_on_where_it_stopped(vit, paths, config, passes, monkeypatch):
    counted = Observer.__call__

    def dying(self, pixels):
        if sum(passes) >= 6:
            raise KeyboardInterrupt
        return counted(self, pixels)

    monkeypatch.setattr(Observer, "__call__", dying)
    with pytest.raises(KeyboardInterrupt):
        extract_features(vit, paths, ["cls"], config)
    monkeypatch.setattr(Observer, "__call__", counted)
    passes.clear()
    found = extract_features(vit, paths, ["cls"], config)
    assert sum(passes) == 7  # five were kept
    torch.testing.assert_close(found["cls"], plain_cls(vit, paths), atol=1e-5, rtol=1e-5)


def _other_photo(vit, paths):
    os.utime(paths[6], (1, 1))
    Image.open(paths[6]).rotate(180).save(paths[6])
    os.utime(paths[6], (1, 1))  # nor is it told by the time
    return vit


def _other_weight(vit, paths):
    with torch.no_grad():
        vit.model.blocks[1].mlp.fc2.bias[0] += 1e-3
    return vit


def _other_preprocess(vit, paths):
    return replace(vit, preprocess=lambda image: -plain(image)) if (plain := vit.preprocess) else vit


def _other_order(vit, paths):
    paths[0], paths[11] = paths[11], paths[0]
    return vit


@pytest.mark.parametrize(
    ("change", "recomputed"),
    [(_other_photo, 5), (_other_weight, 12), (_other_preprocess, 12), (_other_order, 7)],
)
def test_whatever_changes_nothing_stale_is_read(vit, paths, config, passes, change, recomputed):
    extract_features(vit, paths, ["cls"], config)
    passes.clear()
    vit = change(vit, paths)
    found = extract_features(vit, paths, ["cls"], config)
    assert sum(passes) == recomputed
    torch.testing.assert_close(found["cls"], plain_cls(vit, paths), atol=1e-5, rtol=1e-5)


def test_fixes_have_caches_of_their_own(vit, paths, config):
    one, other = ({1: [3, 5]}, {1: [3, 6]})
    plain = extract_features(vit, paths, ["cls"], config)["cls"]
    found = []
    for neurons in (one, other):
        with vitreg.TestTimeRegisters(neurons).applied_to(vit):
            found.append(extract_features(vit, paths, ["cls"], config)["cls"])
            with without_edits(vit.model):
                assert torch.equal(extract_features(vit, paths, ["cls"], config)["cls"], plain)
    assert not torch.equal(found[0], plain)
    assert not torch.equal(found[0], found[1])


def test_keys_depend_on_contents_only(vit):
    same = vitreg.wrap(tiny_timm(depth=3), vit.preprocess)
    assert model_key(vit) == model_key(same)
    fix = vitreg.TestTimeRegisters({1: [3]})
    with fix.applied_to(vit):
        fixed = model_key(vit)
        with without_edits(vit.model):
            assert model_key(vit) == model_key(same)
    with vitreg.TestTimeRegisters({1: [3]}).applied_to(same):
        assert model_key(same) == fixed != model_key(vit)
    assert model_key(replace(vit, image_size=(64, 64))) != model_key(vit)
    assert preprocess_key(vit.preprocess) == preprocess_key(same.preprocess)


@pytest.mark.parametrize("resumed", [False, True])
def test_unreadable_photos_are_left_out_and_named_every_time(vit, paths, config, resumed):
    paths[2].write_bytes(b"no photo")
    for path in paths[5:10]:  # a whole chunk
        path.write_bytes(b"")
    for _ in range(1 + resumed):
        found = extract_features(vit, paths, ["cls"], config)
    assert found.index == (0, 1, 3, 4, 10, 11)
    assert [Path(image.path) for image in found.failed] == [paths[2], *paths[5:10]]
    assert "6 photos could not be read" in found.notes()[0]
    good = [paths[i] for i in found.index]
    torch.testing.assert_close(found["cls"], plain_cls(vit, good), atol=1e-5, rtol=1e-5)
    for path in paths[5:10]:
        path.write_bytes(paths[0].read_bytes())
    repaired = extract_features(vit, paths, ["cls"], config)
    assert len(repaired) == 11
    assert [Path(image.path) for image in repaired.failed] == [paths[2]]


def test_no_readable_photo_is_an_error(vit, paths, config):
    for path in paths:
        path.write_bytes(b"no photo")
    with pytest.raises(ImageError, match=r"none of 12 photos could be read: .*00\.png: "):
        extract_features(vit, paths, ["cls"], config)


def test_a_limit_is_spread_over_the_list(vit, paths, config):
    found = extract_features(vit, paths, ["cls"], replace(config, limit=4))
    assert found.index == (0, 3, 6, 9)
    torch.testing.assert_close(found["cls"], plain_cls(vit, paths)[[0, 3, 6, 9]], atol=1e-5, rtol=1e-5)
    assert evenly_spaced(3, 10) == evenly_spaced(3, None) == [0, 1, 2]


def test_windows_of_photos_of_any_size(vit, paths, config):
    framing = Framing(normalisation_of(vit), side=32)
    windows = Windows((32, 32), (16, 16))
    found = extract_features(vit, paths, ["cls"], config, framing, windows)
    for path, kept in zip(paths, found.each("cls"), strict=True):
        cut = windows(framing(Image.open(path)))
        with torch.no_grad():
            expected = vit.model.forward_features(cut)[:, 0]
        torch.testing.assert_close(kept, expected, atol=1e-5, rtol=1e-5)
    assert {len(kept) for kept in found.each("cls")} == {3, 4}
    with pytest.raises(RuntimeError):
        found["cls"]  # not of one shape
    fewer = extract_features(vit, paths, ["cls"], config, framing, Windows((32, 32), (32, 32)))
    assert {len(kept) for kept in fewer.each("cls")} == {2, 3}


def test_framing_keeps_the_whole_photo(vit):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8))
    normalise = normalisation_of(vit)
    expected = (np.asarray(photo) / 255 - 0.5) / 0.5  # this model's mean and deviation
    torch.testing.assert_close(
        normalise(photo), torch.from_numpy(expected).permute(2, 0, 1).float(), atol=1e-5, rtol=1e-5
    )
    padded = Framing(normalise, patch=(16, 16))(photo)
    assert padded.shape == (3, 48, 80)
    assert torch.equal(padded[:, :40, :70], normalise(photo))
    assert not padded[:, 40:].any()
    assert Framing(normalise, side=32)(photo).shape == (3, 32, 56)
    assert Framing(normalise, size=(32, 48))(photo).shape == (3, 32, 48)


def test_windows_cover_everything_and_end_at_the_border():
    assert Windows((32, 32), (16, 16)).corners(32, 32) == [(0, 0)]
    assert Windows((32, 32), (20, 20)).corners(32, 75) == [(0, 0), (0, 20), (0, 40), (0, 43)]
    with pytest.raises(ValueError, match="found 31 pixels"):
        Windows((32, 32), (16, 16)).corners(31, 64)


@pytest.mark.parametrize("name", ["timm vit", "timm dinov2 registers", "hf dinov2", "open_clip"])
def test_the_observer_agrees_with_a_trace(name):
    vit = next(entry for key, entry in CATALOG.items() if key.startswith(name)).backbone()
    pixels, layout = images(vit), vit.layout
    names = ["norms@1", "norms", "keys", "queries@0", "values", "patches@1", "patches", "mean"]
    names += ["cls", "attention"] if layout.prefix else []
    names += ["registers"] if layout.registers else []
    found = Observer(vit, names)(pixels)
    with torch.no_grad(), vitreg.trace(vit, residuals=True, qkv=True, attention="cls") as t:
        vit(pixels)
    norm = vitreg.models.head.find_readout(vit).norm or (lambda x: x)
    stream = norm(t.residuals).detach()
    patches = layout.patch_slice
    expected = {
        "norms@1": t.norms[1][:, patches],
        "norms": t.norms[2][:, patches],
        "keys": t.k[2].transpose(1, 2).flatten(2)[:, patches],
        "queries@0": t.q[0].transpose(1, 2).flatten(2)[:, patches],
        "values": t.v[2].transpose(1, 2).flatten(2)[:, patches],
        "patches@1": stream[1][:, patches],
        "patches": stream[2][:, patches],
        "mean": stream[2][:, patches].mean(1),
        "cls": stream[2][:, 0],
        "attention": t.attention[2][:, :, 0, patches],
        "registers": stream[2][:, layout.register_slice],
    }
    assert set(found) == set(names)
    for feature, value in found.items():
        torch.testing.assert_close(value, expected[feature].detach(), atol=1e-5, rtol=1e-5, msg=feature)


def test_the_tokens_that_a_fix_carries(vit):
    pixels = images(vit)
    fix = vitreg.TestTimeRegisters({1: [3]}, registers=2)
    with fix.applied_to(vit) as handle:
        found = Observer(vit, ["test_registers"])(pixels)["test_registers"]
        assert torch.equal(found, vit.model.norm(handle.carried).detach())
        assert found.shape == (2, 2, 32)
        with without_edits(vit.model), pytest.raises(UnsupportedModelError, match="no fix that carries"):
            Observer(vit, ["test_registers"])(pixels)


@pytest.mark.parametrize(
    ("names", "says"),
    [(["cls@3"], "expected a layer of -3 to 2"), (["cls", "cls@-1"], "each feature once")],
)
def test_wrong_requests(vit, names, says):
    with pytest.raises(ValueError, match=says):
        Observer(vit, names)


@pytest.mark.parametrize(
    ("names", "paths", "says"),
    [(["colour"], 1, "no feature is called 'colour'"), (["cls"], 2, "a photo twice")],
)
def test_wrong_lists(vit, tmp_path, names, paths, says):
    with pytest.raises(ValueError, match=says):
        extract_features(vit, [tmp_path / "a.png"] * paths, names)


def test_what_a_model_lacks_is_named():
    vit = vitreg.wrap(tiny_timm(num_classes=0, global_pool="avg", class_token=False))
    for feature, what in (("cls", "no CLS"), ("registers", "no trained register"), ("logits", "no class")):
        with pytest.raises(UnsupportedModelError, match=what):
            Observer(vit, [feature])
