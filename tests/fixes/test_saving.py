"""A fix as a folder: what is saved comes back, damage is named, and the hub gets and gives the same files."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import pytest
import torch
from authors_models import Authors
from catalog import CATALOG, images, randomise
from checkpoints import into_cache
from safetensors.torch import load_file, save_file

import vitreg
from vitreg.errors import FixError, FixWarning, OutputError
from vitreg.fixes import TestTimeRegisters
from vitreg.fixes.attention_bias import AttentionBias
from vitreg.fixes.neurons import RegisterNeuron, RegisterNeurons
from vitreg.fixes.saving import load_fix, save_fix
from vitreg.models.fingerprint import Fingerprint

EVIDENCE = {"images": 96, "threshold": 41.5, "before": 0.02, "after": 0.0, "verdict": "helps"}


def backbone(name: str = "timm vit", seed: int = 0) -> vitreg.Backbone:
    return CATALOG[name].backbone(seed)


def found(vit: vitreg.Backbone | None = None, ranked: int = 3) -> RegisterNeurons:
    """Neurons as a search finds them, with every kind of evidence."""
    ranking = tuple(RegisterNeuron(i % 3, 7 * i % 128, 5.0 - i / 3, -4.1, 0.1, 0.9) for i in range(ranked))
    return RegisterNeurons(
        ranking[:2], ranking, "contrast", 1, 2, 41.5, 96, ((1, 0.5), (2, 0.01)), True,
        fingerprint=None if vit is None else Fingerprint.of(vit),
    )  # fmt: skip


def registers(neurons: dict[int, list[int]], **options: Any) -> TestTimeRegisters:
    return TestTimeRegisters(RegisterNeurons.of(neurons), **options)


def bias(neurons: RegisterNeurons | None = None, value: float = 1.0) -> AttentionBias:
    return AttentionBias(
        neurons or found(), {"keys": torch.full((3, 4, 8), value), "values": torch.rand(3, 4, 8)}
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Change the saved document in place."""
    document = json.loads((folder / "fix.json").read_text())
    change(document)
    (folder / "fix.json").write_text(json.dumps(document))
    return folder


