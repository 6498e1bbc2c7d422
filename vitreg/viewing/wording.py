"""What is seen in one photo, as numbers and in a sentence."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vitreg.diagnosis.wording import kind_of_query
from vitreg.plots.style import safe
from vitreg.printing import called, number, percent, short_name

if TYPE_CHECKING:
    from vitreg.viewing.result import Look, LookVersion


# The most of a name in a table.
LETTERS = 36


@dataclass(frozen=True)
class PhotoFacts:
    """Of one photo in one version of a model: its patches, and those that are artifacts.

    `ratio` is their median norm over that of the others, `attention` their share of the last block's
    attention to patches (None without artifacts). `attention_on_former`: the share of those patches that are
    artifacts in the model without its fix (None without a fix, or without any).
    """

    photo: str
    patches: int
    artifacts: int
    ratio: float | None
    attention: float | None
    attention_on_former: float | None


def photo_facts(version: "LookVersion", photo: int, unfixed: "LookVersion") -> PhotoFacts:
    """The figures of one photo."""
    example, mask, former = version.photos[photo], version.outliers(photo), unfixed.outliers(photo)
    norms, attention = example.norms[version.diagnosis.rule.layer], example.attention[-1]
    both = mask.any() and not mask.all()
    return PhotoFacts(
        photo=example.name,
        patches=mask.size,
        artifacts=int(mask.sum()),
        ratio=float(np.median(norms[mask]) / np.median(norms[~mask])) if both else None,
        attention=float(attention[mask].sum()) if mask.any() else None,
        attention_on_former=float(attention[former].sum()) if version.fixed and former.any() else None,
    )


def sentence(look: "Look", version: "LookVersion", photo: int, named: bool) -> str:
    """What is seen in one photo; `named` says which."""
    facts, diagnosis = photo_facts(version, photo, look.unfixed(version)), version.diagnosis
    subject = called(version.label, diagnosis.planted) + (f", {short_name(facts.photo)}" if named else "")
    source = kind_of_query(diagnosis.attention_queries)
    if facts.ratio is not None and facts.attention is not None:
        verb = "are artifacts" if facts.artifacts > 1 else "is an artifact"
        said = (
            f"{facts.artifacts} of {facts.patches} patches {verb}: norms {number(facts.ratio)}x the others',"
            f" {percent(facts.attention)} of the {source} attention"
        )
    elif facts.artifacts:
        said = f"all {facts.patches} patches are artifacts"
    elif diagnosis.has_artifacts:
        said = "no artifact in this photo, but the model makes some in others"
    else:
        said = "no artifacts"
    if facts.attention_on_former is not None:
        said += f"; the former artifacts draw {percent(facts.attention_on_former)} of the {source} attention"
    return f"{subject}: {said}."


def table(look: "Look") -> tuple[list[str], list[list[str]]]:
    """The figures of all photos and versions: heads and rows, with no column for what there is none of."""
    source = kind_of_query(look.versions[0].diagnosis.attention_queries)
    heads = ["", "artifacts", "their norm", f"{source} attention", "on former ones"]
    rows = []
    for photo, name in enumerate(look.names):
        for version in look.versions:
            facts = photo_facts(version, photo, look.unfixed(version))
            words = [short_name(name)] if len(look.names) > 1 else []
            words += [version.label] if len(look.versions) > 1 or not words else []
            rows.append([", ".join(safe(word, LETTERS) for word in words), *_cells(facts)])
    if not any(version.fixed for version in look.versions):
        heads, rows = heads[:-1], [row[:-1] for row in rows]
    return heads, rows


def _cells(facts: PhotoFacts) -> list[str]:
    shares = (facts.attention, facts.attention_on_former)
    ratio = "-" if facts.ratio is None else f"{number(facts.ratio)}x"
    return [
        f"{facts.artifacts} of {facts.patches}",
        ratio,
        *("-" if share is None else percent(share) for share in shares),
    ]


def what_judged(look: "Look") -> str:
    """How much the sentences are worth, and what says more."""
    own = len(look.names)
    photos = f"{own} photo{'s' if own > 1 else ''}" + (
        f" and {look.beside} bundled ones" if look.beside else ""
    )
    first = look.versions[0].diagnosis
    ratio = next((x for x in first.detectable.values() if x is not None), None)
    seen = "" if ratio is None else f" Artifacts from {ratio:.1f}x the median norm on would have been seen."
    return f"Judged from {photos}; `vitreg diagnose MODEL PHOTOS` judges a model.{seen}"
