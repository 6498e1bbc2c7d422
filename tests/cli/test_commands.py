"""The command line: results on stdout, one line and exit code 1 for our own errors, nothing half-written."""

import json
import logging
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import PIL.Image
import pytest
import torch
import transformers
import typer
from checkpoints import tiny_timm
from command_line import fails
from phantoms import crops
from safetensors.torch import load_file, save_file
from timm.models._hub import save_for_hf

import vitreg
from vitreg.cli.main import app

EXPECTED_KEYS = {
    "model", "images", "failed_images", "grid", "prefix_tokens", "verdict", "reason", "threshold",
    "detect_layer", "onset_layer", "outlier_fraction", "outliers_per_image", "attention_to_outliers",
    "position_frequency", "neighbour_similarity", "layers", "versions",
}  # fmt: skip
LAYER_KEYS = {"layer", "median_norm", "p99_norm", "max_norm", "outlier_fraction", "attention_to_outliers"}


# -- what it does ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_diagnose_prints_and_writes_json_and_report(run, model, photos, tmp_path):
    (photos / "broken.jpg").write_bytes(b"not an image")
    code, out, _ = run(
        "diagnose", model, photos, "--json", tmp_path / "d.json", "--report", tmp_path / "r.html"
    )
    assert code == 0
    assert out.startswith(f"No artifacts: {model.name}\n")
    assert "broken.jpg" in out
    found = json.loads((tmp_path / "d.json").read_text())
    assert found.keys() >= EXPECTED_KEYS
    assert all(layer.keys() >= LAYER_KEYS for layer in found["layers"])
    assert (found["images"], found["verdict"], found["grid"]) == (3, "no artifacts", [4, 4])
    assert [Path(failed["path"]).name for failed in found["failed_images"]] == ["broken.jpg"]
    assert "broken.jpg" in (tmp_path / "r.html").read_text()


def test_options_reach_the_run(run, model, photos, tmp_path):
    options = ("--size", 48, "--limit", 2, "--batch-size", 1, "--dtype", "bfloat16", "--device", "cpu")
    code, _, _ = run("diagnose", model, photos, *options, "--json", tmp_path / "d.json")
    found = json.loads((tmp_path / "d.json").read_text())
    assert (code, found["images"], found["grid"]) == (0, 2, [6, 6])


def test_several_models_are_compared(run, model, photos, tmp_path):
    code, out, _ = run(
        "diagnose", model, model, photos, "--json", tmp_path / "d.json", "--report", tmp_path / "r.html"
    )
    assert code == 0
    assert out.count("no artifacts") == 2
    found = json.loads((tmp_path / "d.json").read_text())["models"]
    assert [entry["label"] for entry in found] == [str(model)] * 2
    assert found[0].keys() >= EXPECTED_KEYS
    assert (tmp_path / "r.html").exists()


def test_random_weights_without_a_download(run, photos):
    code, out, _ = run("diagnose", "timm:vit_tiny_patch16_224", photos, "--random-weights", "--limit", 1)
    assert code == 0
    assert out.startswith("No artifacts: timm:vit_tiny_patch16_224\n")


def test_version_and_usage(run):
    assert run("--version")[:2] == (0, "vitreg 0.1.0\n")
    assert run("diagnose", "only-a-model")[0] == 2
    assert run("diagnose", "a", "b", "--batch-size", "0")[0] == 2


@pytest.mark.slow
def test_as_a_process(model, photos):
    command = [sys.executable, "-m", "vitreg", "diagnose", str(model), str(photos / "nowhere")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    fails((ended.returncode, ended.stdout, ended.stderr), "nowhere")


# -- bad input ---------------------------------------------------------------------------------------


def test_unknown_model(run, photos):
    fails(run("diagnose", "timm:vit_tiny_patch16_24", photos), "no model", "Did you mean")


def test_what_libraries_log_does_not_bury_the_message(run, photos, monkeypatch):
    def unreachable(*args: object, **kwargs: object) -> None:
        logging.getLogger("huggingface_hub").warning("Retrying in 1s [Retry 1/5].")
        logging.getLogger().error("Failed to download")
        raise OSError("We couldn't connect to the hub")

    monkeypatch.setattr("timm.create_model", unreachable)
    logging.basicConfig(force=True)  # as a library does that logs through the root
    fails(run("diagnose", "timm:vit_tiny_patch16_224", photos), "couldn't connect", "give a local folder")


def test_folder_without_a_model(run, photos):
    fails(run("diagnose", photos, photos), "holds no model", "config.json")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda weights: weights.pop("blocks.0.mlp.fc1.bias"),
            ("does not fit", "Missing", "blocks.0.mlp.fc1.bias"),
        ),
        (lambda weights: weights.update(strange=torch.ones(1)), ("does not fit", "Unexpected", "strange")),
        (lambda weights: weights["norm.weight"].fill_(torch.nan), ("norm.weight holds NaN",)),
    ],
    ids=["missing key", "unexpected key", "NaN"],
)
def test_damaged_checkpoint(run, model, photos, tmp_path, change, words):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    weights = load_file(model / "model.safetensors")
    change(weights)
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    (damaged / "config.json").write_bytes((model / "config.json").read_bytes())
    fails(run("diagnose", damaged, photos), *words)


