"""The report in a browser: opened from disk, offline, and used by keyboard and by setting its inputs."""

import math
import re
from dataclasses import replace
from urllib.parse import quote

import matplotlib
import numpy as np
import pytest
from browser import Visit, chromium
from drawn_reports import ONSET, make_report, make_verdict

from vitreg.diagnosis.photo_figures import feature_pictures
from vitreg.diagnosis.result import Example
from vitreg.diagnosis.version_figures import _maps
from vitreg.plots.outlines import _edges
from vitreg.reports.report import write_comparison, write_report, write_verdict
from vitreg.reports.viewer import view

pytestmark = pytest.mark.slow

HOSTILE = "</script><script>window.hit = 1</script><img src=x onerror='window.hit=1'>\"'&.jpg"
NORMS, ATTENTION = ".stage[data-kind=norms]", ".stage[data-kind=attention]"


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    verdict = make_verdict()
    return {
        "report": write_report(verdict.before, folder / "report.html"),
        "verdict": write_verdict(verdict, folder / "verdict.html"),
        "none": write_report(make_report(artifacts=False), folder / "none.html"),
        "comparison": write_comparison([verdict.before, verdict.after], folder / "comparison.html"),
    }


@pytest.fixture
def opened(browser, pages):
    """Opens a page; when the test ends, checks that it asked for nothing and complained of nothing."""
    visits = []

    def open_page(name="report", address="", **options):
        path = pages[name] if isinstance(name, str) else name
        visits.append(Visit(browser, path, address, **options))
        return visits[-1]

    yield open_page
    for visit in visits:
        visit.close()


def caption(visit, stage, version=0):
    return visit.text(f"{stage} [data-version='{version}'] figcaption")


def counted(visit, version=0):
    """How many patches the page says are over the threshold."""
    return int(re.search(r"(\d+) of 16 patches outlined", caption(visit, NORMS, version))[1])


def over(report, norm, photo=0, layer=ONSET):
    return report.examples[photo].norms[layer] >= norm


def outlined(visit, pane):
    """The outline's edges, ((x, y), (x, y)) in units of patches."""
    path = visit.page.locator(f"{pane} .outline").get_attribute("d")
    found = set()
    for x, y, way in re.findall(r"M(\d+) (\d+)([hv])1", path):
        end = (int(x) + (way == "h"), int(y) + (way == "v"))
        found.add(((int(x), int(y)), end))
    return found


# -- norms -----------------------------------------------------------------------------------------


def test_opens_at_the_diagnosis_own_layer_and_threshold(opened):
    visit, report = opened(), make_report()
    assert counted(visit) == over(report, report.threshold).sum() == 2
    assert visit.text("#layer-value") == f"{report.detect_layer} (where outliers stand out most)"
    assert f"{report.threshold:.3g}" in visit.text("#threshold-value")
    assert "(12.5%)" in caption(visit, NORMS)
    edges = {tuple(map(tuple, edge)) for edge in _edges(over(report, report.threshold))}
    for pane in ("[data-kind=photo]", "[data-kind=norms]"):
        assert outlined(visit, f"{NORMS} {pane}") == edges


def test_the_threshold_by_keyboard(opened):
    visit, report = opened(), make_report()
    slider = visit.page.locator("#threshold")
    slider.focus()
    before = slider.evaluate("input => input.valueAsNumber")
    for key in ["Home", "ArrowRight", "ArrowRight"]:
        slider.press(key)
    low, step = (float(slider.get_attribute(name)) for name in ("min", "step"))
    assert slider.evaluate("input => input.valueAsNumber") == pytest.approx(low + 2 * step) != before
    assert counted(visit) == 16
    slider.press("End")
    assert counted(visit) == 0
    assert outlined(visit, f"{NORMS} [data-kind=photo]") == set()
    slider.press("ArrowLeft")
    norm = math.exp(slider.evaluate("input => input.valueAsNumber"))
    assert counted(visit) == over(report, norm).sum()


def test_the_threshold_anywhere_counts_as_numpy_does(opened):
    visit, report = opened(), make_report()
    norms = np.sort(report.examples[0].norms[ONSET].ravel())
    middles = np.sqrt(norms[1:] * norms[:-1])  # between two tokens each
    counts = set()
    for norm in middles:
        visit.set("#threshold", math.log(norm))
        set_to = math.exp(visit.page.locator("#threshold").evaluate("input => input.valueAsNumber"))
        assert counted(visit) == over(report, set_to).sum()
        counts.add(counted(visit))
    assert len(counts) > 5


