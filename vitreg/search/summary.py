"""What `find_fix` found at a glance."""

from dataclasses import replace
from typing import TYPE_CHECKING

from vitreg.printing import Step, Summary, in_brief

if TYPE_CHECKING:
    from vitreg.search.fix_search import FixSearch

_USE = Step(
    "keep it, and use it on the same weights anywhere.",
    python=('found.save("fix/")', 'vitreg.load_fix("fix/").apply(model)'),
)


def summary_of(search: "FixSearch") -> Summary:
    """The verdict on the fix, what was measured, and what to do with it."""
    summary = search.verdict.summary()
    if search.fix is None:
        return replace(summary, notes=[in_brief(search.choice), *summary.notes[1:]])
    chosen = f"chosen: {in_brief(search.choice)} {search.fix.neurons.in_words}".rstrip()
    steps = [_USE] if search.verdict.verdict == "helps" else summary.steps
    return replace(summary, notes=[chosen, *summary.notes], steps=steps)
