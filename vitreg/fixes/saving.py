"""A fix as a folder of a few KB, on disk or on the Hugging Face hub.

    fix.save("dinov2-l-fix/", vit=vit, evidence=verdict.to_json())
    load_fix("dinov2-l-fix/").apply(model)           # or a hub id, "user/repo"

The folder holds `fix.json` (format, type, config, neurons with their evidence, the fingerprint of the model)
and, for fixes with tensors, `fix.safetensors`, whose SHA-256 stands in `fix.json`, so that two fixes cannot
be mixed up. Nothing is pickled, and neither a class nor a file is ever looked up by a name that was read.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from torch import Tensor

from vitreg.config.codec import decode, encode, fields_of, warn_of_unknown
from vitreg.errors import FixError, OutputError
from vitreg.files import already_there, check_writable, write_atomically
from vitreg.fixes.base import Fix
from vitreg.fixes.neurons import RegisterNeurons
from vitreg.models.backbone import Backbone
from vitreg.models.fingerprint import Fingerprint
from vitreg.models.names import LIBRARIES
from vitreg.version import __version__

FORMAT = 1
DOCUMENT, TENSORS = "fix.json", "fix.safetensors"

_CLASSES = {
    "registers": ("vitreg.fixes.registers", "TestTimeRegisters"),
    "splitting": ("vitreg.fixes.splitting", "TokenSplitting"),
    "bias": ("vitreg.fixes.attention_bias", "AttentionBias"),
    "shift-average": ("vitreg.fixes.shift_average", "ShiftAverage"),
    "positions": ("vitreg.fixes.position_repair", "PositionRepair"),
    "inpainting": ("vitreg.fixes.inpainting", "Inpainting"),
    "projection": ("vitreg.fixes.projection", "Projection"),
    "trained": ("vitreg.fixes.trained", "TrainedRegisters"),
}
_KEYS = dict.fromkeys(("format", "vitreg", "type", "config", "neurons", "fingerprint", "tensors", "evidence"))
_AGAIN = "The file is damaged or was edited; save or download it again."
# What a fix of the largest models needs, and much more.
_MOST_BYTES = {DOCUMENT: 8 << 20, TENSORS: 256 << 20}
# Of the neurons that were not chosen, the best are kept.
_RANKED = 32


# -- saving ----------------------------------------------------------------------------------------


def save_fix(
    fix: Fix,
    folder: str | Path,
    *,
    vit: Backbone | None = None,
    evidence: Mapping[str, Any] | None = None,
) -> Path:
    """Write a fix to a folder, whole or not at all; returns the folder.

    A fix that is there is replaced, and other files stay. `vit` is the model that the fix was made for, where
    its neurons were given and not found; `evidence` what was measured (images, threshold, outlier rates,
    verdict), plain numbers and text. Raises OutputError where nothing can be written, FixError for what has
    no place in JSON and for a fix that does not fit `vit`.
    """
    target = Path(folder)
    _write_folder(target, _contents(fix, vit, evidence or {}))
    return target


def _contents(fix: Fix, vit: Backbone | None, evidence: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of the folder; the document comes last, for it makes the others count."""
    if _CLASSES.get(fix.type) != (type(fix).__module__, type(fix).__name__):
        raise FixError(f"a {type(fix).__name__} cannot be saved: expected one of {', '.join(_CLASSES)}.")
    if vit is not None:
        fix.check(vit)
    fingerprint = fix.made_for(vit)
    tensors = _tensors_of(fix)
    files = {TENSORS: _to_safetensors(tensors)} if tensors else {}
    if tensors and len(files[TENSORS]) > _MOST_BYTES[TENSORS]:
        raise FixError(
            f"the fix has {len(files[TENSORS]):,} bytes of tensors; expected at most"
            f" {_MOST_BYTES[TENSORS]:,}. So much is a model of its own: save that."
        )
    document = {
        "format": FORMAT,
        "vitreg": __version__,
        "type": fix.type,
        "config": _config_of(fix),
        "neurons": _neurons_of(fix.neurons),
        "fingerprint": None if fingerprint is None else encode(_without_place(fingerprint)),
        "tensors": hashlib.sha256(files[TENSORS]).hexdigest() if tensors else None,
        "evidence": encode(evidence),
    }
    lines = [f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in document.items()]
    return files | {DOCUMENT: ("{\n" + ",\n".join(lines) + "\n}\n").encode()}


def _config_of(fix: Fix) -> dict[str, Any]:
    simple = [f.name for f in fields(fix) if f.name not in ("neurons", *_tensor_fields(type(fix)))]
    config: dict[str, Any] = encode({name: getattr(fix, name) for name in simple})
    if lost := [name for name in simple if name not in config]:
        raise FixError(f"{lost[0]}={getattr(fix, lost[0])} cannot be saved: expected a finite number.")
    return config


def _neurons_of(neurons: RegisterNeurons) -> dict[str, Any]:
    kept = replace(neurons, ranking=neurons.ranking[: max(_RANKED, neurons.top_k)], fingerprint=None)
    document: dict[str, Any] = encode(kept)
    del document["fingerprint"]  # it has a place of its own
    return document