def test_set_automatically(opened):
    visit, report = opened(), make_report()
    visit.set("#threshold", 0)
    assert counted(visit) == 16
    visit.page.get_by_role("button", name="Set automatically").press("Enter")
    assert counted(visit) == over(report, report.threshold).sum()
    assert "where two populations part" in visit.text("#automatic-note")


def test_a_layer_of_one_population_has_no_threshold_of_its_own(opened):
    visit, report = opened(), make_report()
    assert report.layers[0].threshold is None
    slider = visit.page.locator("#layer")
    slider.focus()
    slider.press("Home")
    assert visit.text("#layer-value") == "0"
    assert counted(visit) == 0
    assert visit.text("#threshold-value") == "none"
    assert "no second population of norms is an artifact: the diagnosis sets no threshold" in visit.text(
        "#automatic-note"
    )
    visit.set("#threshold", math.log(np.median(report.examples[0].norms[0])))
    set_to = math.exp(visit.page.locator("#threshold").evaluate("input => input.valueAsNumber"))
    assert counted(visit) == over(report, set_to, layer=0).sum() > 0


def test_thumb_line_and_axis_agree(opened):
    visit = opened()
    for value in (0.2, 0.5, 0.9):
        place = visit.page.evaluate(
            """value => {
              const box = (name) => document.querySelector(name).getBoundingClientRect();
              const input = document.querySelector("#threshold");
              input.value = Number(input.min) + value * (input.max - input.min);
              input.dispatchEvent(new Event("input"));
              const unit = (input.value - input.min) / (input.max - input.min);
              const [slider, mark, plot] = [box("#threshold"), box(".mark"), box(".histogram")];
              return [slider.x + 11 + unit * (slider.width - 22), mark.x + 1, plot.x + unit * plot.width];
            }""",
            value,
        )
        assert place == pytest.approx([place[0]] * 3, abs=0.6)


def test_another_photo(opened):
    visit, report = opened(), make_report()
    visit.page.get_by_role("radio").nth(0).focus()
    visit.page.keyboard.press("ArrowRight")
    assert visit.text(f"{NORMS} [data-kind=photo] figcaption") == report.examples[1].name
    norm = float(np.sort(report.examples[1].norms[ONSET].ravel())[7:9].mean())
    visit.set("#threshold", math.log(norm))
    set_to = math.exp(visit.page.locator("#threshold").evaluate("input => input.valueAsNumber"))
    assert counted(visit) == over(report, set_to, photo=1).sum()
    shown = visit.page.locator(f"{NORMS} [data-kind=photo] img").get_attribute("src")
    assert shown == visit.page.locator(".thumbs img").nth(1).get_attribute("src")


def test_the_histogram_holds_every_token(opened):
    """Bars are as high as the logarithm of their counts; taken back, they add up to all patches."""
    visit = opened()
    paths = [visit.page.locator(f".histogram .{kind}").get_attribute("d") for kind in ("normal", "beyond")]
    totals = []
    for path in paths:
        bars = re.findall(r"M([\d.]+) 100V([-\d.]+)H([\d.]+)", path)
        totals.append(sum(0.6 * (16 * 1.3 / 0.6) ** ((100 - float(top)) / 100) for _, top, _ in bars))
    assert totals == pytest.approx([14, 2])


# -- attention, and before and after ---------------------------------------------------------------


def test_attention_by_block(opened):
    visit, report = opened(), make_report()
    mask = over(report, report.threshold)
    for block in (3, 1):
        visit.set("#block", block)
        share = float(report.examples[0].attention[block][mask].sum())
        found = re.search(r"([\d.]+)% on outlined patches", caption(visit, ATTENTION))
        assert float(found[1]) / 100 == pytest.approx(share, rel=6e-3)
    assert visit.text("#block-value") == "1"
    assert f"outliers after block {ONSET}: 2. Their even share would be 12.5%." in visit.text("#even")


def test_attention_keeps_the_outliers_until_the_threshold_is_moved(opened):
    visit, report = opened(), make_report()
    visit.set("#layer", 0)
    edges = {tuple(map(tuple, edge)) for edge in _edges(over(report, report.threshold))}
    assert outlined(visit, f"{ATTENTION} [data-kind=attention]") == edges
    visit.set("#threshold", math.log(np.median(report.examples[0].norms[0])))
    shown = outlined(visit, f"{NORMS} [data-kind=norms]")
    assert outlined(visit, f"{ATTENTION} [data-kind=attention]") == shown != edges
    assert "patches over the threshold after block 0" in visit.text("#even")


