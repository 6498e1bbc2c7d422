"""The HTML report: complete, self-contained, and safe whatever the files are called."""

from dataclasses import replace
from html.parser import HTMLParser

import pytest
from reports import ONSET, make_report

from vitreg.errors import OutputError
from vitreg.page import text
from vitreg.report import write_comparison, write_report

HOSTILE = "<script>alert(1)</script>\"'&\u202e.jpg"


class Page(HTMLParser):
    """All tags with their attributes, and all text outside of <style>, of a page that must be well-formed."""

    EMPTY = ("meta", "img")

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(source)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


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
        assert tag not in ("script", "link", "iframe", "object", "base", "form")
        assert not [name for name in attributes if name.startswith("on") or name == "href"]
        if "src" in attributes:
            assert attributes["src"].startswith("data:image/png;base64,")
    source = path.read_text(encoding="utf-8")
    assert "://" not in source
    assert "url(" not in source
    assert "@import" not in source
    (policy,) = [x["content"] for x in page.named("meta") if x.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")


def test_hostile_names_are_text(written):
    _, path, page = written
    assert "<script" not in path.read_text(encoding="utf-8")
    assert "<b>" not in path.read_text(encoding="utf-8")
    shown = "<script>alert(1)</script>\"'&\\u202e.jpg"
    assert page.text.count(shown) >= 3  # model, photo, failed image
    assert [x["alt"] for x in page.named("img")][3].startswith(shown)


def test_shows_every_finding(written):
    report, _, page = written
    assert report.reason[1:] in page.text
    assert f"{ONSET} (the first that shows them)" in page.text
    assert f"{report.outliers_per_image:.2f}" in page.text
    assert f"{ONSET} (onset, detect)" in page.text
    assert report.sink in page.text
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
    assert len(images) == 3 + len(report.examples)
    assert all(image["alt"] for image in images)
    assert [tag for tag, _ in page.tags].count("figcaption") == len(images)
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
    report = make_report(name="phantom of tiny", examples=1)
    page = Page(write_report(report, tmp_path / "phantom.html").read_text(encoding="utf-8"))
    assert {"class": "phantom"} in page.named("p")
    assert "planted here on purpose" in page.text


def test_a_real_model_is_not_called_a_phantom(written):
    assert "phantom" not in written[2].text.lower()


def test_without_examples(tmp_path):
    page = Page(write_report(make_report(examples=0), tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "No example photos were kept." in page.text


def test_comparison(tmp_path):
    reports = [make_report(artifacts=False, name="runs/step-1"), make_report(name=f"phantom/{HOSTILE}")]
    path = write_comparison(reports, tmp_path / "comparison.html")
    page = Page(path.read_text(encoding="utf-8"))
    assert "<script" not in path.read_text(encoding="utf-8")
    assert "2 models compared" in page.text
    assert "step-1" in page.text
    assert "artifacts (a phantom)" in page.text
    assert all(report.reason in page.text for report in reports)
    (image,) = page.named("img")
    assert "step-1 0%" in image["alt"]


def test_a_target_that_cannot_be_written_is_an_error_of_ours(tmp_path):
    with pytest.raises(OutputError, match="is a folder"):
        write_report(make_report(examples=0), tmp_path)
    assert not list(tmp_path.iterdir())


def test_text():
    assert text("a<b>&\"'\x00\x1b\u202e\udc80é日") == "a&lt;b&gt;&amp;&quot;&#x27;\\x00\\x1b\\u202e\\udc80é日"
