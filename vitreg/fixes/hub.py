"""Fixes on the Hugging Face hub: a repository that holds a fix's files and a short model card.

fix.push_to_hub("user/repo", vit=vit)
load_fix("user/repo")
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vitreg.errors import FixError, OutputError
from vitreg.fixes.base import Fix
from vitreg.fixes.saving import DOCUMENT, TENSORS, save_fix
from vitreg.models.backbone import Backbone

_WHAT = {
    "registers": "moves the activation of register neurons to extra tokens (test-time registers)",
    "splitting": "forks the tokens that register neurons mark and cleans the copies (token splitting)",
    "bias": "sets register neurons to zero and adds constant keys and values to attention",
    "shift-average": "averages features over shifted views",
    "trained": "adds trained register tokens, and has new values for weights that were trained with them",
}


def download(source: str | Path, revision: str | None) -> Path:
    """The folder in the local cache that holds the files of a fix, and only those, of a repository."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=[DOCUMENT, TENSORS]))
    except (
        Exception
    ) as error:  # a wrong name, no such repository, no network, no space: one line with the cause
        reason = " ".join(str(error).split())[:300]
        raise FixError(
            f"no fix at {str(source)!r}: there is no such folder, and it could not be downloaded from"
            f" the hub{f' (revision {revision!r})' if revision else ''} ({type(error).__name__}:"
            f" {reason}). Check the name and the network."
        ) from error


def push_fix(
    fix: Fix,
    repo_id: str,
    *,
    vit: Backbone | None = None,
    evidence: Mapping[str, Any] | None = None,
    token: str | None = None,
    private: bool = False,
    commit_message: str,
) -> str:
    """Save a fix into a repository, which is created if it is not there; returns the address of the commit.

    `vit` and `evidence` as for `save_fix`; `token` is the hub's, by default the one that is logged in. A
    repository that exists stays as private or public as it is. Raises OutputError where the hub refuses.
    """
    from huggingface_hub import HfApi

    with TemporaryDirectory() as temporary:
        folder = save_fix(fix, Path(temporary) / "fix", vit=vit, evidence=evidence)
        document = json.loads((folder / DOCUMENT).read_text(encoding="utf-8"))
        (folder / "README.md").write_text(model_card(repo_id, document), encoding="utf-8")
        api = HfApi(token=token)
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            # The tensors of an earlier fix go, if this one has none.
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=commit_message, delete_patterns=TENSORS
            )
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise OutputError(
                f"cannot push to {repo_id!r} on the hub ({type(error).__name__}: {reason}). Check the name,"
                " the network, and that you are logged in with the right to write (hf auth login)."
            ) from error
    return str(commit)


def model_card(repo_id: str, document: Mapping[str, Any]) -> str:
    """The README of a repository: what the fix is for, what it does, what was measured, how to load it."""
    base = (document["fingerprint"] or {}).get("base_model")
    head = {"library_name": "vitreg", "tags": ["vitreg", "vision-transformer"]}
    if (base_id := _hub_id(base)) is not None:
        head["base_model"] = base_id
    neurons = document["neurons"]["chosen"]
    places = ", ".join(f"{neuron['layer']}:{neuron['index']}" for neuron in neurons[:20])
    more = f" and {len(neurons) - 20} more" if len(neurons) > 20 else ""
    facts = [
        f"Made for: {base or 'a model without a name'}",
        f"Type: `{document['type']}`, which {_WHAT[document['type']]}",
        f"Neurons (block:index, from 0): {places or 'none'}{more}",
        *(f"{key}: {value}" for key, value in document["evidence"].items() if _is_short(value)),
    ]
    return "\n".join(
        [
            "---",
            *(f"{key}: {json.dumps(value)}" for key, value in head.items()),  # JSON is YAML
            "---",
            f"# {repo_id}",
            "",
            "Removes attention artifacts (high-norm outlier tokens) from a Vision Transformer. "
            + ("Undone, it leaves" if document["type"] == "trained" else "It leaves")
            + " the weights of the model as they were.",
            "",
            *(f"- {fact}" for fact in facts),
            "",
            "```python",
            f"import vitreg; vitreg.load_fix({json.dumps(repo_id)}).apply(model)",
            "```",
            "",
        ]
    )


def _is_short(value: Any) -> bool:
    return isinstance(value, int | float | str) and len(str(value)) <= 200 and "\n" not in str(value)


def _hub_id(name: str | None) -> str | None:
    """The model's repository on the hub, where its name tells: `timm:` models lie under timm/."""
    scheme, _, rest = (name or "").partition(":")
    rest = rest.removeprefix("hf-hub:")
    found = f"timm/{rest}" if scheme == "timm" and "/" not in rest else rest
    return found if scheme in ("timm", "hf") and re.fullmatch(r"[\w.-]+/[\w.-]+", found) else None
