"""The command line: results on stdout, one line and exit code 1 for our own errors, nothing half-written."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_models import tiny_timm
from timm.models._hub import save_for_hf

from vitreg.cli import main
from vitreg.images import demo_photos

EXPECTED_KEYS = {
    "model", "images", "failed_images", "grid", "prefix_tokens", "verdict", "reason", "threshold",
    "detect_layer", "onset_layer", "outlier_fraction", "outliers_per_image", "attention_to_outliers",
    "position_frequency", "neighbour_similarity", "layers", "versions",
}  # fmt: skip
LAYER_KEYS = {"layer", "median_norm", "p99_norm", "max_norm", "outlier_fraction", "attention_to_outliers"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    config = {"architecture": "vit_tiny_patch16_224", "model_args": sizes}
    save_for_hf(tiny_timm(), folder, model_config=config, safe_serialization=True)
    return folder


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for path in demo_photos()[:3]:
        PIL.Image.open(path).save(folder / path.name)
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    """Run `vitreg ARGS...` in this process: (exit code, stdout, stderr)."""

    def run(*args) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vitreg", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            main()
        return (ended.value.code or 0, *capsys.readouterr())

    return run


def fails(outcome: tuple[int, str, str], *words: str) -> None:
    code, out, err = outcome
    assert code == 1
    assert out == ""
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    assert lines[0].startswith("vitreg: ")
    assert all(word in lines[0] for word in words), lines[0]


# -- what it does ------------------------------------------------------------------------------------


def test_diagnose_prints_and_writes_json_and_report(run, model, photos, tmp_path):
    (photos / "broken.jpg").write_bytes(b"not an image")
    code, out, _ = run(
        "diagnose", model, photos, "--json", tmp_path / "d.json", "--report", tmp_path / "r.html"
    )
    assert code == 0
    assert f"{model}: no artifacts" in out
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
    assert "timm:vit_tiny_patch16_224: no artifacts" in out


def test_version_and_usage(run):
    assert run("--version")[:2] == (0, "vitreg 0.1.0\n")
    assert run("diagnose", "only-a-model")[0] == 2
    assert run("diagnose", "a", "b", "--batch-size", "0")[0] == 2


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
        target = tmp_path / "missing" / "out"
        fails(run("diagnose", "timm:never-loaded", photos, option, target), "cannot write", str(target))


def test_output_is_whole_or_absent(run, model, photos, tmp_path, monkeypatch):
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "d.json").write_text("the old result")
    monkeypatch.setattr("vitreg.output.os.fsync", full)
    code, _, err = run("diagnose", model, photos, "--json", tmp_path / "d.json")
    assert code == 1
    assert "No space left" in err
    assert (tmp_path / "d.json").read_text() == "the old result"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.json", "photos"]


def test_size_that_cuts_patches(run, model, photos):
    fails(
        run("diagnose", model, photos, "--size", "50"),
        "50x50 is not a multiple of the patch of 8x8",
        "48 or 56",
    )


def test_not_a_vision_transformer(run, photos):
    fails(
        run("diagnose", "timm:resnet18", photos, "--random-weights"), "found no stack of transformer blocks"
    )


def test_devices_that_are_not_there(run, model, photos):
    fails(run("diagnose", model, photos, "--device", "cuda:7"), "device 'cuda:7' is not available")