def test_a_model_without_artifacts_has_nothing_outlined(opened):
    visit = opened("none")
    assert counted(visit) == 0
    assert outlined(visit, f"{ATTENTION} [data-kind=attention]") == set()
    assert visit.text("#even").endswith("none here.")
    assert caption(visit, ATTENTION) == "Attention 0% on outlined patches"


def test_before_and_after(opened):
    visit, verdict = opened("verdict"), make_verdict()
    assert [counted(visit, i) for i in (0, 1)] == [2, 0]
    assert caption(visit, NORMS, 0).startswith("As it is")
    assert caption(visit, NORMS, 1).startswith("With the fix")
    mask = over(verdict.before, verdict.before.threshold)
    for version, report in enumerate((verdict.before, verdict.after)):
        share = float(report.examples[0].attention[-1][mask].sum())  # on the former outliers
        found = re.search(r"([\d.]+)% on outlined patches", caption(visit, ATTENTION, version))
        assert float(found[1]) / 100 == pytest.approx(share, rel=6e-3)
    assert visit.page.locator(".histogram").count() == 2
    assert "The fix helps" in visit.text("h1")


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("kind", ["norms", "attention"])
def test_colours_are_those_of_the_figures_and_the_same_before_and_after(opened, kind, version):
    visit, verdict = opened("verdict"), make_verdict()
    reports = [verdict.before, verdict.after]
    shown = next(x for x in _maps(reports, 3) if x.quantity == kind)
    values = shown.values(reports[version].examples[0])
    expected = matplotlib.colormaps[shown.colours](shown.scale(values), bytes=True)[..., :3]
    canvas = visit.page.locator(f".stage [data-kind={kind}][data-version='{version}'] canvas")
    drawn = canvas.evaluate("c => Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data)")
    drawn = np.array(drawn).reshape(4, 4, 4)[..., :3]
    assert np.abs(drawn.astype(int) - expected.astype(int)).max() <= 4  # a step of the colour table
    assert "up to" in canvas.get_attribute("aria-label")


@pytest.mark.parametrize("photo", [0, 2])
@pytest.mark.parametrize("version", [0, 1])
def test_features_have_the_colours_of_the_figures(opened, version, photo):
    visit, verdict = opened("verdict", f"#photo={photo}"), make_verdict()
    expected = feature_pictures([verdict.before, verdict.after])[version][photo]
    canvas = visit.page.locator(f".stage [data-kind=features][data-version='{version}'] canvas")
    drawn = canvas.evaluate("c => Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data)")
    assert (np.array(drawn).reshape(4, 4, 4)[..., :3] == expected).all()
    assert "principal components" in canvas.get_attribute("aria-label")
    assert outlined(visit, ".stage[data-kind=features] [data-kind=photo]") == outlined(
        visit, f"{ATTENTION} [data-kind=photo]"
    )


def test_the_patch_under_the_pointer_is_told_in_every_picture(opened):
    visit, report = opened(), make_report()
    visit.page.locator(f"{NORMS} [data-kind=norms] .frame").hover(position={"x": 3, "y": 3})
    assert visit.text(f"{NORMS} [data-kind=photo] span.pointed") == "row 0, column 0"
    told = float(visit.text(f"{NORMS} [data-kind=norms] span.pointed"))
    assert told == pytest.approx(report.examples[0].norms[ONSET][0, 0], rel=6e-3)
    visit.page.mouse.move(0, 0)
    assert visit.page.locator(".pointed").count() == 0


# -- the address -----------------------------------------------------------------------------------


def test_the_address_holds_what_is_seen(opened):
    first = opened("verdict")
    first.page.get_by_role("radio").nth(2).check()
    first.set("#layer", 3)
    first.set("#block", 1)
    first.set("#threshold", 3)
    first.page.wait_for_url(re.compile("threshold="))
    address = first.page.evaluate("location.hash")
    again = opened("verdict", address)
    for selector in ("#layer-value", "#block-value", "#threshold-value", NORMS, ATTENTION):
        assert again.text(selector) == first.text(selector)
    assert again.page.get_by_role("radio").nth(2).is_checked()


@pytest.mark.parametrize(
    "address", ["#photo=99&layer=-1&block=1e9&threshold=-3", "#threshold=Infinity&layer=x", "#%%%", "#layer="]
)
def test_an_address_that_makes_no_sense_is_ignored(opened, address):
    visit, report = opened(address=address), make_report()
    assert counted(visit) == 2
    assert visit.text("#layer-value").startswith(str(report.detect_layer))


# -- whoever reads it, wherever --------------------------------------------------------------------


