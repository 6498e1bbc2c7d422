"""What a notebook shows of a result, and the report that each result writes."""

import re
import tarfile
from dataclasses import replace

import pytest
import torch
from catalog import CATALOG
from pages import Page
from phantoms import crops

import vitreg
from vitreg.data.images import demo_photos
from vitreg.evals.result import Metric, Result, compare, concluded
from vitreg.features.config import Config
from vitreg.fixes import Inpainting, PositionRepair, ShiftAverage, TestTimeRegisters, TokenSplitting
from vitreg.printing import Presented

HOSTILE = "<script>alert(1)<b>&\"'"


@pytest.fixture(scope="module")
def shown() -> dict[str, Presented]:
    vit = replace(CATALOG["timm vit"].backbone(), name=HOSTILE)
    photos = crops(vit, 48, 0)
    phantom = vitreg.plant(vit, photos, 1)
    found = vitreg.find_fix(replace(phantom.vit, name=HOSTILE), [photos], kind="registers")
    picture = found.report.figure
    result = concluded("knn", vit, HOSTILE, {HOSTILE: Metric.mean([0, 1])}, Config(), picture=picture)
    bare = replace(result, picture=None)
    registers = replace(CATALOG["timm dinov2 registers"].backbone(), name=HOSTILE)
    return {
        "diagnosis": found.report,
        "emergence": vitreg.Emergence([found.report, found.report]),
        "fix": found,
        "no fix": vitreg.find_fix(vit, [photos]),
        "verdict": found.verdict,
        "result": result,
        "result without a picture": bare,
        "comparison": compare(result, replace(result, fix="registers")),
        "registers": vitreg.what_registers_learn(registers, [torch.randn(2, 3, *registers.image_size)]),
        "doctor": vitreg.doctor(vit),
    }


NAMES = (
    *(
        "diagnosis",
        "emergence",
        "fix",
        "no fix",
        "verdict",
        "result",
        "result without a picture",
        "comparison",
    ),
    *("registers", "doctor"),
)
WITHOUT_PICTURE = ("result without a picture", "doctor")
WITHOUT_REPORT = ("registers", "doctor")


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_shows_the_verdict_a_picture_and_a_table(shown, name):
    result = shown[name]
    html = result._repr_html_()
    page = Page(html)
    verdict = result.summary().verdict
    assert (verdict[0].upper() + verdict[1:]).split("<")[0] in page.text
    assert bool(page.named("img")) == (name not in WITHOUT_PICTURE)
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.named("img"))
    assert len(page.named("td")) == sum(map(len, result.summary().rows))
    assert "alert(1)" in page.text
    assert "<script" not in html
    assert not re.search(r"(?:src|href)=\"(?!data:)", html)
    coloured = re.findall(r"(?<![\w-])(?:color|background)\s*:\s*([^;\"]+)", html)
    assert set(coloured) <= {"#fff"}, "the notebook's own colours; pictures stand on white"


BY_DAY = ("fix", "result")


@pytest.mark.parametrize(
    "name", [x if x in BY_DAY else pytest.param(x, marks=pytest.mark.nightly) for x in NAMES]
)
def test_every_result_that_has_a_report_writes_it(shown, name, tmp_path):
    path = tmp_path / "r.html"
    if name in WITHOUT_REPORT:
        with pytest.raises(TypeError, match="reports are of a Diagnosis"):
            shown[name].to_html(path)
        assert not path.exists()
        return
    assert shown[name].to_html(path) == path
    page = Page(path.read_text(encoding="utf-8"))
    assert "alert(1)" in page.text


def broken(*args: object, **more: object) -> None:
    raise RuntimeError("the <fonts> are gone")


