"""What to do after a command: the next one, with the user's own model, paths and options, to copy."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vitreg.printing import Step

if TYPE_CHECKING:
    from vitreg.diagnosis.result import Diagnosis
    from vitreg.search.fix_search import FixSearch

_NOTHING = Step("nothing: there is nothing to fix.")


def after_diagnosis(
    models: Sequence[str],
    images: str,
    reports: "Sequence[Diagnosis]",
    given: Sequence[str],
    fix: str | None = None,
) -> list[Step]:
    """Fix the first model that has artifacts; with a fix on it, judge the fix against controls."""
    from vitreg.search.choosing import PROJECTED

    ill = [model for model, report in zip(models, reports, strict=True) if report.has_artifacts]
    if fix is not None:
        return [
            Step("judge the fix, against controls.", ("vitreg", "verify", models[0], fix, images, *given))
        ]
    if ill:
        return [Step("find what makes them, and remove them.", _fix(ill[0], images, given))]
    kinds = {finding.kind for report in reports for finding in report.other_artifacts}
    if kinds.intersection(PROJECTED):
        words = "nothing for CLS and attention. Those who read patches can take the other artifacts out."
        return [Step(words, (*_fix(models[0], images, given), "--type", "projection"))]
    return [_NOTHING]


def after_fix(model: str, images: str, out: Path, found: "FixSearch", given: Sequence[str]) -> list[Step]:
    """Use the fix, and judge it on other photos; or try another one."""
    if found.fix is None:
        return list(found.summary().steps)
    if found.verdict.verdict != "helps":
        return [_another(model, images, found.fix.type, given)]
    other = ("vitreg", "verify", model, str(out), images, *given)
    return [use(str(out)), Step("judge it on other photos (change the folder).", other)]


def after_verify(
    model: str, images: str, fix: str, kind: str, verdict: str, given: Sequence[str]
) -> list[Step]:
    """Use the fix, or try another one."""
    if verdict == "helps":
        return [use(fix)]
    return [_NOTHING] if verdict == "no artifacts" else [_another(model, images, kind, given)]


def use(fix: str) -> Step:
    """A saved fix from Python."""
    return Step("use it in Python.", python=("import vitreg", f"vitreg.load_fix({fix!r}).apply(model)"))


def _fix(model: str, images: str, given: Sequence[str]) -> tuple[str, ...]:
    return ("vitreg", "fix", model, images, "-o", free_name("fix"), *given)


def _another(model: str, images: str, kind: str, given: Sequence[str]) -> Step:
    other = "registers" if kind == "splitting" else "splitting"
    return Step("try a fix of another type.", (*_fix(model, images, given), "--type", other))


def free_name(name: str) -> str:
    """A folder of this name in the current one, or the first of its kind that is not there yet."""
    number = 2
    free = name
    while Path(free).exists():
        free, number = f"{name}-{number}", number + 1
    return f"{free}/"


def after_evaluation(task: str, model: str, data: str, given: Sequence[str], fix: str | None) -> Step:
    """Compare with a fix."""
    words = "the same without and with a fix (here fix/, as `vitreg fix` makes it)."
    if fix is not None:
        words = "the same without and with this fix."
    return Step(words, ("vitreg", "eval", task, model, data, "--fix", fix or "fix/", "--compare", *given))