def test_hostile_names_do_nothing(opened, tmp_path):
    verdict = make_verdict(name=f"models/{HOSTILE}")
    examples = [replace(verdict.before.examples[0], name=HOSTILE)]
    before, after = (replace(x, examples=examples) for x in (verdict.before, verdict.after))
    path = write_verdict(replace(verdict, before=before, after=after), tmp_path / "hostile.html")
    visit = opened(path, f"#photo={quote(HOSTILE)}")
    assert visit.page.evaluate("window.hit") is None
    assert visit.text(f"{NORMS} [data-kind=photo] figcaption") == HOSTILE.rpartition("/")[2]
    assert HOSTILE in visit.text("header")


def test_the_policy_stops_every_other_script(browser, pages):
    import playwright.sync_api

    context = browser.new_context()
    page = context.new_page()
    page.goto(pages["report"].as_uri())
    with pytest.raises(playwright.sync_api.Error, match="Content Security Policy"):
        page.add_script_tag(content="window.hit = 1")
    assert page.evaluate("window.hit") is None
    context.close()


@pytest.mark.parametrize("name", ["report", "verdict", "none"])
def test_without_scripts_it_reads_well(opened, name):
    visit = opened(name, java_script_enabled=False)
    assert visit.page.locator("#view").is_hidden()
    assert visit.page.locator(".still img").count() >= 1
    assert visit.page.locator(".still img").first.is_visible()
    assert "Every layer" in visit.text("main") or "every layer" in visit.text("main")


def test_on_paper_the_still_pictures_stand_for_the_view(opened):
    visit = opened("verdict")
    assert visit.page.locator("#view").is_visible()
    assert visit.page.locator(".still").is_hidden()
    visit.page.emulate_media(media="print")
    assert visit.page.locator("#view").is_hidden()
    assert visit.page.locator(".still img").first.is_visible()
    pdf = visit.page.pdf()
    assert pdf.startswith(b"%PDF")
    assert len(pdf) > 50_000


@pytest.mark.parametrize("name", ["report", "verdict", "none", "comparison"])
def test_no_page_is_wider_than_a_phone(opened, name):
    visit = opened(name, viewport={"width": 375, "height": 667})
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= 375


@pytest.mark.parametrize("name", ["report", "verdict"])
def test_every_input_has_a_name(opened, name):
    visit = opened(name)
    for label in ("After block", "Inside block", "Threshold"):
        assert visit.page.get_by_role("slider", name=label).count() == 1
    assert visit.page.get_by_role("radio", name="image-1").count() == 1
    assert visit.page.get_by_role("group", name="Photo").count() == 1
    assert visit.page.locator("#threshold").get_attribute("aria-valuetext") == visit.text("#threshold-value")


def test_a_phantom_is_called_one_in_each_view(opened, tmp_path):
    path = write_verdict(make_verdict(planted=True), tmp_path / "phantom.html")
    visit = opened(path)
    for stage in (NORMS, ATTENTION):
        assert "A phantom: its artifacts were planted." in visit.text(stage)


def test_an_oblong_photo_keeps_its_shape(opened, tmp_path):
    visit = opened(write_report(make_report(wide=True), tmp_path / "wide.html"))
    for element in ("img", "canvas"):
        box = visit.page.locator(f"{NORMS} .frame {element}").bounding_box()
        assert box["width"] / box["height"] == pytest.approx(2, rel=0.02)


# -- what is written -------------------------------------------------------------------------------


@pytest.mark.nightly
def test_twelve_photos_stay_far_below_the_limit(tmp_path):
    random = np.random.default_rng(0)
    before, after = (make_report(artifacts, depth=24) for artifacts in (True, False))
    shape, grid = (24, 14, 14), (14, 14)
    examples = [
        Example(
            f"{i}.jpg",
            random.integers(0, 256, (224, 224, 3), dtype=np.uint8),  # noise is the hardest to compress
            random.uniform(1, 600, shape).astype(np.float32),
            random.uniform(0, 1, shape).astype(np.float32),
            random.normal(size=(*grid, 384)).astype(np.float32),
        )
        for i in range(12)
    ]
    before, after = (replace(x, examples=examples, grid=grid) for x in (before, after))
    verdict = replace(make_verdict(), before=before, after=after)
    assert write_verdict(verdict, tmp_path / "verdict.html").stat().st_size < 15e6
    assert write_report(before, tmp_path / "report.html").stat().st_size < 15e6


def test_versions_of_other_photos_are_refused():
    one, other = make_report(), make_report(examples=2)
    with pytest.raises(ValueError, match="expected diagnoses of the same photos"):
        view([("as it is", one), ("with the fix", other)])
