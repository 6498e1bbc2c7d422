"""The HTML report: complete, self-contained, and safe whatever the files are called."""

import io
import json
from base64 import b64decode, b64encode
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from drawn_reports import ONSET, make_report, make_verdict
from pages import Page

import vitreg.reports.report
from vitreg.diagnosis.emergence import Emergence
from vitreg.diagnosis.wording import words_of_sink
from vitreg.errors import OutputError
from vitreg.reports.html import ENVIRONMENT, photo_source
from vitreg.reports.report import write, write_comparison, write_cure, write_report, write_verdict
from vitreg.search.fix_search import FixSearch

HOSTILE = "<script>alert(1)</script>\"'&\u202e.jpg"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The report on a model with artifacts, hostile names and two unreadable files."""
    report = make_report()
    examples = [replace(report.examples[0], name=HOSTILE), *report.examples[1:]]
    failed = [{"path": HOSTILE, "reason": "<b>broken</b>"}, {"path": "b.png", "reason": "the file is empty"}]
    report = replace(report, model=f"models/{HOSTILE}", examples=examples, failed_images=failed)
    path = write_report(report, tmp_path_factory.mktemp("report") / "report.html")
    return report, path, Page(path.read_text(encoding="utf-8"))


def test_loads_nothing_from_outside(written):
    _, path, page = written
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "base", "form")
        assert not [name for name in attributes if name.startswith("on") or name == "href"]
        if "src" in attributes:
            assert tag == "img"
            assert attributes["src"].startswith(("data:image/png;base64,", "data:image/jpeg;base64,"))
    source = path.read_text(encoding="utf-8")
    assert "://" not in source
    assert "url(" not in source
    assert "@import" not in source
    (policy,) = [x["content"] for x in page.named("meta") if x.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy
    data, script = page.named("script")
    assert data == {"type": "application/json", "id": "view-data"}
    assert script == {}
    ours = Path(vitreg.reports.report.__file__).with_name("viewer.js").read_bytes()
    assert f"script-src 'sha256-{b64encode(sha256(ours).digest()).decode()}'" in policy


def test_hostile_names_are_text(written):
    _, path, page = written
    assert path.read_text(encoding="utf-8").count("<script") == 2  # the data's and ours
    assert "<b>broken" not in path.read_text(encoding="utf-8")
    shown = "<script>alert(1)</script>\"'&\\u202e.jpg"
    assert page.text.count(shown) >= 3  # model, photo, failed image
    assert sum(x["alt"].startswith(shown) for x in page.named("img")) == 1


def test_shows_every_finding(written):
    report, _, page = written
    assert report.reason[1:] in page.text
    assert f"{ONSET} (the first that shows them)" in page.text
    assert f"{report.outliers_per_image:.2f}" in page.text
    assert f"{ONSET} (onset, detect)" in page.text
    assert words_of_sink(report.sink) in page.text
    assert f"torch {report.versions['torch']}" in page.text
    rows = [tag for tag, _ in page.tags].count("tr")
    assert rows == 1 + len(report.layers) + 1 + len(report.failed_images)


def test_lists_every_failed_image(written):
    report, _, page = written
    assert "Images that could not be read: 2" in page.text
    assert f"{report.images}, 2 more could not be read" in page.text
    for reason in ("<b>broken</b>", "the file is empty", "b.png"):
        assert reason in page.text


def test_every_picture_has_a_description_and_words(written):
    report, path, page = written
    images = page.named("img")
    maps = sum(finding.present and finding.positions is not None for finding in report.kinds)
    # figures; still pictures, and photos to choose from
    assert len(images) == 3 + maps + 2 * len(report.examples)
    assert all(image["alt"] for image in images)
    assert len(page.named("figcaption")) == len(page.named("figure"))
    assert path.stat().st_size < 2e6


def test_same_report_same_bytes(written, tmp_path):
    report, path, _ = written
    assert write_report(report, tmp_path / "again.html").read_bytes() == path.read_bytes()


def test_no_artifacts(tmp_path):
    report = make_report(artifacts=False, examples=1)
    page = Page(write_report(report, tmp_path / "report.html").read_text(encoding="utf-8"))
    assert {"class": "none"} in page.named("header")
    assert "No artifacts" in page.text
    assert "Layer that came closest" in page.text
    assert "Outliers per image" not in page.text
    assert "could not be read" not in page.text


def test_phantoms_are_labelled(tmp_path):
    report = replace(make_report(examples=1), planted=True)
    page = Page(write_report(report, tmp_path / "phantom.html").read_text(encoding="utf-8"))
    assert {"class": "phantom"} in page.named("p")
    assert "planted here on purpose" in page.text


def test_a_real_model_is_not_called_a_phantom(written):
    assert "phantom" not in written[2].text.lower()


def test_without_examples(tmp_path):
    page = Page(write_report(make_report(examples=0), tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "No example photos were kept." in page.text
    assert not page.named("script")
    path = write_verdict(make_verdict(examples=0), tmp_path / "verdict.html")
    assert "script-src 'none'" in path.read_text(encoding="utf-8")


def test_comparison(tmp_path):
    planted = replace(make_report(name=f"m/{HOSTILE}"), planted=True)
    reports = [make_report(artifacts=False, name="runs/step-1"), planted]
    path = write_comparison(reports, tmp_path / "comparison.html")
    page = Page(path.read_text(encoding="utf-8"))
    assert "<script" not in path.read_text(encoding="utf-8")
    assert "2 models compared" in page.text
    assert "step-1" in page.text
    assert "artifacts (a phantom)" in page.text
    assert all(report.reason in page.text for report in reports)
    (image,) = page.named("img")
    assert "step-1 0%" in image["alt"]


# -- before and after a fix ------------------------------------------------------------------------


def test_a_verdict_with_its_controls_and_the_choice(tmp_path):
    verdict = make_verdict()
    cure = FixSearch(verdict.fix, "the paper's register, for <reasons>.", verdict)
    page = Page(write_cure(cure, tmp_path / "cure.html").read_text(encoding="utf-8"))
    assert page.named("header") == [{"class": "none"}]
    for words in (
        "The fix helps", "It removes the artifacts.", "Chosen: the paper's register, for <reasons>.",
        "type 'registers'", "block 2: 3", "-12.00% [-13.00%, -11.00%]", "inert token", "0.9800",
        "Controls: 5 of them.", "The model with the fix: every layer",
    ):  # fmt: skip
        assert words in page.text, words


@pytest.mark.slow
@pytest.mark.parametrize(
    ("found", "kind", "title"),
    [("harms", "found", "The fix harms"), ("no effect", "", "The fix has no effect")],
)
def test_a_fix_that_does_not_help_is_not_shown_as_one_that_does(tmp_path, found, kind, title):
    path = write_verdict(replace(make_verdict(), verdict=found), tmp_path / "verdict.html")
    page = Page(path.read_text(encoding="utf-8"))
    assert page.named("header") == [{"class": kind}]
    assert title in page.text


def test_nothing_to_fix(tmp_path):
    report = make_report(artifacts=False, examples=1)
    verdict = replace(make_verdict(), verdict="no artifacts", before=report, after=None, measures=())
    cure = FixSearch(None, "nothing to fix", verdict)
    page = Page(write_cure(cure, tmp_path / "none.html").read_text(encoding="utf-8"))
    assert "No artifacts: nothing to fix" in page.text
    assert "Layer that came closest" in page.text
    assert "Chosen" not in page.text


@pytest.mark.slow
def test_each_result_has_its_report(tmp_path):
    verdict = make_verdict(examples=1)
    for i, (result, words) in enumerate(
        (
            (verdict.before, "Key facts"),
            (verdict, "The fix helps"),
            (FixSearch(verdict.fix, "as asked for", verdict), "Chosen: as asked for"),
            (Emergence([verdict.before, verdict.after]), "2 models compared"),
        )
    ):
        assert words in Page(write(result, tmp_path / f"{i}.html").read_text(encoding="utf-8")).text
    with pytest.raises(TypeError, match="found a str, but reports are of"):
        write("a diagnosis", tmp_path / "none.html")


@pytest.mark.slow
def test_a_target_that_cannot_be_written_is_an_error_of_ours(tmp_path):
    with pytest.raises(OutputError, match="is a folder"):
        write_report(make_report(examples=0), tmp_path)
    assert not list(tmp_path.iterdir())


def test_data_cannot_leave_its_block():
    data = {"name": f"</script>{HOSTILE}<!--"}
    block = ENVIRONMENT.get_template("view.html").module.data_block("data", data)
    assert block.count("<") == 2
    words = block.partition(">")[2].rpartition("<")[0]
    assert json.loads(words) == data


def test_photos_are_kept_as_they_are():
    ramp = np.linspace(0, 255, 32 * 48 * 3).reshape(32, 48, 3).astype(np.uint8)
    data = b64decode(photo_source(ramp).partition(",")[2])
    with PIL.Image.open(io.BytesIO(data)) as image:
        assert np.abs(np.asarray(image).astype(int) - ramp).mean() < 2


def test_text():
    shown = ENVIRONMENT.from_string("{{ text }}").render(text="a<b>&\"'\x00\x1b\u202e\udc80é日")
    assert shown == "a&lt;b&gt;&amp;&#34;&#39;\\x00\\x1b\\u202e\\udc80é日"