FIGURES = {
    "diagnosis": ("vitreg.diagnosis.figures.norm_histograms", "vitreg.diagnosis.figures.photo_strip"),
    "emergence": ("vitreg.diagnosis.figures.emergence",),
    "fix": ("vitreg.verification.figure.versions_figure", "vitreg.diagnosis.figures.layer_curves"),
    "result": (),
    "comparison": (),
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_picture_that_fails_leaves_the_report_and_a_line(shown, name, tmp_path, monkeypatch):
    for figure in FIGURES[name]:
        monkeypatch.setattr(figure, broken)
    result = shown[name]
    if isinstance(result, Result):
        result = replace(result, picture=broken)
    elif name == "comparison":
        result = compare(result.before, replace(result.after, picture=broken))
    page = Page(result.to_html(tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "This picture could not be drawn (RuntimeError: the <fonts> are gone)." in page.text
    assert "alert(1)" in page.text
    if name != "diagnosis":  # whose main figure is another one
        assert "could not be drawn" in Page(result._repr_html_()).text


# -- what is no result ----------------------------------------------------------------------------------


def test_photos_have_a_length_and_a_short_repr(tmp_path):
    photos = vitreg.read_images(demo_photos(), lambda photo: torch.zeros(3, 8, 8), batch_size=2)
    assert (len(photos), len(photos.first(3)), bool(photos)) == (7, 3, True)
    assert repr(photos) == "<Images: 7 photos, in batches of 2>"
    assert len(list(photos)) == 4
    (tmp_path / "a.jpg").write_bytes(b"junk")
    mixed = vitreg.read_images([*demo_photos(), tmp_path / "a.jpg"], lambda photo: torch.zeros(3, 8, 8))
    assert len(mixed) == 8
    list(mixed)
    assert (len(mixed), repr(mixed)) == (7, "<Images: 7 photos, 1 unreadable, in batches of 32>")


def test_shards_have_no_length_until_they_are_read(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for path in demo_photos()[:2]:
            tar.add(path, path.name)
    photos = vitreg.read_images(tmp_path / "a.tar", lambda photo: torch.zeros(3, 8, 8), workers=0)
    with pytest.raises(TypeError, match="only reading can count"):
        len(photos)
    assert bool(photos)
    assert "photos of .tar shards" in repr(photos)
    assert sum(len(batch.pixels) for batch in photos) == 2


def test_a_backbone_says_what_it_is():
    vit = CATALOG["timm vit"].backbone()
    assert re.fullmatch(r"<Backbone: .*: \d+ blocks, width \d+, \d+ heads, images of .* pixels>", repr(vit))
    assert "phantom" in repr(vitreg.plant(vit, crops(vit, 24, 0), 1).vit)


def fixes() -> list[vitreg.Fix]:
    vit = CATALOG["timm vit"].backbone()
    photos = crops(vit, 48, 0)
    phantom = vitreg.plant(vit, photos, 1)
    found = vitreg.find_fix(phantom.vit, [photos], kind="registers")
    splitting = TokenSplitting.calibrate(phantom.vit, [photos], found.fix.neurons)
    filled = Inpainting.calibrate(phantom.vit, [photos], found.report, directions=1)
    positions = PositionRepair({}, (4, 4), (3,), torch.zeros(1, 8), torch.zeros(1, 8))
    many = TestTimeRegisters({0: list(range(40))}, registers=2)
    return [found.fix, splitting, filled, many, ShiftAverage(), positions]


def test_every_kind_of_fix_has_a_short_repr():
    for fix in fixes():
        shown = repr(fix)
        assert shown.startswith(f"{type(fix).__name__}(")
        assert len(shown) < 200
        assert "\n" not in shown
    assert repr(TestTimeRegisters({3: [5, 7]}, registers=2)) == "TestTimeRegisters({3: [5, 7]}, registers=2)"


def test_a_fix_of_ones_own_has_one_too():
    class Mine(ShiftAverage):
        pass

    assert repr(Mine()) == "Mine()"


# -- what it costs --------------------------------------------------------------------------------------


def test_what_a_search_costs_is_said_before_and_about_right():
    vit = CATALOG["timm vit"].backbone()
    photos = crops(vit, 200, 0)
    phantom = vitreg.plant(vit, photos, 1).vit
    seen: list[int] = []
    block = phantom.anatomy.block_modules(phantom.model)[0]
    block.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    told: list[str] = []
    vitreg.find_fix(phantom, list(photos.split(50)), progress=told.append)
    said = int(
        re.match(r"about ([\d,]+) forward passes, \d+ for each of 200 photos", told[0])[1].replace(",", "")
    )
    assert said / 2 <= sum(seen) <= 2 * said


def test_progress_is_told_in_python_as_on_the_command_line(capsys):
    vit = CATALOG["timm vit"].backbone()
    photos = [crops(vit, 24, 0)]
    phantom = vitreg.plant(vit, photos, 1).vit
    fix = TestTimeRegisters({1: [3]})
    vitreg.verify(phantom, fix, photos, controls=False, progress=True)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        "1/3 diagnosing the model as it is",
        "2/3 diagnosing the model with the fix",
        "3/3 measuring both",
    ]
    vitreg.verify(phantom, fix, photos, controls=False)
    assert capsys.readouterr().err == ""