def refusal(folder: str | Path, **options: Any) -> str:
    with pytest.raises(FixError) as caught:
        load_fix(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- what is saved comes back ------------------------------------------------------------------------


def test_a_fix_comes_back_with_its_config_and_evidence(tmp_path):
    vit = backbone()
    fix = TestTimeRegisters(
        found(vit), registers=2, share="split", initial="mean", scale=0.5, left="own", keep_prefix=True
    )
    folder = fix.save(tmp_path / "fix", evidence=EVIDENCE)
    loaded = load_fix(folder)
    assert loaded == fix
    assert loaded.neurons.ranking == fix.neurons.ranking
    assert loaded.neurons.fingerprint == fix.neurons.fingerprint
    assert names(folder) == ["fix.json"]
    assert json.loads((folder / "fix.json").read_text())["evidence"] == EVIDENCE


def test_the_document_says_what_made_it_and_for_which_model(tmp_path):
    vit = backbone()
    document = json.loads((TestTimeRegisters(found()).save(tmp_path / "a", vit=vit) / "fix.json").read_text())
    assert (document["format"], document["type"], document["vitreg"]) == (1, "registers", vitreg.__version__)
    fingerprint = document["fingerprint"]
    assert (fingerprint["depth"], fingerprint["width"], fingerprint["neurons"]) == (3, 32, 128)
    assert fingerprint["base_model"] == vit.name == "VisionTransformer"


def test_neurons_without_evidence_come_back(tmp_path):
    fix = registers({0: [3, 5], 2: [7]})
    assert load_fix(fix.save(tmp_path / "fix")) == fix


def test_tensors_come_back(tmp_path):
    fix = bias()
    folder = fix.save(tmp_path / "fix")
    assert load_fix(str(folder)) == fix
    assert names(folder) == ["fix.json", "fix.safetensors"]


def test_a_loaded_fix_does_what_the_saved_one_does(tmp_path):
    vit = backbone()
    fix = TestTimeRegisters(found(vit), registers=2, left="mean")
    loaded = load_fix(fix.save(tmp_path / "fix"))
    plain = vit(images(vit))
    with fix.applied_to(vit):
        expected = vit(images(vit))
    with loaded.applied_to(vit):
        assert torch.equal(vit(images(vit)), expected)
    assert not torch.allclose(plain, expected, atol=0.01)


def test_a_loaded_fix_is_the_one_that_is_applied_already(tmp_path):
    vit = backbone()
    fix = TestTimeRegisters(found(vit, ranked=200))
    loaded = load_fix(fix.save(tmp_path / "fix"))
    with fix.applied_to(vit), pytest.raises(FixError, match="already applied"):
        loaded.apply(vit)


def test_a_folder_has_a_few_kilobytes(tmp_path):
    fix = TestTimeRegisters(found(backbone(), ranked=256))
    folder = fix.save(tmp_path / "fix", evidence=EVIDENCE)
    assert (folder / "fix.json").stat().st_size < 8_000
    assert load_fix(folder).neurons.ranking == fix.neurons.ranking[:32]


def test_what_was_not_measured_is_left_out_of_the_evidence(tmp_path):
    evidence = {"attention": float("nan"), "norms": [1.0, float("inf")], "images": torch.tensor(3)}
    folder = registers({0: [3]}).save(tmp_path / "fix", evidence=evidence)
    assert json.loads((folder / "fix.json").read_text())["evidence"] == {"norms": [1.0, None], "images": 3}
    load_fix(folder)


@pytest.mark.parametrize(
    ("name", "saved"),
    [
        ("timm:vit_small.tag", "timm:vit_small.tag"),
        ("hf:facebook/dinov2-large", "hf:facebook/dinov2-large"),
        ("/home/somebody/secret/my-vit", "my-vit"),
        ("hf:{tmp}/my-vit", "my-vit"),
        ("timm:local-dir:{tmp}/my-vit", "my-vit"),
    ],
)
def test_where_a_local_model_lay_is_not_told(tmp_path, name, saved):
    (tmp_path / "my-vit").mkdir()
    vit = dataclasses.replace(backbone(), name=name.format(tmp=tmp_path))
    folder = registers({0: [3]}).save(tmp_path / "fix", vit=vit)
    assert load_fix(folder).neurons.fingerprint.base_model == saved


@pytest.mark.slow
def test_classes_are_imported_when_they_are_needed(tmp_path):
    """In a fresh process, by our own table."""
    folder = bias().save(tmp_path / "fix")
    code = f"import sys; from vitreg.fixes.saving import load_fix; print(load_fix({str(folder)!r}).type)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "bias\n"


# -- what cannot be saved ----------------------------------------------------------------------------


def test_a_fix_of_an_unknown_class_is_refused(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Mine(TestTimeRegisters):
        type: ClassVar[str] = "registers"

    with pytest.raises(FixError, match="a Mine cannot be saved: expected one of registers"):
        Mine(found()).save(tmp_path / "fix")
    assert names(tmp_path) == []


def test_what_json_cannot_hold_is_refused(tmp_path):
    fix, broken = registers({0: [3]}), registers({0: [3]})
    object.__setattr__(broken, "scale", float("nan"))  # past what the class itself refuses
    with pytest.raises(FixError, match="a set cannot be saved"):
        fix.save(tmp_path / "fix", evidence={"images": {1, 2}})
    with pytest.raises(FixError, match=r"scale=nan cannot be saved: expected a finite number"):
        broken.save(tmp_path / "fix")
    with pytest.raises(FixError, match=r"tensors\.keys of the fix holds NaN"):
        bias(value=float("nan")).save(tmp_path / "fix")
    assert names(tmp_path) == []


def test_a_fix_that_does_not_fit_its_model_is_refused(tmp_path):
    with pytest.raises(FixError, match="3 blocks of 128 neurons"):
        registers({3: [0]}).save(tmp_path / "fix", vit=backbone())


# -- whole or not at all -----------------------------------------------------------------------------


def test_saving_again_replaces_the_fix_and_keeps_the_rest(tmp_path):
    folder = tmp_path / "fix"
    bias().save(folder)
    (folder / "notes.txt").write_text("mine")
    second = registers({0: [3]})
    second.save(folder)
    assert load_fix(folder) == second
    assert names(folder) == ["fix.json", "notes.txt"]
    third = bias()
    third.save(folder)
    assert load_fix(folder) == third


def failing_at(monkeypatch: pytest.MonkeyPatch, name: str, times: int = 1) -> None:
    """The disk fails when a certain file is put in a place for the nth time."""
    replace, seen = os.replace, []

    def fail(source: Any, target: Any) -> None:
        seen.append(Path(target).name)
        if seen.count(name) == times:
            monkeypatch.setattr(os, "replace", replace)  # there is room to put the old one back
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)


@pytest.mark.parametrize("name", ["fix.json", "fix.safetensors"])
def test_a_full_disk_leaves_no_folder(tmp_path, monkeypatch, name):
    failing_at(monkeypatch, name)
    with pytest.raises(OutputError, match="No space left"):
        bias().save(tmp_path / "fix")
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["fix.json", "fix.safetensors"])
@pytest.mark.parametrize("times", [1, 2])  # while it is written, while it takes the old one's place
@pytest.mark.parametrize("before", ["bias", "registers"])
def test_a_full_disk_leaves_the_old_fix_whole(tmp_path, monkeypatch, name, times, before):
    old = {"bias": bias(), "registers": registers({0: [3]})}[before]
    folder = old.save(tmp_path / "fix")
    files = contents(folder)
    failing_at(monkeypatch, name, times)
    with pytest.raises(OutputError, match="No space left"):
        bias(value=2.0).save(folder)
    assert contents(folder) == files
    assert load_fix(folder) == old