def _without_place(fingerprint: Fingerprint) -> Fingerprint:
    """Of a model that came from a folder, only the folder's own name: where it lay is nobody's business."""
    name = fingerprint.base_model or ""
    scheme, _, rest = name.partition(":")
    if scheme in LIBRARIES and not os.path.exists(rest.removeprefix("local-dir:")):
        return fingerprint
    return replace(fingerprint, base_model=Path(name).name or None)


def _write_folder(target: Path, files: dict[str, bytes]) -> None:
    """Write all files elsewhere first; what is left to do is renaming, which needs no space on the disk."""
    new = not os.path.exists(target)
    check_target(target)
    partial = (target.parent if new else target) / f".vitreg-{secrets.token_hex(8)}.tmp"
    try:
        partial.mkdir()
        for name, data in files.items():
            write_atomically(partial / name, data)
        if new:
            os.rename(partial, target)
        else:
            _swap(partial, target)
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror}. Choose another place.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_target(target: Path, *, overwrite: bool = True) -> None:
    """Raise the OutputError that save_fix would raise now, so that no work is lost. Changes nothing.

    Without `overwrite`, a fix that is there is one, too.
    """
    if not overwrite and any(os.path.lexists(target / name) for name in (DOCUMENT, TENSORS)):
        raise already_there(target)
    if os.path.exists(target):
        _check_replaceable(target)
    else:
        check_writable(target)


def _check_replaceable(target: Path) -> None:
    if not target.is_dir():
        raise OutputError(f"{target} is a file, but expected a folder, or a name for a new one.")
    for path in (target / DOCUMENT, target / TENSORS):
        if path.is_symlink():
            raise OutputError(
                f"{path} is a link (a hub's cache?), and not ours to replace. Choose another folder."
            )
        check_writable(path)


def _swap(partial: Path, target: Path) -> None:
    """Put new files in the place of old ones. A crash in between is told by the hash when they are loaded."""
    new, tensors, before = partial / TENSORS, target / TENSORS, partial / "before"
    if not new.exists():
        os.replace(partial / DOCUMENT, target / DOCUMENT)
        tensors.unlink(missing_ok=True)
        return
    if had := tensors.exists():
        os.replace(tensors, before)
    try:
        os.replace(new, tensors)
        os.replace(partial / DOCUMENT, target / DOCUMENT)
    except BaseException:
        os.replace(before, tensors) if had else tensors.unlink(missing_ok=True)
        raise


# -- loading ---------------------------------------------------------------------------------------


def load_fix(source: str | Path, *, revision: str | None = None) -> Fix:
    """The fix in a folder, or in a repository ("user/repo") of the Hugging Face hub.

    A local folder wins over a hub id. `revision` is a branch, tag or commit of the repository. Raises
    FixError for what is missing, damaged, or of a later format; warns (FixWarning) about unknown keys.
    """
    folder = Path(os.path.expanduser(source))
    if os.path.isfile(folder):
        raise FixError(f"{folder} is a file; expected the folder that it lies in, or a hub id.")
    if not os.path.isdir(folder):
        from vitreg.fixes.hub import download

        return _read(download(source, revision))
    if revision is not None:
        raise FixError(f"{folder} is a local folder, which has no revision {revision!r}. Leave it out.")
    return _read(folder)


def _read(folder: Path) -> Fix:
    path = folder / DOCUMENT
    document = _parse(path)
    warn_of_unknown(document, _KEYS, str(path))
    cls = _class_of(document, path)
    tensor_fields = _tensor_fields(cls)
    arguments = fields_of(
        cls, document.get("config"), f"{path}: config", leave_out=("neurons", *tensor_fields)
    )
    arguments["neurons"] = _neurons_from(document, path)
    decode(dict[str, Any], document.get("evidence", {}), f"{path}: evidence")
    arguments |= _grouped(_load_tensors(folder, document), tensor_fields, folder / TENSORS)
    try:
        return cls(**arguments)
    except (FixError, TypeError, ValueError) as error:
        raise FixError(f"{path} describes no valid {document['type']!r} fix: {error}") from error


