"""What the terminal says: within its width, the verdict first, and a next command that can be run."""

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
import typer
from catalog import CATALOG
from checkpoints import tiny_timm
from command_line import fails, parsed
from phantoms import crops
from rich.cells import cell_len

import vitreg
from vitreg.cli.main import app
from vitreg.data.images import demo_photos
from vitreg.evals.result import Metric, compare, concluded
from vitreg.features.config import Config
from vitreg.printing import Presented

COMMANDS = typer.main.get_command(app).commands
WIDTHS = (60, 80, 137)
NEVER = "timm:never-loaded"


def next_commands(said: str) -> list[dict]:
    joined = said.replace(" \\\n     ", "")
    return [parsed(line.strip()) for line in joined.splitlines() if line.startswith("    vitreg ")]


# -- every result ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results() -> dict[str, Presented]:
    vit = replace(CATALOG["timm vit"].backbone(), name="models/" + "a-long-name-of-a-model_" * 3)
    photos = crops(vit, 64, 0)
    phantom = vitreg.plant(vit, photos, 1)
    ill = replace(phantom.vit, name="timm:a_phantom")
    found = vitreg.find_fix(ill, [photos], kind="registers")
    sick, sound = found.report, vitreg.diagnose(vit, [photos])
    metrics = {f"metric {i}": Metric.mean([i, i + 1], ".1%") for i in range(9)}
    before = concluded("knn", vit, "data", metrics, Config(), notes=("a note (of 3). More of it.",))
    after = replace(before, metrics={name: Metric.mean([7, 9], ".1%") for name in metrics}, fix="registers")
    registers = CATALOG["timm dinov2 registers"].backbone()
    return {
        "diagnosis": sick,
        "diagnosis, none": sound,
        "emergence": vitreg.Emergence([sick, sound]),
        "fix": found,
        "no fix": vitreg.find_fix(vit, [photos], report=sound),
        "verdict": found.verdict,
        "result": before,
        "comparison": compare(before, after),
        "registers": vitreg.what_registers_learn(registers, [torch.randn(2, 3, *registers.image_size)]),
        "doctor": vitreg.doctor(vit),
        "doctor, refused": vitreg.doctor(torch.nn.Linear(3, 3)),
    }


VERDICTS = {
    "diagnosis": "Artifacts, ",
    "diagnosis, none": "No artifacts:",
    "emergence": "Artifacts in 1 of 2 models:",
    "fix": "The fix helps:",
    "no fix": "No artifacts, nothing to fix:",
    "verdict": "The fix helps:",
    "result": "Metric 0 50.0% [",
    "comparison": "Better in 7 of 9 metrics:",
    "registers": "4 registers, ",
    "doctor": "Supported, ",
    "doctor, refused": "Refused:",
}