def test_places_that_cannot_be_written_to(tmp_path):
    fix = registers({0: [3]})
    (tmp_path / "file").write_text("old")
    with pytest.raises(OutputError, match="file is a file, but expected a folder"):
        fix.save(tmp_path / "file")
    with pytest.raises(OutputError, match=r"there is no folder .*gone"):
        fix.save(tmp_path / "gone" / "fix")
    assert names(tmp_path) == ["file"]


def test_nothing_is_written_through_a_link(tmp_path):
    """A hub's cache is made of links: to save over one would change what other revisions share."""
    folder = registers({0: [3]}).save(tmp_path / "fix")
    blob = (folder / "fix.json").rename(tmp_path / "blob")
    (folder / "fix.json").symlink_to(blob)
    before = blob.read_bytes()
    with pytest.raises(OutputError, match=r"fix\.json is a link"):
        registers({0: [5]}).save(folder)
    assert blob.read_bytes() == before


# -- damage is named ---------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    return TestTimeRegisters(found(backbone())).save(tmp_path / "fix", evidence=EVIDENCE)


@pytest.fixture
def with_tensors(tmp_path) -> Path:
    return bias().save(tmp_path / "bias")


def first_neuron(document: dict[str, Any]) -> dict[str, Any]:
    return document["neurons"]["chosen"][0]


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no format": (lambda d: d.pop("format"), "no format number"),
    "later format": (lambda d: d.update(format=2), "format 2, but .* reads up to 1. Upgrade it: pip install"),
    "format 0": (lambda d: d.update(format=0), "format 0, which never was"),
    "format as text": (lambda d: d.update(format="1"), "format: expected int, found '1'"),
    "format as truth": (lambda d: d.update(format=True), "format: expected int, found True"),
    "unknown type": (lambda d: d.update(type="os.system"), "type 'os.system'; expected one of registers"),
    "type of another kind": (lambda d: d.update(type=["registers"]), "expected one of registers"),
    "no type": (lambda d: d.pop("type"), "type 'None'; expected one of"),
    "no config": (lambda d: d.pop("config"), "config: expected dict, found None"),
    "text for a number": (lambda d: d["config"].update(registers="4"), "config: registers: expected int"),
    "truth for a number": (lambda d: d["config"].update(registers=True), "expected int, found True"),
    "number for truth": (lambda d: d["config"].update(keep_prefix=1), "keep_prefix: expected bool, found 1"),
    "none of the choices": (lambda d: d["config"].update(share="all"), "share: expected Literal"),
    "choice of another kind": (lambda d: d["config"].update(share=["copy"]), "share: expected Literal"),
    "no neurons": (lambda d: d.pop("neurons"), "neurons: expected dict, found None"),
    "none chosen": (lambda d: d["neurons"].pop("chosen"), "'chosen' is missing"),
    "neurons as mapping": (lambda d: d["neurons"].update(chosen={"0": [3]}), "chosen: expected list"),
    "negative neuron": (lambda d: first_neuron(d).update(index=-1), "block 0, neuron -1: expected numbers"),
    "negative block": (lambda d: first_neuron(d).update(layer=-2), "block -2, neuron 0: expected numbers"),
    "half a neuron": (lambda d: first_neuron(d).update(index=1.5), "index: expected int, found 1.5"),
    "no block": (lambda d: first_neuron(d).pop("layer"), r"chosen\[0\]: 'layer' is missing"),
    "twice": (lambda d: d["neurons"]["chosen"].append(first_neuron(d)), "block 0, neuron 0 is there 2 times"),
    "pair of one": (lambda d: d["neurons"].update(search=[[1]]), r"search\[0\]: expected 2 values, found 1"),
    "huge": (lambda d: first_neuron(d).update(score="x" * 10_000), r"expected float, found str 'xx.*\.\.\."),
    "no blocks": (lambda d: d["fingerprint"].pop("depth"), "fingerprint: 'depth' is missing"),
    "tensors missing": (lambda d: d.update(tensors="0" * 64), r"there is no file .*fix\.safetensors"),
    "escape": (lambda d: d.update(tensors="../../secret.safetensors"), r"the SHA-256 .* found '\.\./\.\./"),
    "escape by a mapping": (lambda d: d.update(tensors={"file": "/etc/passwd"}), r"expected str \| None"),
    "evidence": (lambda d: d.update(evidence=[1]), r"evidence: expected dict.*found \[1\]"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_document_is_refused_by_name(folder, kind):
    change, message = DAMAGE[kind]
    text = refusal(edit(folder, change))
    assert text.startswith((f"{folder}", "there is no file"))
    assert re.search(message, text)
    assert len(text) < 400


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not valid JSON"),
        (b'{"format": 1', "is not valid JSON"),
        (b"\xff\xfe\x00", "is not valid JSON"),
        (b'{"format": NaN}', "NaN is not a number in JSON"),
        (b'{"format": -Infinity}', "-Infinity is not a number in JSON"),
        (b'{"format": 1' + b"0" * 5000 + b"}", "is not valid JSON"),
        (b"[" * 200_000, "is not valid JSON"),
        (b"[1]", "is not a fix of vitreg"),
        (b'"format"', "is not a fix of vitreg"),
    ],
)
def test_what_is_no_document_is_refused(folder, data, message):
    (folder / "fix.json").write_bytes(data)
    assert message in refusal(folder)