def _parse(path: Path) -> dict[str, Any]:
    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name} is not a number in JSON")

    data = _bytes(path, "Expected a folder that Fix.save wrote.")
    try:
        document = json.loads(data, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise FixError(
            f"{path} is not valid JSON ({error}). It is damaged; save or download it again."
        ) from error
    if not isinstance(document, dict) or "format" not in document:
        raise FixError(f"{path} is not a fix of vitreg: it has no format number. Give the folder of one.")
    return document


def _class_of(document: dict[str, Any], path: Path) -> type[Fix]:
    number: int = decode(int, document["format"], f"{path}: format")
    if number > FORMAT:
        raise FixError(
            f"{path} has format {number}, but this version of vitreg reads up to {FORMAT}. Upgrade it:"
            " pip install --upgrade vitreg"
        )
    if number < 1:
        raise FixError(f"{path} has format {number}, which never was one. Save or download it again.")
    kind = document.get("type")
    if not isinstance(kind, str) or kind not in _CLASSES:
        raise FixError(f"{path} has type {str(kind)[:40]!r}; expected one of {', '.join(_CLASSES)}.")
    module, name = _CLASSES[kind]
    cls: type[Fix] = getattr(import_module(module), name)
    return cls


def _neurons_from(document: dict[str, Any], path: Path) -> RegisterNeurons:
    where = f"{path}: neurons"
    arguments = fields_of(RegisterNeurons, document.get("neurons"), where, leave_out=("fingerprint",))
    fingerprint: Fingerprint | None = decode(
        Fingerprint | None, document.get("fingerprint"), f"{path}: fingerprint"
    )
    neurons = RegisterNeurons(**arguments, fingerprint=fingerprint)
    times = Counter((neuron.layer, neuron.index) for neuron in neurons.chosen)
    for (layer, index), count in times.items():
        if min(layer, index) < 0:
            raise FixError(f"{where}: block {layer}, neuron {index}: expected numbers from 0. {_AGAIN}")
        if count > 1:
            raise FixError(f"{where}: block {layer}, neuron {index} is there {count} times. {_AGAIN}")
    return neurons


def _bytes(path: Path, advice: str) -> bytes:
    """A whole file, no larger than a fix can be. Links, which a hub's cache is made of, are followed."""
    most = _MOST_BYTES[path.name]
    try:
        if not path.is_file():
            raise FixError(f"there is no file {path}. {advice}")
        with open(path, "rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise FixError(f"cannot read {path}: {error.strerror}. See to its permissions.") from error
    if len(data) > most:
        raise FixError(
            f"{path} has {path.stat().st_size:,} bytes, but a fix has a few thousand, and at most {most:,}."
            " This is something else; save or download the fix again."
        )
    return data


# -- tensors ---------------------------------------------------------------------------------------


def _tensor_fields(cls: type[Fix]) -> dict[str, bool]:
    """The fields that hold tensors, {name: whether it is a dictionary of them}."""
    found = {}
    for name, hint in get_type_hints(cls).items():
        grouped = get_origin(hint) in (dict, Mapping) and get_args(hint)[1] is Tensor
        if hint is Tensor or grouped:
            found[name] = grouped
    return found


def _tensors_of(fix: Fix) -> dict[str, Tensor]:
    """All tensors of a fix by name: `field`, or `field.key` for those in a dictionary."""
    tensors: dict[str, Tensor] = {}
    for name, grouped in _tensor_fields(type(fix)).items():
        value = getattr(fix, name)
        tensors |= {f"{name}.{key}": tensor for key, tensor in value.items()} if grouped else {name: value}
    for name, tensor in tensors.items():
        _refuse_non_finite(tensor, f"{name} of the fix", "It cannot be saved; make the fix again.")
    return tensors


def _grouped(tensors: dict[str, Tensor], expected: dict[str, bool], path: Path) -> dict[str, Any]:
    """The tensors as arguments of the class: the reverse of `_tensors_of`."""
    arguments: dict[str, Any] = {name: {} for name, grouped in expected.items() if grouped}
    unknown = {}
    for name, tensor in tensors.items():
        field, _, key = name.partition(".")
        if key and expected.get(field):
            arguments[field][key] = tensor
        elif expected.get(name) is False:
            arguments[name] = tensor
        else:
            unknown[name] = tensor
    warn_of_unknown(unknown, {}, str(path))
    return arguments


def _to_safetensors(tensors: dict[str, Tensor]) -> bytes:
    from safetensors.torch import save

    data: bytes = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    return data


def _load_tensors(folder: Path, document: dict[str, Any]) -> dict[str, Tensor]:
    expected: str | None = decode(str | None, document.get("tensors"), f"{folder / DOCUMENT}: tensors")
    if expected is None:
        return {}
    if not re.fullmatch(r"[0-9a-f]{64}", expected):
        raise FixError(
            f"{folder / DOCUMENT}: tensors: expected the SHA-256 of {TENSORS} beside it, found"
            f" {expected[:80]!r}. {_AGAIN}"
        )
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = folder / TENSORS
    data = _bytes(path, f"{DOCUMENT} needs it; save or download the fix again.")
    if hashlib.sha256(data).hexdigest() != expected:
        raise FixError(
            f"{path} ({len(data):,} bytes) is not the file that {DOCUMENT} beside it was saved with: it is"
            " cut off, or belongs to another fix. Save or download the fix again."
        )
    try:
        tensors: dict[str, Tensor] = dict(sorted(load(data).items()))  # safetensors gives them in any order
    except (SafetensorError, ValueError, KeyError) as error:
        raise FixError(f"{path} holds no tensors ({error}). Save or download the fix again.") from error
    for name, tensor in tensors.items():
        _refuse_non_finite(tensor, f"{path}: {name}", "Save or download the fix again.")
    return tensors


def _refuse_non_finite(tensor: Tensor, what: str, advice: str) -> None:
    if not tensor.double().isfinite().all():
        raise FixError(f"{what} holds NaN or infinity. {advice}")
