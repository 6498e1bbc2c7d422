"""The explorer without its page: what is shown is what the library says, for each user their own."""

import json
import threading
from pathlib import Path
from urllib.parse import parse_qs

import numpy as np
import PIL.Image
import pytest
import torch
from explorers import small_explorer
from phantoms import save_crops

import vitreg
from vitreg import ImageError
from vitreg.app import explorer_of, shown
from vitreg.app.explorer import AS_IT_IS, Explorer
from vitreg.app.view import MEAN, SHIFT, View
from vitreg.data.images import demo_photos
from vitreg.diagnosis.one_image import inspect_image
from vitreg.models.head import find_readout
from vitreg.models.probe import evaluating

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def explorer(tmp_path_factory: pytest.TempPathFactory) -> Explorer:
    return small_explorer(tmp_path_factory.mktemp("explorer"))


def same(explorer: Explorer, **changes: str) -> View:
    return View.of(changes, explorer)


# -- looks -----------------------------------------------------------------------------------------


def test_a_look_with_a_fix_is_one_while_it_is_applied_and_leaves_no_trace(explorer: Explorer) -> None:
    photo = explorer.gallery[0]
    assert explorer.fixed is not None
    before = {k: v.clone() for k, v in explorer.vit.model.state_dict().items()}
    with explorer.fixed.fix.applied_to(explorer.vit):
        expected = inspect_image(explorer.vit, photo.pixels).norms
    assert np.array_equal(explorer.look(photo, explorer.fixed).norms, expected)
    assert np.array_equal(explorer.look(photo).norms, inspect_image(explorer.vit, photo.pixels).norms)
    assert not np.array_equal(explorer.look(photo).norms, expected)
    assert vitreg.applied(explorer.vit.model) == []
    assert all(torch.equal(before[k], v) for k, v in explorer.vit.model.state_dict().items())


def test_a_second_look_is_not_computed(explorer: Explorer, monkeypatch: pytest.MonkeyPatch) -> None:
    photo = explorer.gallery[1]
    first = explorer.look(photo)
    monkeypatch.setattr(type(explorer.vit), "__call__", None)
    assert explorer.look(photo) is first


