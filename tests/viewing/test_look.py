"""A look says of photos what is so: marks, figures, sentences and pictures, for every kind of model."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from catalog import CATALOG, FEW
from PIL import Image

import vitreg
from vitreg.data.images import demo_photos
from vitreg.errors import ImageError
from vitreg.features.observer import Observer
from vitreg.models.probe import evaluating
from vitreg.phantoms.bundled import planted_example
from vitreg.plots.style import png
from vitreg.printing import percent
from vitreg.viewing.colours import feature_colours
from vitreg.viewing.looking import JUDGED, SHOWN
from vitreg.viewing.patches import patch_of, same_place
from vitreg.viewing.wording import photo_facts


@pytest.fixture(scope="module")
def example():
    """The bundled ViT as trained, its phantom, and drawn photos."""
    vit, phantom, photos = planted_example(16)
    return vit, phantom, next(batch.pixels for batch in photos)


@pytest.fixture(scope="module")
def seen(example):
    """Two photos, the phantom without and with the planted neurons moved to a register."""
    _, phantom, pixels = example
    fix = vitreg.TestTimeRegisters({phantom.layer: list(phantom.neurons)})
    queries = ["CLS", "outlier", (3, 4)]
    return vitreg.look(phantom.vit, pixels[:2], fix=fix, queries=queries, layers=True)


def test_what_was_planted_is_marked_and_counted(example, seen) -> None:
    _, phantom, pixels = example
    marked = phantom.marked(pixels[:2]).numpy()
    assert marked.any((1, 2)).all()
    for photo in range(2):
        version = seen.versions[0]
        assert (version.outliers(photo) == marked[photo]).all()
        facts = photo_facts(version, photo, version)
        attention = version.photos[photo].attention[-1]
        assert facts.artifacts == marked[photo].sum()
        assert facts.attention == pytest.approx(attention[marked[photo]].sum())
        assert f"{facts.artifacts} of 144 patches are artifacts" in seen.full()
        assert f"{facts.artifacts} of 144 " in str(seen)


def test_a_fix_is_a_second_version_and_is_taken_off_again(example, seen) -> None:
    _, phantom, pixels = example
    before, after = seen.versions
    assert not vitreg.applied(phantom.vit.model)
    assert not after.diagnosis.has_artifacts
    marked = phantom.marked(pixels[:1])[0].numpy()
    facts = photo_facts(after, 0, before)
    assert facts.attention is None
    assert facts.attention_on_former == pytest.approx(after.photos[0].attention[-1][marked].sum())
    assert "the former artifacts draw" in seen.full()
    assert percent(facts.attention_on_former) in str(seen)
    assert after.label == "fixed (registers)"


@pytest.mark.parametrize("name", FEW)
def test_maps_and_features_are_the_models(name: str) -> None:
    vit = CATALOG[name].backbone()
    pixels = torch.randn(3, 3, *vit.image_size, generator=torch.Generator().manual_seed(1))
    version = vitreg.look(vit, pixels, layers=True).versions[0]
    layout = vit.layout
    with evaluating(vit.model), vitreg.trace(vit, residuals=True) as t:
        vit(pixels)
    norms = t.norms[:, :, layout.patch_slice].unflatten(-1, layout.grid)
    assert np.allclose([photo.norms for photo in version.photos], norms.transpose(0, 1), rtol=1e-5)
    alone = Observer(vit, ["patches"])(pixels)["patches"].unflatten(1, layout.grid)
    assert torch.allclose(version.last, alone, atol=1e-5)
    assert set(version.features) == set(range(vit.anatomy.depth))
    assert torch.allclose(version.features[vit.anatomy.depth - 1], version.last, atol=1e-5)


@pytest.mark.parametrize("name", ["timm vit", "hf dinov2 registers", "timm siglip"])
def test_every_picture_can_be_drawn_and_is_the_same_again(name: str) -> None:
    vit = CATALOG[name].backbone()
    pixels = torch.randn(2, 3, *vit.image_size, generator=torch.Generator().manual_seed(1))
    source = "CLS" if vit.layout.prefix else "centre"
    seen = vitreg.look(vit, pixels, queries=[source, (1, 1)], layers=True)
    again = vitreg.look(vit, pixels, queries=[source, (1, 1)], layers=True)
    for draw in (
        lambda x: x.figure(),
        lambda x: x.figure(together=True, foreground=True),
        lambda x: x.by_layer(1),
        lambda x: x.similar((0, 1), "outlier", photo=1),
        lambda x: x.attention(1),
    ):
        assert png(draw(seen), dpi=50) == png(draw(again), dpi=50)


def test_the_figure_has_a_row_for_each_photo_and_version(seen) -> None:
    axes = [ax for ax in seen.figure().axes if ax.images]
    assert len(axes) == 2 * 2 * 4
    assert len([ax for ax in seen.by_layer().axes if ax.images]) == 2 * 3 * 6
    assert len([ax for ax in seen.attention().axes if ax.images]) == 2 * 4
    assert len([ax for ax in seen.similar((0, 0)).axes if ax.images]) == 2 * 2
    assert "data:image/png" in seen._repr_html_()


def test_versions_of_a_model_share_the_axes_of_their_colours(seen) -> None:
    """Patches that the fix leaves alone keep their colours."""
    before, after = feature_colours(seen, together=False, foreground=False)
    same = torch.isclose(seen.versions[0].last, seen.versions[1].last, atol=1e-3).all(-1).numpy()
    for photo in range(2):
        change = np.abs(before[photo].astype(int) - after[photo]).max(-1)
        moved = (seen.versions[0].last[photo] - seen.versions[1].last[photo]).norm(dim=-1).numpy()
        assert change[same[photo]].max(initial=0) <= 2
        assert change[moved > np.quantile(moved, 0.95)].mean() > change.mean()


def test_the_same_model_twice_has_the_same_colours_and_another_name(example) -> None:
    vit, phantom, pixels = example
    seen = vitreg.look([vit, phantom.vit], pixels[:1])
    clean, planted = seen.versions
    assert not clean.diagnosis.has_artifacts
    assert planted.diagnosis.has_artifacts
    assert clean.model != planted.model
    pictures = feature_colours(seen, together=True, foreground=False)
    normal = ~planted.outliers(0)
    difference = np.abs(pictures[0][0].astype(int) - pictures[1][0]).max(-1)[normal]
    assert np.median(difference) < 60


def test_one_photo_is_judged_beside_bundled_ones_and_says_so(example) -> None:
    vit, _, _ = example
    paths = demo_photos()
    for count in (1, 3, len(paths)):
        seen = vitreg.look(vit, [str(path) for path in paths[:count]])
        assert seen.beside == min(JUDGED - count, len(paths) - count)  # none of them twice
        assert seen.names == [str(path) for path in paths[:count]]
        assert f"Judged from {count} photo" in str(seen)
    picture = Image.new("RGB", (90, 70), (200, 30, 30))
    assert vitreg.look(vit, picture).beside == len(paths)


def test_more_photos_than_fit_are_left_out(example) -> None:
    vit, _, pixels = example
    seen = vitreg.look(vit, pixels)
    assert len(seen.names) == SHOWN
    assert seen.beside == 0


def test_tensors_of_another_size_are_judged_alone() -> None:
    vit = vitreg.load("timm:test_vit", random_weights=True)
    high, wide = vit.image_size
    assert vitreg.look(vit, torch.randn(1, 3, high, wide)).beside == len(demo_photos())
    assert vitreg.look(replace(vit, preprocess=None), torch.randn(1, 3, high, wide)).beside == 0
    wider = vitreg.load("timm:test_vit", random_weights=True, size=(high, 2 * wide))
    assert (
        vitreg.look(replace(wider, preprocess=vit.preprocess), torch.randn(1, 3, high, 2 * wide)).beside == 0
    )


def test_an_unreadable_photo_is_named(example, tmp_path: Path) -> None:
    vit, _, _ = example
    (tmp_path / "broken.jpg").write_bytes(b"no photo")
    with pytest.raises(ImageError, match="could be read"):
        vitreg.look(vit, tmp_path / "broken.jpg")
    seen = vitreg.look(vit, [str(tmp_path / "broken.jpg"), str(demo_photos()[0])])
    assert [failed["path"] for failed in seen.failed] == [str(tmp_path / "broken.jpg")]
    assert "broken.jpg could not be read" in seen.full()


def test_what_is_no_token_is_refused(example) -> None:
    vit, _, pixels = example
    for query in ("corner", (99, 0), (0, -1), "register 7"):
        with pytest.raises(ValueError, match=r"expected|outside|no token"):
            vitreg.look(vit, pixels[:1], queries=[query])
    seen = vitreg.look(vit, pixels[:1])
    with pytest.raises(ValueError, match="no token was asked for"):
        seen.attention()
    with pytest.raises(ValueError, match="outside of the grid"):
        seen.similar((12, 0))
    with pytest.raises(ValueError, match="one where there is a fix"):
        vitreg.look([vit, vit], pixels[:1], fix=vitreg.ShiftAverage())


@pytest.mark.parametrize("here", [(4, 5), (14, 14), (37, 37)])
@pytest.mark.parametrize("there", [(4, 5), (16, 16), (7, 9)])
def test_the_same_place_in_another_grid(here: tuple[int, int], there: tuple[int, int]) -> None:
    for row in range(here[0]):
        for column in range(here[1]):
            r, c = same_place((row, column), here, there)
            assert 0 <= r < there[0]
            assert 0 <= c < there[1]
            assert r / there[0] <= (row + 0.5) / here[0] < (r + 1) / there[0]
            assert c / there[1] <= (column + 0.5) / here[1] < (c + 1) / there[1]


def test_the_outlier_is_the_largest_norm(seen) -> None:
    version = seen.versions[0]
    row, column = patch_of("outlier", 1, version)
    norms = version.photos[1].norms[version.diagnosis.detect_layer]
    assert norms[row, column] == norms.max()


def test_json_says_what_the_sentences_say(seen) -> None:
    data = seen.to_json()
    before, after = data["versions"]
    assert [photo["artifacts"] for photo in before["photos"]] == [
        int(seen.versions[0].outliers(i).sum()) for i in range(2)
    ]
    assert after["verdict"] == "no artifacts"
    assert after["photos"][0]["attention_on_former"] is not None
    assert len(repr(seen)) < 200
