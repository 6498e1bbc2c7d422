"""What `look` gives: versions of models on the same photos, in words, JSON and pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vitreg.diagnosis.result import Diagnosis, Example
from vitreg.printing import PHANTOM, Presented, Summary, short_name
from vitreg.viewing.patches import Patch, PatchName
from vitreg.viewing.wording import photo_facts, sentence, table, what_judged


@dataclass(frozen=True, eq=False)
class LookVersion:
    """What one model, as it is or with a fix, makes of the photos.

    `diagnosis` was made on the photos and on bundled ones beside them; its `examples` are the photos.
    `features` are those of the patches after the final norm, of each layer, where they were asked for.
    `attended` holds where chosen tokens look in the last block (mean of heads), by their names: one map for
    each photo; `asked`, which patch each of them is. Versions of one `model` show their features along the
    same axes.
    """

    model: str
    name: str
    diagnosis: Diagnosis
    features: Mapping[int, Float[Tensor, "b gh gw d"]]
    attended: Mapping[str, Float[np.ndarray, "b gh gw"]]
    asked: Mapping[str, Sequence[Patch | None]]

    @property
    def label(self) -> str:
        """The name without the folders that lead to a model; with a fix, what that is."""
        return self.name.removeprefix(f"{self.model}, ") if self.fixed else short_name(self.name)

    @property
    def fixed(self) -> bool:
        return self.name != self.model

    @property
    def last(self) -> Float[Tensor, "b gh gw d"]:
        """The features of the last layer."""
        return torch.from_numpy(np.stack([photo.features for photo in self.photos]))

    def outliers(self, photo: int) -> Bool[np.ndarray, "gh gw"]:
        """The photo's patches that are artifacts."""
        rule = self.diagnosis.rule
        return rule.mask(self.photos[photo].norms[rule.layer])

    @property
    def photos(self) -> list[Example]:
        return self.diagnosis.examples


@dataclass(frozen=True, eq=False, repr=False)
class Look(Presented):
    """What `look` saw: print it, draw it, or show it in a notebook. All versions saw the same photos.

    `beside` counts the bundled photos that the patches were judged with, `failed` names unreadable photos.
    """

    versions: tuple[LookVersion, ...]
    beside: int
    failed: tuple[dict[str, str], ...]

    @property
    def names(self) -> list[str]:
        """The photos' names."""
        return [example.name for example in self.versions[0].photos]

    @property
    def has_artifacts(self) -> bool:
        """Whether any of the versions has."""
        return any(version.diagnosis.has_artifacts for version in self.versions)

    @property
    def planted(self) -> bool:
        """Whether one of the models is a phantom."""
        return any(version.diagnosis.planted for version in self.versions)

    def unfixed(self, version: LookVersion) -> LookVersion:
        """The same model without the fix."""
        return next(x for x in self.versions if x.model == version.model)

    def figure(self, *, together: bool = False, foreground: bool = False) -> Any:
        """The picture, as a matplotlib Figure: a row for each photo and version.

        Colours of features are their first three principal components in that photo, or in all photos
        `together`. With `foreground`, only patches that the first component parts from the border.
        """
        from vitreg.viewing.figures import overview

        return overview(self, together=together, foreground=foreground)

    def by_layer(self, photo: int = 0) -> Any:
        """One photo's norms, features and attention in each layer; of features those that were asked for."""
        from vitreg.viewing.figures import layers_figure

        return layers_figure(self, photo)

    def similar(self, *patches: PatchName, photo: int = 0) -> Any:
        """How alike all patches are to (row, column), "outlier" or "centre": the cosine of their features."""
        from vitreg.viewing.figures import similarity_figure

        return similarity_figure(self, patches or ("outlier", "centre"), photo)

    def attention(self, photo: int = 0) -> Any:
        """Where the tokens that were asked for (`look(..., queries=...)`) look."""
        from vitreg.viewing.figures import attention_figure

        return attention_figure(self, photo)

    def to_json(self) -> dict[str, Any]:
        """Verdicts, and the figures of each photo, as JSON-ready values."""
        return {
            "photos": self.names,
            "bundled_photos_beside": self.beside,
            "failed_images": list(self.failed),
            "versions": [
                {
                    "name": version.name,
                    "verdict": version.diagnosis.verdict,
                    "sureness": version.diagnosis.sureness,
                    "rule": version.diagnosis.rule.to_json(),
                    "photos": [
                        asdict(photo_facts(version, i, self.unfixed(version))) for i in range(len(self.names))
                    ],
                }
                for version in self.versions
            ],
        }

    def summary(self) -> Summary:
        """Which patches are artifacts, in each photo and version, and what to make of it."""
        subject = short_name(self.names[0]) if len(self.names) == 1 else f"{len(self.names)} photos"
        verdict = "artifacts" if self.has_artifacts else "no artifacts"
        heads, rows = table(self)
        return Summary(verdict, subject, rows, heads, self._notes())

    def full(self) -> str:
        lines = [
            sentence(self, version, i, named=len(self.names) > 1)
            for i in range(len(self.names))
            for version in self.versions
        ]
        return "\n".join([*lines, *self._notes()])

    def _notes(self) -> list[str]:
        unread = [f"{failed['path']} could not be read: {failed['reason']}" for failed in self.failed]
        return [*([f"{PHANTOM}."] if self.planted else []), *unread, what_judged(self)]

    def __repr__(self) -> str:
        found = ", ".join(f"{version.label}: {version.diagnosis.verdict}" for version in self.versions)
        return f"<Look: {len(self.names)} photos; {found}>"
