"""When do artifacts emerge: over training steps, or over the sizes of a model?

found = Emergence([diagnose(vit, photos) for vit in checkpoints])
print(found)                      # one table
found.figure()                    # outlier fraction by checkpoint and by layer
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitreg.diagnosis.kinds.locality import Locality
from vitreg.diagnosis.result import Diagnosis
from vitreg.printing import Presented, Summary, text_table


@dataclass(frozen=True, repr=False)
class Emergence(Presented):
    """Diagnoses of several checkpoints or sizes of a model, in the order given."""

    diagnoses: list[Diagnosis]

    def __post_init__(self) -> None:
        if not self.diagnoses:
            raise ValueError("there are no diagnoses to compare; expected at least one.")

    @property
    def labels(self) -> list[str]:
        """A short name for each: the last part of the model's name that tells them apart."""
        return short_labels([diagnosis.model for diagnosis in self.diagnoses])

    def to_json(self) -> dict[str, Any]:
        return {
            "models": [{"label": x} | d.to_json() for x, d in zip(self.labels, self.diagnoses, strict=True)]
        }

    def figure(self) -> Any:
        """Outlier fraction by model and by layer, as a matplotlib Figure."""
        from vitreg.diagnosis.figures import emergence as draw

        return draw(list(zip(self.labels, self.diagnoses, strict=True)))

    def summary(self) -> Summary:
        """How many of the models have artifacts, and a row for each."""
        from vitreg.diagnosis.summary import summary_of_several

        return summary_of_several(self)

    def full(self) -> str:
        """One table with all columns, and what they mean."""
        heads = ("model", "verdict", "onset", "outliers", "norms", "attention", "locality")
        table = text_table(list(map(_row, self.labels, self.diagnoses)), heads, left=2, width=120)
        notes = "outliers: share of patch tokens; norms: outliers' median over the others'"
        return (
            f"{table}\n{notes}; attention: share on outliers, last block\n"
            "locality: how much more patches resemble their neighbours than far ones, last block (1: wholly)"
        )


def _row(label: str, d: Diagnosis) -> list[str]:
    best = d.layers[d.detect_layer]
    return [
        label,
        d.verdict + (" (a phantom)" if d.planted else ""),
        "-" if d.onset_layer is None else f"block {d.onset_layer}",
        f"{d.outlier_fraction:.2%}",
        f"{best.ratio:.1f}x" if d.has_artifacts else "-",
        f"{d.attention_to_outliers:.1%}",
        _locality(d),
    ]


def _locality(diagnosis: Diagnosis) -> str:
    finding = diagnosis.kind(Locality.kind)
    return f"{finding.kept[-1]:.2f}" if isinstance(finding, Locality) else "-"


def short_labels(names: Sequence[str]) -> list[str]:
    """The last part of each name, or the whole names where these would be the same."""
    ends = [Path(name).name.rpartition(":")[2] for name in names]
    return ends if len(set(ends)) == len(ends) else list(names)