def test_what_is_kept_has_a_limit(explorer: Explorer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitreg.app.explorer.KEPT", 3)
    for photo in explorer.gallery[:6]:
        explorer.look(photo)
    assert len(explorer._kept) == 3


def test_the_switch_does_what_it_says(explorer: Explorer) -> None:
    photo = next(p for p in explorer.gallery if explorer.outliers(p).any())
    layer, chosen = explorer.report.detect_layer, [(n.layer, n.index) for n in explorer.chosen]
    outliers = explorer.outliers(photo)
    norms = {
        name: explorer.look(photo, version).norms[layer]
        for name, version in {
            "none": explorer.switched([], 1),
            "all": explorer.switched(chosen, 1),
            "zeroed": explorer.switched(chosen, 0),
            "shifted": explorer.shifted(chosen, (3, 4)),
        }.items()
    }
    assert np.array_equal(norms["none"], explorer.look(photo).norms[layer])
    assert norms["all"].max() < explorer.report.threshold
    assert norms["zeroed"].max() < explorer.report.threshold
    assert not np.array_equal(norms["all"], norms["zeroed"])
    assert norms["shifted"].argmax() == 3 * 5 + 4
    assert norms["none"][outliers].min() >= explorer.report.threshold


def test_only_candidates_can_be_switched(explorer: Explorer) -> None:
    assert explorer.switched([(0, 0), (99, 99)], 1) is AS_IT_IS
    assert explorer.shifted([(99, 99)], (0, 0)) is AS_IT_IS


def test_many_threads_each_get_their_own(explorer: Explorer, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong: list[str] = []
    chosen = [(n.layer, n.index) for n in explorer.chosen]
    versions = [AS_IT_IS, explorer.switched(chosen, 1), explorer.switched(chosen, 3)]
    expected = {}
    for version in versions:
        for photo in explorer.gallery[:4]:
            with version.fix.applied_to(explorer.vit) if version.fix else torch.no_grad():
                expected[version.key, photo.key] = inspect_image(explorer.vit, photo.pixels).norms
    monkeypatch.setattr("vitreg.app.explorer.KEPT", 1)  # so that nearly every look is computed

    def user(number: int) -> None:
        for i in range(12):
            version, photo = versions[(number + i) % 3], explorer.gallery[(number * i) % 4]
            if not np.array_equal(explorer.look(photo, version).norms, expected[version.key, photo.key]):
                wrong.append(f"{number} {i}")

    users = [threading.Thread(target=user, args=(n,)) for n in range(6)]
    for one in users:
        one.start()
    for one in users:
        one.join()
    assert wrong == []


# -- the fix ---------------------------------------------------------------------------------------


def test_before_it_is_prepared_there_is_no_fix_and_a_reason(tmp_path: Path) -> None:
    explorer = small_explorer(tmp_path, prepared=False)
    assert explorer.fixed is None
    assert explorer.candidates == ()
    assert "will appear" in explorer.why_no_fix
    found = shown.attention(explorer, explorer.gallery[0], View.first(explorer))
    assert list(found.data["attention"]) == ["before"]
    assert "will appear" in found.text
    explorer.prepare()
    assert explorer.fixed is not None
    assert explorer.why_no_fix == ""


def test_a_model_without_artifacts_is_told_so(tmp_path: Path) -> None:
    vit, scenes = vitreg.example(8)
    explorer = Explorer(vit, vitreg.read_images([scene.photo for scene in scenes], vit))
    explorer.prepare()
    assert explorer.fixed is None
    assert "nothing to fix" in explorer.why_no_fix
    photo, view = explorer.gallery[0], View.first(explorer)
    assert "no outliers" in shown.attention(explorer, photo, view).text
    assert "no second population" in shown.norms(explorer, photo, view).text
    assert "nothing to fix" in shown.comparison(explorer, None).text
    assert shown.neurons(explorer, photo, view).pictures["activation"] is None


def test_what_goes_wrong_with_the_fix_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    explorer = small_explorer(tmp_path, prepared=False)

    def fail(*args: object) -> None:
        raise vitreg.FixError("the neurons ran away")

    monkeypatch.setattr("vitreg.app.explorer.build", fail)
    explorer.prepare()
    assert explorer.ready
    assert explorer.why_no_fix == "No fix could be made: the neurons ran away"


def test_a_saved_fix_is_used(tmp_path: Path, explorer: Explorer) -> None:
    assert explorer.fixed is not None
    saved = explorer.fixed.fix.save(tmp_path / "fix", vit=explorer.vit)
    again = explorer_of(explorer.vit, save_crops(tmp_path / "photos", 40), saved)
    assert again.fixed is not None
    assert again.fixed.fix.neurons.by_layer == explorer.fixed.fix.neurons.by_layer
    again.prepare()  # finds neurons to switch, and leaves the fix as it is
    assert again.choice == "the fix that was given"
    assert {(n.layer, n.index) for n in again.chosen} <= {(n.layer, n.index) for n in again.candidates}
    with pytest.raises(vitreg.FixError, match="made for"):
        explorer_of(vitreg.example(1)[0], fix=saved)


# -- photos ----------------------------------------------------------------------------------------


def test_an_added_photo_is_shown_as_the_model_sees_it(explorer: Explorer) -> None:
    photo = explorer.add(demo_photos()[0])
    assert explorer.photo(photo.key) is photo
    assert photo.image.shape == (32, 40, 3)
    assert not View(photo=photo.key).shareable


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"GIF89a nonsense", "not an image|cannot be shown"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        (b"\xff\xd8\xff\xe0" + b"\0" * 100, "cannot be shown"),
        (b"%PDF-1.7", "not an image"),
    ],
)
def test_what_is_no_photo_is_refused_with_the_reason(
    explorer: Explorer, tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "x.jpg").write_bytes(content)
    before = len(explorer._uploads)
    with pytest.raises(ImageError, match=f"x.jpg cannot be shown: .*({message})|{message}"):
        explorer.add(tmp_path / "x.jpg")
    assert len(explorer._uploads) == before