@pytest.mark.parametrize(("name", "width"), list(product(VERDICTS, WIDTHS)))
def test_each_result_fits_the_terminal_with_its_verdict_first(results, name, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    said = str(results[name])
    assert said.startswith(VERDICTS[name])
    assert max(map(cell_len, said.splitlines())) <= width
    assert len(said.splitlines()) <= 30
    assert len(results[name].full()) >= len(said) / 3  # tables are padded in the short form


@pytest.mark.parametrize("name", VERDICTS)
def test_each_result_has_a_short_repr_and_stays_json(results, name):
    shown = repr(results[name])
    assert shown.startswith(f"<{type(results[name]).__name__}: ")
    assert len(shown) < 250
    assert "\n" not in shown
    json.dumps(results[name].to_json())


# -- the next command -----------------------------------------------------------------------------------


def save_tiny(folder: Path, module: torch.nn.Module) -> Path:
    from timm.models._hub import save_for_hf

    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": len(module.blocks), "num_heads": 2}
    save_for_hf(
        module, folder, model_config={"architecture": "vit_tiny_patch16_224", "model_args": sizes},
        safe_serialization=True,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def ill(tmp_path_factory) -> tuple[Path, Path]:
    """A model with artifacts, in a folder whose name has to be quoted, and photos."""
    import PIL.Image

    folder = tmp_path_factory.mktemp("a model's")
    vit = vitreg.wrap(tiny_timm(depth=3))
    cut = crops(vit, 64, 0)
    (folder / "my photos").mkdir()
    for index, pixels in enumerate(cut):
        array = ((pixels + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        PIL.Image.fromarray(array).save(folder / "my photos" / f"{index:03}.png")
    read = [batch.pixels for batch in vitreg.read_images(folder / "my photos", vit, workers=0)]
    return save_tiny(folder / "phantom", vitreg.plant(vit, read, 1).vit.model), folder / "my photos"


@pytest.mark.slow
@pytest.mark.parametrize(
    "width", [x if x == 80 else pytest.param(x, marks=pytest.mark.nightly) for x in WIDTHS]
)
def test_each_command_leads_to_the_next(run, ill, tmp_path, monkeypatch, width):
    """diagnose, then what it says, and so on: with the options that were given."""
    model, photos = ill
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", str(width))
    options = ("--size", "32x32", "--limit", "48", "--workers", "0")
    code, said, _ = run("diagnose", model, photos, *options)
    (step,) = next_commands(said)
    assert code == 0
    assert (step["command"], step["model"], step["images"]) == ("fix", str(model), str(photos))
    assert (step["size"], step["limit"], step["workers"], step["out"]) == ((32, 32), 48, 0, Path("fix"))
    assert step["device"] == "auto"
    (tmp_path / "fix").mkdir()
    assert next_commands(run("diagnose", model, photos, *options)[1])[0]["out"] == Path("fix-2")

    code, said, _ = run("fix", model, photos, "-o", "fix/", "--type", "registers", *options)
    (step,) = next_commands(said)
    assert code == 0
    assert (step["command"], step["fix"], step["images"]) == ("verify", "fix", str(photos))
    lines = [line.strip() for line in said.splitlines()]
    python = "\n".join(line for line in lines if line.startswith(("import vitreg", "vitreg.load_fix(")))
    fixed = vitreg.load(str(model)).model
    exec(python, {"model": fixed})
    assert [handle.fix.type for handle in vitreg.applied(fixed)] == ["registers"]

    code, said, _ = run("verify", model, "fix/", photos, *options)
    assert code == 0
    assert "vitreg.load_fix('fix/').apply(model)" in said
    code, said, _ = run("diagnose", model, photos, *options, "--fix", "fix/")
    assert next_commands(said)[0]["command"] == "verify"
    for line in said.splitlines():
        assert cell_len(line) <= width or str(tmp_path.parent.parent) in line  # a path is not broken


def test_nothing_to_do_without_artifacts(run, model, photos):
    code, said, _ = run("diagnose", model, photos)
    assert code == 0
    assert "Next: nothing" in said
    assert next_commands(said) == []
    code, said, _ = run("diagnose", model, photos, "--full")
    assert said.startswith(f"{model}: no artifacts\n")
    assert "Next: nothing" in said


def test_eval_and_doctor_lead_on(run, model, classes):
    code, said, _ = run(
        "eval", "classification", model, classes, "--no-cache", "--limit", 2, "--set", "seed=3"
    )
    (step,) = next_commands(said)
    assert (code, step["task"], step["compare"], step["limit"]) == (0, "classification", True, 2)
    assert step["settings"] == ["seed=3"]
    (step,) = next_commands(run("doctor", model)[1])
    assert (step["command"], step["full"]) == ("doctor", True)


# -- few photos ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 8, 31, 32])
def test_few_photos_are_a_word_of_caution(count, results):
    vit = CATALOG["timm vit"].backbone()
    report = vitreg.diagnose(vitreg.plant(vit, crops(vit, 32, 0), 1).vit, [crops(vit, count, 0)])
    said = " ".join(str(report).split())
    photos = "1 photo:" if count == 1 else f"{count} photos:"
    assert (f"Judged from {photos}" in said) == (count < 32)
    assert ("one photo cannot tell" in said) == (count == 1 and report.has_artifacts)


# -- what else a newcomer meets -------------------------------------------------------------------------


def test_the_explorer_without_its_extra_is_one_line(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    fails(run("app", "--no-open"), "gradio is not installed", "pip install 'vitreg[app]'")


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_ctrl_c_ends_in_one_line(ill, workers, tmp_path):
    """In the middle of the work, as a terminal does it: to the whole group of processes."""
    model, photos = ill
    many = tmp_path / "many.txt"
    many.write_text(f"{photos}/000.png\n" * 100_000)
    command = [sys.executable, "-m", "vitreg", "diagnose", str(model), str(many), "--workers", workers]
    started = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    time.sleep(12)
    os.killpg(started.pid, signal.SIGINT)
    out, err = started.communicate(timeout=60)
    assert (started.returncode, out, err) == (130, "", "vitreg: interrupted\n")


def test_the_library_and_the_command_choose_the_same_device():
    for function in (vitreg.load, vitreg.doctor):
        assert inspect.signature(function).parameters["device"].default == "auto"
    for command in ("diagnose", "fix", "verify", "eval", "doctor", "registers", "app"):
        assert {p.name: p.default for p in COMMANDS[command].params}["device"] == "auto"


@pytest.mark.slow
def test_the_readme_shows_what_is_printed(shared, monkeypatch):
    """Its example is of the bundled photos and a public model."""
    monkeypatch.setenv("COLUMNS", "80")
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    vit = replace(vitreg.load(str(shared / "models" / name)), name=f"timm:{name}")
    report = vitreg.diagnose(vit, vitreg.read_images(demo_photos(), vit))
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    shown = readme.partition("$ vitreg diagnose timm:")[2].partition("\n")[2].partition("\nNext: ")[0]
    assert str(report).partition("\nNext: ")[0] == shown
