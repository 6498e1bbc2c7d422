"""Whatever names, reasons and settings hold, each kind of report shows it as text."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import timm
from drawn_reports import ONSET, make_report, make_verdict
from matplotlib.figure import Figure
from pages import Page

import vitreg
from vitreg.diagnosis.kinds import Finding
from vitreg.diagnosis.result import Diagnosis
from vitreg.evals.result import Metric, Result
from vitreg.features.config import Config
from vitreg.reports import evaluation, html
from vitreg.reports.report import write_comparison, write_cure, write_report, write_verdict
from vitreg.search.fix_search import FixSearch
from vitreg.verification.verdict import Verdict

pytestmark = pytest.mark.slow

HARMLESS = "(name\n)"
HOSTILE = "<img src=x onerror=alert(1)>{{ 7*7 }}{% x %}<b>\"'&\n"
SHOWN = {words: words.replace("\n", "\\n") for words in (HARMLESS, HOSTILE)}


def diagnosis(words: str, artifacts: bool = True) -> Diagnosis:
    """With these words in every text that is not ours; without artifacts the verdict is such a text too."""

    @dataclass(frozen=True)
    class Named(Finding):
        kind, title = words, words

        def __str__(self) -> str:
            return words

    report = make_report(artifacts, examples=2)
    return replace(
        report,
        model=words,
        verdict=report.verdict if artifacts else words,
        reason=words,
        versions={words: words},
        failed_images=[{"path": words, "reason": words}],
        examples=[replace(example, name=words) for example in report.examples],
        kinds=(Named(True, ONSET, report.position_frequency), Named(True, ONSET, None)),
    )


def verdict(words: str) -> Verdict:
    found = make_verdict()
    return replace(
        found,
        reason=words,
        model=words,
        before=diagnosis(words),
        after=diagnosis(words, artifacts=False),
        controls=(*found.controls, replace(found.controls[-1], name=words)),
        notes=(words,),
        versions={words: words},
    )


def result(words: str, fix: str | None) -> Result:
    def drawn() -> Figure:
        return Figure(figsize=(2, 1))

    metrics = {words: Metric(np.linspace(0, 1, 5)[:, None])}
    settings, photos = {words: words}, (Path(words),)
    return Result(words, words, words, metrics, 5, settings, fix, 0, (words,), drawn, photos, settings)


def write_evaluation(words: str, path: Path, compared: bool) -> Path:
    model = timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2)
    vit = vitreg.wrap(model.eval(), image_size=(32, 32))
    fix = vitreg.TestTimeRegisters({ONSET: [3]}) if compared else None
    results = [result(words, None), result(words, words)] if compared else [result(words, words)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "read_images", lambda *what, **how: [])
        patch.setattr(evaluation, "diagnose", lambda *what, **how: diagnosis(words))
        return evaluation.write_evaluation(results, path, vit, fix, Config())


REPORTS: dict[str, Callable[[str, Path], Path]] = {
    "diagnosis": lambda words, path: write_report(diagnosis(words), path),
    "no artifacts": lambda words, path: write_report(diagnosis(words, artifacts=False), path),
    "verdict": lambda words, path: write_verdict(verdict(words), path),
    "nothing to fix": lambda words, path: write_verdict(
        replace(verdict(words), verdict="no artifacts", after=None), path
    ),
    "cure": lambda words, path: write_cure(FixSearch(make_verdict().fix, words, verdict(words)), path),
    "comparison": lambda words, path: write_comparison(
        [diagnosis(words), diagnosis(words, artifacts=False)], path
    ),
    "evaluation": lambda words, path: write_evaluation(words, path, compared=False),
    "evaluation with a fix": lambda words, path: write_evaluation(words, path, compared=True),
}


def shown(page: Page, words: str) -> int:
    """How often a page shows words, in its texts and in what it says of its pictures."""
    texts = [page.text, *(image["alt"] or "" for image in page.named("img"))]
    return sum(text.lower().count(SHOWN[words]) for text in texts)


@pytest.mark.parametrize("kind", REPORTS)
def test_a_hostile_text_makes_the_page_that_a_harmless_one_makes(kind, tmp_path, monkeypatch):
    """The same elements with the same attributes, and the text as often: nothing of it was rendered."""
    monkeypatch.setattr(html, "png", lambda *what, **how: b"not looked at")
    harmless, hostile = (
        Page(REPORTS[kind](words, tmp_path / f"{i}.html").read_text(encoding="utf-8"))
        for i, words in enumerate((HARMLESS, HOSTILE))
    )
    assert [(tag, list(names)) for tag, names in hostile.tags] == [
        (tag, list(names)) for tag, names in harmless.tags
    ]
    assert shown(hostile, HOSTILE) == shown(harmless, HARMLESS) >= 5