def test_infinity_written_as_a_large_number_is_refused(folder):
    text = (folder / "fix.json").read_text().replace('"scale": 1.0', '"scale": 1e999')
    (folder / "fix.json").write_text(text)
    assert "config: scale: expected float, found inf" in refusal(folder)


def test_a_value_that_the_class_refuses_is_refused_with_its_reason(folder):
    def split(document: dict[str, Any]) -> None:
        document.update(type="splitting", config={"capacity": 2.0})

    assert "describes no valid 'splitting' fix: capacity=2.0" in refusal(edit(folder, split))


def test_unknown_keys_are_warned_about_and_skipped(folder):
    expected = load_fix(folder)

    def add(document: dict[str, Any]) -> None:
        document["licence"] = "CC0"
        document["config"]["warmth"] = 3
        document["neurons"]["chosen"][0]["colour"] = "red"

    with pytest.warns(FixWarning) as warned:
        loaded = load_fix(edit(folder, add))
    assert loaded == expected
    text = "\n".join(str(warning.message) for warning in warned)
    for place, key in (
        ("fix.json", "licence"),
        ("fix.json: config", "warmth"),
        (r"chosen[0]", "colour"),
    ):
        assert f"{place}: {key!r} is not known to this version of vitreg" in text


def test_missing_settings_are_the_defaults(folder):
    assert load_fix(edit(folder, lambda document: document["config"].clear())) == load_fix(folder)