def test_no_images(run, model, tmp_path):
    (tmp_path / "empty").mkdir()
    fails(run("diagnose", model, tmp_path / "empty"), "empty")
    fails(run("diagnose", model, tmp_path / "missing"), "missing")


def test_no_readable_image(run, model, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"junk")
    fails(run("diagnose", model, tmp_path), "a.jpg")


def test_strict_stops_at_the_first_bad_image(run, model, photos):
    (photos / "a.jpg").write_bytes(b"junk")
    fails(run("diagnose", model, photos, "--strict"), "a.jpg")


def test_unwritable_output_is_found_before_the_work(run, photos, tmp_path):
    for option in ("--json", "--report"):
        target = tmp_path / "missing" / "out.html"
        fails(run("diagnose", "timm:never-loaded", photos, option, target), "cannot write", str(target))


def test_output_is_whole_or_absent(run, model, photos, tmp_path, monkeypatch):
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "d.json").write_text("the old result")
    monkeypatch.setattr("vitreg.files.os.fsync", full)
    code, _, err = run("diagnose", model, photos, "--json", tmp_path / "d.json", "--overwrite")
    assert code == 1
    assert "No space left" in err
    assert (tmp_path / "d.json").read_text() == "the old result"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.json", "photos"]


def test_size_that_cuts_patches(run, model, photos):
    fails(
        run("diagnose", model, photos, "--size", "50"),
        "50x50 is not a multiple of the patch of 8x8",
        "48x48 or 56x56",
    )


@pytest.mark.parametrize(("size", "grid"), [("48", [6, 6]), ("32x48", [4, 6]), ("40x24", [5, 3])])
def test_size_of_one_side_or_two(run, model, photos, tmp_path, size, grid):
    code, _, err = run("diagnose", model, photos, "--size", size, "--json", tmp_path / "d.json")
    assert (code, err.count("Warning")) == (0, 0)
    assert json.loads((tmp_path / "d.json").read_text())["grid"] == grid


@pytest.mark.parametrize("size", ["0", "32x", "32x0", "wide"])
def test_words_that_are_no_size(run, model, photos, size):
    code, _, err = run("diagnose", model, photos, "--size", size)
    assert code == 2
    assert "HEIGHTxWIDTH" in err


def test_every_command_with_a_model_has_the_same_options_for_it():
    seen = {}
    for command in typer.main.get_command(app).commands.values():
        for option in command.params:
            if option.name in ("size", "trust_remote_code", "random_weights"):
                seen.setdefault(option.name, []).append((option.opts, option.help, option.default))
    assert {name: len(options) for name, options in seen.items()} == dict.fromkeys(seen, 9)
    for options in seen.values():
        assert all(option == options[0] for option in options)


def test_what_is_said_of_a_model_is_one_line(run, photos, tmp_path):
    """Its configuration says 28 pixels, its processor 14."""
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7, mlp_ratio=2
    )
    transformers.Dinov2Model(config).save_pretrained(tmp_path / "dinov2")
    side = {"height": 14, "width": 14}
    transformers.ViTImageProcessor(size=side).save_pretrained(tmp_path / "dinov2")
    with warnings.catch_warnings():
        warnings.simplefilter("default", vitreg.ModelWarning)
        code, _, err = run("diagnose", tmp_path / "dinov2", photos, "--json", tmp_path / "d.json")
    assert code == 0
    lines = [line for line in err.splitlines() if "28x28" in line]
    assert len(lines) == 1
    assert lines[0].startswith("vitreg: ")
    assert json.loads((tmp_path / "d.json").read_text())["grid"] == [2, 2]


def test_not_a_vision_transformer(run, photos):
    fails(
        run("diagnose", "timm:resnet18", photos, "--random-weights"), "found no stack of transformer blocks"
    )


def test_devices_that_are_not_there(run, model, photos):
    fails(run("diagnose", model, photos, "--device", "cuda:7"), "device 'cuda:7' is not available")