def test_too_many_pixels_are_refused_before_they_are_decoded(explorer: Explorer, tmp_path: Path) -> None:
    PIL.Image.new("1", (12_000, 12_000)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 100_000
    with pytest.raises(ImageError, match="it has 12000 x 12000 pixels, but at most 50,000,000 are taken"):
        explorer.add(tmp_path / "bomb.png")


def test_uploads_have_a_limit(explorer: Explorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitreg.app.explorer.UPLOADS", 2)
    keys = []
    for shade in (10, 60, 110, 160):
        PIL.Image.new("RGB", (40, 32), (shade, 0, 0)).save(tmp_path / f"{shade}.png")
        keys.append(explorer.add(tmp_path / f"{shade}.png").key)
    assert [explorer.photo(key) is not None for key in keys] == [False, False, True, True]


# -- views and addresses ---------------------------------------------------------------------------


def test_an_address_leads_back_to_the_view(explorer: Explorer) -> None:
    name = "{}:{}".format(*next((n.layer, n.index) for n in explorer.chosen))
    for said in (
        {"tab": "norms", "photo": "3", "layer": "1", "threshold": "12.5"},
        {"tab": "attention", "source": "patch", "row": "2", "column": "4", "block": "0", "head": "1"},
        {"tab": "neurons", "neurons": name, "registers": "4", "does": SHIFT, "to_row": "1", "watched": name},
        {"tab": "neurons", "neurons": ""},
        {"tab": "objects", "photo": "1"},
        {"tab": "features", "like_row": "0", "like_column": "4"},
    ):
        view = View.of(said, explorer)
        address = view.address()
        parsed = {k: v[0] for k, v in parse_qs(address[1:], keep_blank_values=True).items()}
        assert View.of(parsed, explorer) == view
        assert said.items() <= parsed.items()


@pytest.mark.parametrize(
    "value", ["-1", "1e9", "99999999999999999999", "x", "", "0x1", "٣", "nan", "None", "[]"]
)
def test_an_address_may_say_anything(explorer: Explorer, value: str) -> None:
    names = [name for name in vars(View()) if name != "neurons"]
    view = View.of(dict.fromkeys(names, value), explorer)
    first = View.first(explorer)
    assert view.photo == first.photo
    assert view.head == MEAN
    assert view.source == first.source
    assert 0 <= view.layer < explorer.vit.anatomy.depth
    assert 0 <= view.row < 4
    assert 0 <= view.column < 5
    assert view.threshold is None or view.threshold > 0


def test_what_an_odd_address_asks_for_can_be_drawn(explorer: Explorer) -> None:
    said = {
        "layer": "999",
        "threshold": "1e-300",
        "source": "patch",
        "row": "77",
        "head": "2",
        "registers": "99",
    }
    view = View.of(said | {"does": SHIFT, "neurons": "9:9", "watched": "1:99999999"}, explorer)
    assert (view.layer, view.row, view.registers, view.neurons) == (2, 3, 8, ())
    for draw in (shown.norms, shown.attention, shown.features, shown.neurons, shown.objects):
        assert draw(explorer, explorer.gallery[0], view).text


# -- what is shown ---------------------------------------------------------------------------------


def test_features_are_compared_with_the_chosen_patch(explorer: Explorer) -> None:
    photo = explorer.gallery[1]
    found = shown.features(explorer, photo, same(explorer, tab="features", like_row="2", like_column="3"))
    with evaluating(explorer.vit.model), vitreg.trace(explorer.vit, residuals=True) as t:
        explorer.vit(photo.pixels)
    norm = find_readout(explorer.vit).norm
    patches = norm(t.residuals[-1, 0, t.layout.patch_slice])
    expected = torch.cosine_similarity(patches, patches[2 * 5 + 3], dim=-1).reshape(4, 5)
    assert np.allclose(found.data["cosines"]["before"], expected.detach(), atol=1e-5)
    assert set(found.data["colours"]) == set(shown.versions(explorer))
    assert found.data["colours"]["before"].shape == (4, 5, 3)
    assert "row 2, column 3" in found.text


def test_the_count_is_that_of_the_norms(explorer: Explorer) -> None:
    photo = next(p for p in explorer.gallery if explorer.outliers(p).any())
    layer = explorer.report.detect_layer
    norms = explorer.look(photo).norms[layer]
    automatic = shown.norms(explorer, photo, same(explorer, layer=str(layer)))
    assert automatic.data["over"].sum() == (norms >= explorer.report.threshold).sum() > 0
    median = float(np.median(norms))
    half = shown.norms(explorer, photo, same(explorer, layer=str(layer), threshold=str(median)))
    assert half.text.startswith(f"**{(norms >= median).sum()} of 20 patches")
    data = json.loads(half.json())
    assert np.allclose(data["norms"], norms)
    assert data["view"]["threshold"] == median


def test_attention_on_outliers_is_that_of_the_maps(explorer: Explorer) -> None:
    photo = next(p for p in explorer.gallery if explorer.outliers(p).any())
    found = shown.attention(explorer, photo, View.first(explorer))
    assert list(found.data["attention"]) == ["before", "after"]
    for name, version in shown.versions(explorer).items():
        expected = explorer.attention(photo, "CLS", version).maps[-1].mean(0)
        assert np.allclose(found.data["attention"][name], expected)
        share = expected[explorer.outliers(photo)].sum()
        assert found.data["on_outliers"][name] == pytest.approx(share)
    json.loads(found.json())


def test_each_token_looks_for_itself(explorer: Explorer) -> None:
    photo = explorer.gallery[0]
    for query in ("CLS", (0, 1), (2, 3)):
        expected = inspect_image(explorer.vit, photo.pixels, query=query).attention
        assert np.array_equal(explorer.attention(photo, query).maps, expected.maps)


def test_a_photo_without_outliers_is_told_so(explorer: Explorer) -> None:
    without = [p for p in explorer.gallery if not explorer.outliers(p).any()]
    for photo in explorer.gallery:
        text = shown.attention(explorer, photo, View.first(explorer)).text
        assert ("this photo has no outliers" in text) == (photo in without)
    assert without


def test_hostile_names_are_harmless(explorer: Explorer) -> None:
    assert shown.plain("<img src=x onerror=y>|*a*") == "&lt;img src=x onerror=y&gt;&#124;&#42;a&#42;"


def test_the_verdict_is_the_librarys_and_measured_once(
    explorer: Explorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages: list[str] = []
    found = shown.comparison(explorer, stages.append)
    assert stages
    verdict = explorer.verdict()
    assert verdict is not None
    assert verdict.verdict in found.text
    assert len(found.data["table"]["data"]) == len(verdict.measures)
    monkeypatch.setattr("vitreg.app.explorer.verify", None)
    assert explorer.verdict() is verdict
