"""What vitreg makes of a model, on one page: what was found in it, and what works on it and what does not.

    print(vitreg.doctor("timm:vit_tiny_patch16_224").full())      # or a module, or a Backbone

The page is plain text of 80 columns, to be pasted into a bug report. It names no path but those within the
model.
"""

import textwrap
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from vitreg.errors import MissingExtraError, ModelLoadError, ModelWarning, VitregError
from vitreg.examination.findings import Line, findings, findings_of_module, versions
from vitreg.examination.trials import Trial, trials
from vitreg.models.backbone import Backbone, wrap
from vitreg.models.loading import _builder, _built, load
from vitreg.models.names import with_library
from vitreg.models.sizes import Size
from vitreg.printing import Presented, Step, Summary, in_brief, short_name

COLUMNS = 80
_NAME = 19  # columns of a line's name
_AT_A_GLANCE = ("model", "blocks", "tokens", "image size", "weights")


@dataclass(frozen=True, repr=False)
class Examination(Presented):
    """What `doctor` saw. `refusal` is why vitreg does not read the model; then nothing was tried."""

    model: str
    refusal: str | None
    found: tuple[Line, ...]
    trials: tuple[Trial, ...]
    versions: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"found": dict(self.found)}

    def summary(self) -> Summary:
        """Whether vitreg reads the model, what it is, and what fails."""
        failed = [trial for trial in self.trials if not trial.works]
        known = dict(self.found)
        rows = [(name, known[name]) for name in _AT_A_GLANCE if name in known]
        rows += [(f"fails: {trial.name}", in_brief(trial.detail)) for trial in failed]
        works = f"{len(self.trials) - len(failed)} of {len(self.trials)} things tried work"
        return Summary(
            "refused" if self.refusal is not None else f"supported, {works}",
            short_name(self.model),
            rows,
            notes=[] if self.refusal is None else [self.refusal],
            steps=[Step("the whole page, for a bug report.", python=("print(page.full())",))],
        )

    def full(self) -> str:
        """The page for a bug report: all that was found and tried, and the versions."""
        lines = _wrapped(f"vitreg doctor: {self.model}", "")
        if self.refusal is not None:
            lines += ["", "REFUSED", *_wrapped(self.refusal, "  ")]
        lines += ["", "FOUND", *(line for name, value in self.found for line in _row(name, value))]
        for title, works in (("WORKS", True), ("DOES NOT WORK", False)):
            rows = [_row(trial.name, trial.detail) for trial in self.trials if trial.works is works]
            lines += ["", title, *(line for row in rows for line in row)] if rows else []
        lines += ["", "VERSIONS", *_wrapped(", ".join(f"{k} {v}" for k, v in self.versions.items()), "  ")]
        return "\n".join(lines)


def _row(name: str, value: str) -> list[str]:
    first = f"  {name:<{_NAME}}" if len(name) < _NAME else f"  {name} "
    return textwrap.wrap(
        " ".join(value.split()),
        COLUMNS,
        initial_indent=first,
        subsequent_indent=" " * (_NAME + 2),
        break_on_hyphens=False,
    ) or [first.rstrip()]


def _wrapped(text: str, indent: str) -> list[str]:
    joined = " ".join(text.split())
    return textwrap.wrap(
        joined, COLUMNS, initial_indent=indent, subsequent_indent=indent or "  ", break_on_hyphens=False
    )


def doctor(
    model: str | nn.Module | Backbone,
    *,
    size: Size | None = None,
    random_weights: bool = False,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "float32",
    trust_remote_code: bool = False,
) -> Examination:
    """Look at a model, and try everything on two noise images; the model is left as it was.

    `model` is a name as `load` takes it (the other arguments are those of `load`), a module (only `size` is
    of interest then), or a Backbone. A model that is refused makes a page with the refusal. Raises
    ModelLoadError for a name that stands for no model, or for weights that do not fit.
    """
    name = model if isinstance(model, str) else model.name if isinstance(model, Backbone) else ""
    said: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", ModelWarning)
            if isinstance(model, Backbone):
                vit = model
            elif isinstance(model, str):
                vit = load(
                    model, size=size, random_weights=random_weights, device=device, dtype=dtype,
                    trust_remote_code=trust_remote_code,
                )  # fmt: skip
            else:
                vit = wrap(model, image_size=size)
    except Exception as error:
        if isinstance(model, str) and isinstance(error, ModelLoadError | MissingExtraError):
            raise
        module = _tower(model, size, random_weights) if isinstance(model, str) else model
        seen = findings_of_module(module) if isinstance(module, nn.Module) else []
        return Examination(name or type(model).__name__, _why(error), tuple(seen), (), versions())
    size_from = "as asked for" if size is not None else "the model's own"
    found = findings(vit, "" if isinstance(model, Backbone) else size_from)
    if random_weights:
        found.append(("weights", "random"))
    found += [("note", str(warning.message)) for warning in said if warning.category is ModelWarning]
    return Examination(vit.name, None, tuple(found), tuple(trials(vit)), versions())


def _why(error: Exception) -> str:
    if isinstance(error, VitregError):
        return str(error)
    bug = "vitreg did not refuse it: this is a bug of vitreg or of a library"
    return f"{type(error).__name__}: {error} ({bug})"


def _tower(name: str, size: Size | None, random_weights: bool) -> nn.Module | None:
    """The vision tower of a model that is refused; None where there is none to be had."""
    name = with_library(name)
    try:
        built = _built(name, _builder(name, False), size, random_weights)
    except VitregError:
        return None
    return next(iter(built.towers), built.whole)
