"""A verdict on a fix at a glance."""

from typing import TYPE_CHECKING

from vitreg.diagnosis.summary import cautions
from vitreg.printing import Step, Summary, called, in_brief, short_name

if TYPE_CHECKING:
    from vitreg.verification.verdict import Verdict

# What a verdict rests on, in the order of the rows; of the predictions, top-1 where classes are known.
_ROWS = {
    "outliers": "outlier patches",
    "attention": "attention on former outliers",
    "top1": "top-1",
    "agreement": "same prediction",
    "cls": "CLS as before (cosine)",
}
_VERDICTS = {
    "helps": "the fix helps",
    "no effect": "the fix has no effect",
    "harms": "the fix harms",
    "no artifacts": "no artifacts, nothing to fix",
    "no fix": "artifacts, and no fix for them",
}
_STEPS = {
    "helps": Step("apply it to your model.", python=("fix.apply(model)",)),
    "no effect": Step("try another fix.", python=("vitreg.find_fix(vit, photos)",)),
    "harms": Step("try another fix.", python=('vitreg.find_fix(vit, photos, kind="splitting")',)),
    "no artifacts": Step("nothing: there is nothing to fix."),
    "no fix": Step("nothing: no fix of this library removes them."),
}


def summary_of(verdict: "Verdict") -> Summary:
    """The verdict, and the measures that it rests on, before and after."""
    from vitreg.verification.verdict import written

    measured = {measure.name: measure for measure in verdict.measures}
    rows = [
        [label, written(name, measured[name].before), written(name, measured[name].after)]
        for name, label in _ROWS.items()
        if name in measured
    ]
    model = called(short_name(verdict.model), verdict.planted)
    return Summary(
        _VERDICTS[verdict.verdict],
        f"{model}, {verdict.fix.type}" if verdict.measures else model,
        rows,
        heads=("", "before", "after") if rows else (),
        notes=[in_brief(verdict.reason), *map(in_brief, verdict.notes), *cautions(verdict.before)],
        steps=[_STEPS[verdict.verdict]],
    )