# -- fix and verify ----------------------------------------------------------------------------------

FIX_KEYS = {
    "neurons", "scores", "method", "top_k", "onset_layer", "before", "after", "controls", "verdict", "reason",
}  # fmt: skip


def save_tiny(vit, folder: Path) -> Path:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": vit.anatomy.depth, "num_heads": 2}
    config = {"architecture": "vit_tiny_patch16_224", "model_args": sizes}
    save_for_hf(vit.model, folder, model_config=config, safe_serialization=True)
    return folder


@pytest.fixture(scope="module")
def crop_files(tmp_path_factory) -> Path:
    """96 crops of the bundled photos, as files."""
    folder = tmp_path_factory.mktemp("crops")
    cut = crops(vitreg.wrap(tiny_timm()), 96, 0)
    for index, image in enumerate(cut):
        pixels = ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        PIL.Image.fromarray(pixels).save(folder / f"{index:03}.png")
    return folder


@pytest.fixture(scope="module")
def planted(tmp_path_factory, crop_files) -> tuple[Path, vitreg.Phantom]:
    """A folder with a model that has artifacts, and what was planted there."""
    folder = tmp_path_factory.mktemp("planted")
    vit = vitreg.load(str(save_tiny(vitreg.wrap(tiny_timm(depth=3)), folder / "clean")))
    pixels = [batch.pixels for batch in vitreg.read_images(crop_files, vit, workers=0)]
    phantom = vitreg.plant(vit, pixels, 1)
    return save_tiny(phantom.vit, folder / "phantom"), phantom


@pytest.fixture(scope="module")
def saved_fix(tmp_path_factory, planted) -> Path:
    _, phantom = planted
    fix = vitreg.TestTimeRegisters({1: list(phantom.neurons)})
    return fix.save(tmp_path_factory.mktemp("fixes") / "fix", vit=phantom.vit)


def read_json(path: Path) -> dict:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.mark.slow
def test_fix_finds_verifies_and_saves_and_verify_reads_it_back(run, planted, crop_files, tmp_path):
    model, phantom = planted
    out, result = tmp_path / "fix", tmp_path / "f.json"
    written = ("--json", result, "--report", tmp_path / "f.html")
    code, said, progress = run("fix", model, crop_files, "-o", out, *written, "--workers", 0)
    assert code == 0
    assert f"report: {tmp_path / 'f.html'}" in said
    assert "The fix helps" in (tmp_path / "f.html").read_text()
    assert "Chosen: " in (tmp_path / "f.html").read_text()
    assert said.startswith("The fix helps: phantom")
    assert f"fix: {out}" in said
    assert f"vitreg verify {model} {out} {crop_files}" in said.replace(" \\\n     ", "")
    assert "3/6 finding register neurons" in progress
    found = read_json(result)
    assert found.keys() >= FIX_KEYS
    assert set(found["neurons"]["1"]) == set(phantom.neurons)
    assert (found["verdict"], found["onset_layer"], found["top_k"]) == ("helps", 1, 4)
    assert found["before"].keys() >= EXPECTED_KEYS
    assert found["after"].keys() >= EXPECTED_KEYS
    assert set(vitreg.load_fix(out).neurons.by_layer[1]) == set(phantom.neurons)
    assert read_json(out / "fix.json")["evidence"]["verdict"] == "helps"

    written = ("--json", tmp_path / "v.json", "--report", tmp_path / "v.html")
    code, said, _ = run("verify", model, out, crop_files, *written, "--workers", 0)
    assert code == 0
    assert "The fix helps" in (tmp_path / "v.html").read_text()
    assert "Chosen: " not in (tmp_path / "v.html").read_text()
    assert said.startswith("The fix helps: phantom")
    again = read_json(tmp_path / "v.json")
    assert again.keys() >= FIX_KEYS
    assert "search" not in again
    for key in ("verdict", "neurons", "measures", "controls"):
        assert again[key] == found[key]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["registers", "splitting", "bias", "shift-average"])
def test_options_of_fix_reach_the_run(run, planted, crop_files, tmp_path, kind):
    options = ("--type", kind, "--method", "paper", "--top-k", 2, "--limit", 48, "--batch-size", 16)
    result = ("-o", tmp_path / "fix", "--json", tmp_path / "f.json")
    options += (*result, "--recursive", "--workers", 0)
    code, said, progress = run("fix", planted[0], crop_files, *options)
    found = read_json(tmp_path / "f.json")
    assert (code, found["fix"], found["images"]) == (0, kind, 48)
    assert f"type {kind!r}, as asked for" in " ".join(said.split())
    assert vitreg.load_fix(tmp_path / "fix").type == kind
    if kind != "shift-average":
        assert (found["method"], len(found["neurons"]["1"])) == ("paper", 4 if kind == "splitting" else 2)
        assert "looking again, round 2" in progress