def test_no_folder_and_no_document(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "there is no file" in refusal(tmp_path / "empty")
    assert "Expected a folder that Fix.save wrote" in refusal(tmp_path / "empty")
    (tmp_path / "empty" / "fix.json").mkdir()
    assert "there is no file" in refusal(tmp_path / "empty")


def test_a_file_in_place_of_its_folder(folder):
    assert "is a file; expected the folder that it lies in" in refusal(folder / "fix.json")


def test_a_document_that_cannot_be_read(folder, monkeypatch):
    def deny(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("vitreg.fixes.saving.open", deny, raising=False)
    assert "Permission denied. See to its permissions" in refusal(folder)


def test_a_link_to_a_device_is_not_read(folder):
    (folder / "fix.json").unlink()
    (folder / "fix.json").symlink_to("/dev/zero")
    assert "there is no file" in refusal(folder)


@pytest.mark.parametrize(("name", "most"), [("fix.json", 8 << 20), ("fix.safetensors", 256 << 20)])
def test_a_huge_file_is_not_read_whole(with_tensors, name, most):
    with open(with_tensors / name, "r+b") as file:
        file.truncate(most + 1)
    assert f"{name} has {most + 1:,} bytes, but a fix has a few thousand, and at most" in refusal(
        with_tensors
    )


# -- tensors -----------------------------------------------------------------------------------------


def resave(folder: Path, tensors: dict[str, torch.Tensor] | bytes) -> Path:
    """Replace the tensors and their hash."""
    import hashlib

    path = folder / "fix.safetensors"
    path.write_bytes(tensors) if isinstance(tensors, bytes) else save_file(tensors, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return edit(folder, lambda document: document.update(tensors=digest))


def test_truncated_tensors(with_tensors):
    path = with_tensors / "fix.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "is not the file that fix.json beside it was saved with: it is cut off" in refusal(with_tensors)


def test_tensors_of_another_fix(with_tensors, tmp_path):
    other = bias(value=2.0).save(tmp_path / "other")
    shutil.copy(other / "fix.safetensors", with_tensors)
    assert "or belongs to another fix" in refusal(with_tensors)


def test_tensors_that_are_none(with_tensors):
    assert "holds no tensors" in refusal(resave(with_tensors, b"\x80\x04pickled"))


def test_tensors_with_nan(with_tensors):
    tensors = load_file(with_tensors / "fix.safetensors")
    tensors["tensors.keys"][1, 2, 3] = float("nan")
    assert "fix.safetensors: tensors.keys holds NaN" in refusal(resave(with_tensors, tensors))


def test_tensors_that_nobody_asked_for(with_tensors):
    tensors = load_file(with_tensors / "fix.safetensors")
    expected = load_fix(with_tensors)
    resave(with_tensors, tensors | {"../../escape": torch.ones(1), "tensorskeys": torch.ones(1)})
    with pytest.warns(FixWarning, match=r"'\.\./\.\./escape', 'tensorskeys' is not known"):
        assert load_fix(with_tensors) == expected


def test_tensors_of_another_shape_are_refused_by_the_class(with_tensors):
    vit = backbone()
    fix = load_fix(resave(with_tensors, {"tensors.keys": torch.ones(2), "tensors.values": torch.ones(2)}))
    with pytest.raises(FixError, match="expected keys and values of 3 blocks"):
        fix.apply(vit)


def test_leftover_tensors_are_not_read(folder):
    """What a crash may leave: the document, which comes last, says whether there are tensors."""
    (folder / "fix.safetensors").write_bytes(b"rubbish")
    load_fix(folder)


# -- the model that a fix is for ---------------------------------------------------------------------


def test_another_geometry_is_an_error_that_states_both():
    fix = TestTimeRegisters(found(backbone()))
    other = backbone("timm eva02")
    with pytest.raises(
        FixError, match=r"3 blocks of width 32 with 128 neurons .*has 3 blocks of width 32 with 85"
    ):
        fix.apply(other)


@pytest.mark.parametrize(("change", "value"), [("depth", 4), ("width", 33), ("neurons", 127)])
def test_each_part_of_the_geometry_counts(change, value):
    vit = backbone()
    other = dataclasses.replace(Fingerprint.of(vit), **{change: value})
    fix = TestTimeRegisters(dataclasses.replace(found(vit), fingerprint=other))
    with pytest.raises(
        FixError, match=f"{value}.*, but this model has 3 blocks of width 32 with 128 neurons"
    ):
        fix.apply(vit)


def test_other_weights_are_a_warning_and_no_more():
    fix = TestTimeRegisters(found(backbone()))
    other = backbone(seed=1)
    plain = other(images(other))
    with pytest.warns(FixWarning, match=r"made for other weights \(VisionTransformer\): expected hash"):
        handle = fix.apply(other)
    assert not torch.equal(other(images(other)), plain)
    handle.undo()


def test_the_hash_sees_one_training_step_in_any_block():
    vit = backbone()
    before = Fingerprint.of(vit).weights
    assert len(before) == 16
    for layer, linear in enumerate(vit.anatomy.down_projections(vit.model)):
        saved = linear.weight.detach().clone()
        with torch.no_grad():
            linear.weight += 1e-3 * torch.randn_like(saved).sign()  # as Adam would
        assert Fingerprint.of(vit).weights != before, layer
        with torch.no_grad():
            linear.weight.copy_(saved)
    assert Fingerprint.of(vit).weights == before


@pytest.mark.parametrize("path", [["bfloat16"], ["float16"], ["float16", "bfloat16"], ["float64"]])
def test_the_hash_is_the_same_in_any_precision(path):
    vit = backbone()
    before = Fingerprint.of(vit)
    for dtype in path:
        vit.model.to(getattr(torch, dtype))
    assert Fingerprint.of(vit) == before


# -- the hub -----------------------------------------------------------------------------------------


def test_a_repository_is_read_from_the_cache(tmp_path):
    fix = bias()
    into_cache(fix.save(tmp_path / "fix"), "vitreg-tests/a-fix")
    assert load_fix("vitreg-tests/a-fix") == fix


def test_a_cache_of_links_is_read(tmp_path):
    """As the hub's client lays it out: files are links to blobs outside of the snapshot's folder."""
    fix = bias()
    folder = fix.save(tmp_path / "fix")
    (tmp_path / "blobs").mkdir()
    for path in list(folder.iterdir()):
        blob = path.rename(tmp_path / "blobs" / path.name)
        path.symlink_to(blob)
    assert load_fix(folder) == fix


def test_a_revision_is_the_one_that_is_read(tmp_path):
    into_cache(bias().save(tmp_path / "fix"), "vitreg-tests/revisions")
    home = Path(os.environ["HF_HUB_CACHE"]) / "models--vitreg-tests--revisions"
    second = registers({0: [3]})
    second.save(home / "snapshots" / "def456")
    (home / "refs" / "v2").write_text("def456")
    assert load_fix("vitreg-tests/revisions", revision="v2") == second
    assert load_fix("vitreg-tests/revisions").type == "bias"
    assert "(revision 'v3')" in refusal("vitreg-tests/revisions", revision="v3")


def test_a_local_folder_wins(tmp_path, monkeypatch):
    into_cache(bias().save(tmp_path / "fix"), "vitreg-tests/both")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vitreg-tests").mkdir()
    local = registers({0: [3]})
    local.save("vitreg-tests/both")
    assert load_fix("vitreg-tests/both") == local
    assert "is a local folder, which has no revision 'main'" in refusal("vitreg-tests/both", revision="main")


@pytest.mark.parametrize(
    "source", ["nobody/nothing", "no such place", "../up", "a/b/c", "/absent/folder", "~nobody/x", "x" * 5000]
)
def test_what_is_neither_folder_nor_repository(source):
    text = refusal(source)
    assert (
        f"no fix at {source!r}: there is no such folder, and it could not be downloaded from the hub" in text
    )
    assert "Check the name and the network" in text


def test_only_the_two_files_are_fetched(monkeypatch, tmp_path):
    folder = bias().save(tmp_path / "fix")
    asked: dict[str, Any] = {}

    def fetch(repo_id: str, **options: Any) -> str:
        asked.update(options, repo_id=repo_id)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    load_fix("somebody/repo", revision="v1")
    assert asked == {
        "repo_id": "somebody/repo",
        "revision": "v1",
        "allow_patterns": ["fix.json", "fix.safetensors"],
    }


class StandIn:
    """What HfApi would do, in memory."""

    made: ClassVar[list[Any]] = []
    files: ClassVar[dict[str, bytes]] = {}

    def __init__(self, token: str | None = None) -> None:
        StandIn.made = [("token", token)]

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        self.made.append(("create", repo_id, private, exist_ok))

    def upload_folder(
        self, *, repo_id: str, folder_path: Path, commit_message: str, delete_patterns: str
    ) -> str:
        self.made.append(("upload", repo_id, commit_message, delete_patterns))
        StandIn.files = contents(Path(folder_path))
        return f"https://huggingface.co/{repo_id}/commit/1"


def test_a_fix_is_pushed_with_a_card(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub, "HfApi", StandIn)
    vit = dataclasses.replace(backbone(), name="timm:vit_small_patch16_224.tag")
    fix = bias(found(vit))
    address = fix.push_to_hub(
        "me/a-fix", evidence=EVIDENCE, token="t", private=True, commit_message="Better now"
    )
    assert address == "https://huggingface.co/me/a-fix/commit/1"
    assert StandIn.made == [
        ("token", "t"),
        ("create", "me/a-fix", True, True),
        ("upload", "me/a-fix", "Better now", "fix.safetensors"),
    ]
    assert sorted(StandIn.files) == ["README.md", "fix.json", "fix.safetensors"]
    fetched = tmp_path / "fetched"
    fetched.mkdir()
    for name, data in StandIn.files.items():
        (fetched / name).write_bytes(data)
    assert load_fix(fetched) == fix
    card = StandIn.files["README.md"].decode()
    metadata = huggingface_hub.ModelCard(card).data
    assert metadata.base_model == "timm/vit_small_patch16_224.tag"
    assert metadata.library_name == "vitreg"
    assert 'vitreg.load_fix("me/a-fix").apply(model)' in card
    assert "- Neurons (block:index, from 0): 0:0, 1:7" in card
    assert "- verdict: helps" in card


def test_the_card_of_a_model_without_a_repository_names_no_base(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", StandIn)
    registers({0: [3]}).push_to_hub("me/a-fix")
    assert huggingface_hub.ModelCard(StandIn.files["README.md"].decode()).data.base_model is None
    assert sorted(StandIn.files) == ["README.md", "fix.json"]


def test_a_hub_that_refuses_is_one_line():
    """Offline, as all tests are."""
    with pytest.raises(
        OutputError, match=r"cannot push to 'me/a-fix' on the hub \(.*\)\. Check the name"
    ) as e:
        registers({0: [3]}).push_to_hub("me/a-fix")
    assert "\n" not in str(e.value)


def test_save_fix_is_what_the_method_calls(tmp_path):
    fix = registers({0: [3]})
    one = save_fix(fix, tmp_path / "one", evidence=EVIDENCE)
    other = fix.save(tmp_path / "other", evidence=EVIDENCE)
    assert contents(one) == contents(other)


def test_a_fix_knows_the_size_it_was_made_for(tmp_path):
    """A bare model whose size nothing names, 32x40 pixels: no configuration, and not the usual 224."""
    model = randomise(Authors()).eval()
    del model.image_size
    vit = vitreg.wrap(model, image_size=(32, 40))
    neurons = dataclasses.replace(RegisterNeurons.of({1: [3]}), fingerprint=Fingerprint.of(vit))
    TestTimeRegisters(neurons).save(tmp_path / "fix")
    batch = torch.randn(2, 3, 32, 40)
    with torch.no_grad(), TestTimeRegisters(neurons).applied_to(vit):
        expected = vit(batch)
    with torch.no_grad(), load_fix(tmp_path / "fix").applied_to(model):
        assert torch.equal(model(batch), expected)
    with pytest.raises(vitreg.UnsupportedModelError, match="a matching size"):
        TestTimeRegisters({1: [3]}).apply(model)
