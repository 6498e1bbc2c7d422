"""`vitreg eval --report`: the metrics, what was found, and the photos that it was found on."""

from pathlib import Path

import pytest
from browser import Visit, chromium
from command_line import fails
from pages import Page

import vitreg
from vitreg.evals.classification import evaluate
from vitreg.features.config import Config
from vitreg.reports.evaluation import _some

pytestmark = pytest.mark.slow


def page_of(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture
def discovered(run, model, voc, tmp_path):
    """What `vitreg eval discovery --compare --report` said, and the report."""
    fix = vitreg.TestTimeRegisters({1: [3]}).save(tmp_path / "fix")
    options = ("--set", "resolution=model", "--no-cache", "--report", tmp_path / "r.html")
    code, said, _ = run("eval", "discovery", model, voc, "--fix", fix, "--compare", "--full", *options)
    assert code == 0
    assert f"report: {tmp_path / 'r.html'}" in said
    return said, tmp_path / "r.html"


def test_boxes_and_metrics_before_and_after(discovered):
    said, path = discovered
    page = page_of(path)
    alts = [image["alt"] for image in page.named("img")]
    assert alts[:2] == ["discovery, as it is", "discovery, registers (1 neurons, 1 register tokens)"]
    for words in ("Discovery, without and with a fix", "LOST CorLoc", "difference", "resolution model"):
        assert words in page.text
    table = [line.strip() for line in said.splitlines() if "TokenCut CorLoc" in line]
    assert " ".join(table[0].split()) in page.text


def test_norms_and_attention_before_and_after(discovered):
    with chromium() as browser:
        visit = Visit(browser, discovered[1])
        for kind in ("norms", "attention"):
            captions = [visit.text(f".stage [data-kind={kind}][data-version='{i}'] b") for i in (0, 1)]
            assert captions == ["As it is", "With the fix"]
        visit.close()


def test_one_result_without_a_picture(run, model, classes, tmp_path):
    out = tmp_path / "r.html"
    code, said, _ = run("eval", "classification", model, classes, "--no-cache", "--report", out)
    page = page_of(out)
    assert code == 0
    assert "Classification" in page.text
    assert "What was found" not in page.text
    assert "A diagnosis of 3 of the photos, evenly spread, finds no artifacts: in no layer" in page.text
    row = next(line for line in said.splitlines() if "top-1" in line)
    assert " ".join(row.split()) in page.text


def test_a_report_that_cannot_be_written_is_refused_before_the_work(run, classes, tmp_path):
    target = tmp_path / "missing" / "r.html"
    fails(run("eval", "classification", "timm:never-loaded", classes, "--report", target), str(target))


def test_a_result_knows_its_photos_and_does_not_write_their_paths(model, classes):
    result = evaluate(vitreg.load(str(model)), classes)
    assert {path.name for path in result.photos} == {"astronaut.jpg", "camera.jpg", "cat.jpg"}
    assert "photos" not in result.to_json()


def test_shown_photos_are_spread_over_all_and_come_first():
    paths = [Path(f"{i:03}.jpg") for i in range(240)]
    some = _some(paths, Config(limit=120))
    assert len(some) == len(set(some)) == 64
    shown = [int(path.stem) for path in some[:12]]
    assert shown == sorted(shown)
    assert shown[0] < 10
    assert shown[-1] > 200