def test_a_fixed_model_is_diagnosed(run, planted, crop_files, saved_fix):
    model, _ = planted
    code, said, _ = run("diagnose", model, crop_files, "--workers", 0)
    assert code == 0
    assert said.startswith("Artifacts, ")
    code, said, _ = run("diagnose", model, crop_files, "--fix", saved_fix, "--workers", 0)
    assert code == 0
    assert said.startswith("No artifacts: ")
    assert "fixed (registers)" in said


@pytest.mark.slow
def test_verify_without_controls(run, planted, crop_files, saved_fix, tmp_path):
    result = ("--json", tmp_path / "v.json")
    code, said, _ = run("verify", planted[0], saved_fix, crop_files, "--no-controls", *result, "--workers", 0)
    assert code == 0
    assert "random neurons" not in said
    assert read_json(tmp_path / "v.json")["controls"] == []


def test_no_artifacts_no_fix(run, model, photos, tmp_path):
    written = ("--json", tmp_path / "f.json", "--report", tmp_path / "f.html")
    code, said, _ = run("fix", model, photos, "-o", tmp_path / "fix", *written)
    assert code == 0
    assert "No artifacts: nothing to fix" in (tmp_path / "f.html").read_text()
    assert said.startswith("No artifacts, nothing to fix: ")
    assert "no fix was written" in said
    assert not (tmp_path / "fix").exists()
    found = read_json(tmp_path / "f.json")
    assert (found["verdict"], found["neurons"], found["fix"]) == ("no artifacts", {}, None)


@pytest.mark.slow
def test_a_fix_is_replaced_and_other_files_stay(run, planted, crop_files, saved_fix, tmp_path):
    out = tmp_path / "fix"
    shutil.copytree(saved_fix, out)
    (out / "notes.txt").write_text("mine")
    command = ("fix", planted[0], crop_files, "-o", out, "--type", "splitting", "--workers", 0)
    fails(run(*command), f"{out} exists already", "--overwrite")
    code, _, _ = run(*command, "--overwrite")
    assert code == 0
    assert vitreg.load_fix(out).type == "splitting"
    assert (out / "notes.txt").read_text() == "mine"


def test_an_unwritable_folder_is_found_before_the_work(run, photos, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder" / "fix.json").mkdir(parents=True)
    for target in (tmp_path / "missing" / "fix", tmp_path / "file", tmp_path / "folder"):
        fails(run("fix", "timm:never-loaded", photos, "-o", target), str(target))
    (tmp_path / "fix.json").mkdir()  # in nobody's way
    fails(run("fix", "timm:never-loaded", photos, "-o", tmp_path / "fix"), "never-loaded")
    missing = tmp_path / "no" / "f.html"
    for option in ("--json", "--report"):
        fails(run("fix", "timm:never-loaded", photos, "-o", tmp_path / "fix", option, missing), str(missing))
        fails(run("verify", "timm:never-loaded", tmp_path, photos, option, missing), str(missing))


def test_a_fix_that_is_not_there(run, photos, saved_fix):
    fails(run("verify", "timm:never-loaded", photos, photos), str(photos), "fix.json")
    fails(run("verify", "timm:never-loaded", saved_fix / "fix.json", photos), "is a file")


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", ("fix.json",)), ('{"format": 99}', ("format",)), ("[]", ("fix.json",))],
    ids=["truncated", "newer", "no object"],
)
def test_a_damaged_fix(run, photos, saved_fix, tmp_path, content, words):
    damaged = tmp_path / "fix"
    shutil.copytree(saved_fix, damaged)
    (damaged / "fix.json").write_text(content)
    fails(run("verify", "timm:never-loaded", damaged, photos), str(damaged), *words)


def test_a_fix_for_a_model_of_another_geometry(run, model, saved_fix, photos):
    """Said before the work, and although that model has no artifacts."""
    fails(run("verify", model, saved_fix, photos), "3 blocks", "2 blocks")


def test_usage_of_fix_and_verify(run):
    assert run("fix", "model", "images")[0] == 2  # without -o
    assert run("fix", "model", "images", "-o", "x", "--type", "magic")[0] == 2
    assert run("fix", "model", "images", "-o", "x", "--top-k", "0")[0] == 2
    assert run("verify", "model", "images")[0] == 2
