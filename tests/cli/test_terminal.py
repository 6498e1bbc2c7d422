"""What the terminal says: within its width, the verdict first, and a next command that can be run."""

import inspect
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from itertools import permutations, product
from pathlib import Path

import pytest
import torch
import typer
from catalog import CATALOG
from checkpoints import tiny_timm
from command_line import fails
from phantoms import crops
from rich.cells import cell_len

import vitreg
from vitreg.cli.help import START
from vitreg.cli.main import app
from vitreg.cli.roles import check_order
from vitreg.errors import VitregError
from vitreg.evals.result import Metric, compare, concluded
from vitreg.evals.tasks import TASKS
from vitreg.features.config import Config
from vitreg.files import FIGURES
from vitreg.plots.style import image
from vitreg.printing import Presented

COMMANDS = typer.main.get_command(app).commands
WIDTHS = (60, 80, 137)
NEVER = "timm:never-loaded"


def parsed(line: str) -> dict:
    """What our own command line reads from a command."""
    program, name, *words = shlex.split(line)
    assert program == "vitreg"
    return {"command": name, **COMMANDS[name].make_context(name, words).params}


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
@pytest.mark.parametrize("width", WIDTHS)
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


# -- nothing is overwritten, and all outputs are checked before any work ---------------------------------

OUTPUTS = {
    "diagnose": ("--json", "--report", "--figure"),
    "fix": ("--json", "--report", "-o"),
    "verify": ("--json", "--report"),
    "doctor": ("--json",),
    "registers": ("--json", "--figure"),
    "eval": ("--json", "--report", "--figure"),
}
GIVEN = {
    "diagnose": (NEVER, "photos"), "fix": (NEVER, "photos"), "verify": (NEVER, "saved", "photos"),
    "doctor": (NEVER,), "registers": (NEVER, "photos"), "eval": ("discovery", NEVER, "photos"),
}  # fmt: skip
SUFFIXES = {"--json": ".json", "--report": ".html", "--figure": ".pdf"}


@pytest.fixture
def here(tmp_path, photos, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    vitreg.TestTimeRegisters({1: [3]}).save("saved")
    return tmp_path


@pytest.mark.parametrize(("command", "option"), [(c, o) for c, options in OUTPUTS.items() for o in options])
def test_what_exists_is_refused_before_the_model_is_loaded(run, here, command, option):
    if option == "-o":
        target = here / "saved"
        rest = ()
    else:
        target = here / f"there{SUFFIXES[option]}"
        target.write_text("mine")
        rest = ("-o", "new") if command == "fix" else ()
    line = (command, *GIVEN[command], option, target, *rest)
    fails(run(*line), f"{target} exists already", "--overwrite")
    fails(run(*line, "--overwrite"), "never-loaded")
    assert option == "-o" or target.read_text() == "mine"


@pytest.mark.parametrize(
    ("option", "name"), [("--figure", "a.jpg"), ("--figure", "a"), ("--report", "a.pdf")]
)
def test_another_suffix_is_refused_with_those_that_go(run, here, option, name):
    known = FIGURES if option == "--figure" else (".html",)
    fails(run("diagnose", NEVER, "photos", option, name), name, *known)
    assert not (here / name).exists()


def test_one_file_for_two_results_is_refused(run, here):
    fails(run("diagnose", NEVER, "photos", "--json", "a.html", "--report", "./a.html"), "the same file")


def test_a_task_without_a_figure_says_so_before_the_work(run, here):
    fails(run("eval", "knn", NEVER, "photos", "--figure", "a.png"), "draws no figure")


def test_a_pipe_may_be_written_again_and_again(run, model, photos):
    for _ in range(2):
        code, said, _ = run("diagnose", model, photos, "--json", "/dev/null")
        assert (code, "JSON: /dev/null" in said) == (0, True)


def test_figures_follow_the_suffix_and_are_the_same_every_time(results):
    starts = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}
    assert starts.keys() == set(FIGURES)
    for suffix, start in starts.items():
        made = [image(results["fix"].figure(), suffix.upper()) for _ in range(2)]
        assert made[0].startswith(start)
        assert made[0] == made[1]


def test_only_tasks_that_draw_say_so():
    """Against their modules: one that gives a picture draws."""
    for task in TASKS.values():
        source = Path(task.module.__file__).read_text()
        assert ("picture=picture" in source) == task.draws, task.name


# -- names ----------------------------------------------------------------------------------------------

WORDS = {"TASK": "knn", "MODEL": "timm:x", "FIX": "saved", "IMAGES": "photos", "DATA": "photos"}
ROLES = [("MODEL", "IMAGES"), ("MODEL", "FIX", "IMAGES"), ("TASK", "MODEL", "DATA")]


@pytest.mark.parametrize(
    ("roles", "order"), [(roles, order) for roles in ROLES for order in permutations(range(len(roles)))]
)
@pytest.mark.parametrize("model", ["timm:x", "vit_tiny_patch16_224", "folder"])
def test_arguments_in_another_order_are_understood(here, roles, order, model):
    (here / "folder").mkdir()
    (here / "folder" / "config.json").write_text("{}")
    words = [{**WORDS, "MODEL": model}[role] for role in roles]
    given = dict(zip(roles, [words[i] for i in order], strict=True))
    if list(order) == sorted(order):
        check_order("command", given)
        return
    with pytest.raises(VitregError, match=shlex.join(["vitreg", "command", *words]).replace("\\", "")):
        check_order("command", given)


def test_arguments_that_cannot_be_told_apart_are_left_to_those_who_read_them(here):
    for given in ({"MODEL": "a", "IMAGES": "b"}, {"MODEL": "photos", "IMAGES": "photos"}):
        check_order("diagnose", given)


def test_swapped_arguments_are_one_line(run, here):
    fails(run("diagnose", "photos", NEVER), f"vitreg diagnose {NEVER} photos")


TYPOS = {
    ("fix", "m", "photos", "-o", "x", "--type", "spliting"): "splitting?",
    ("fix", "m", "photos", "-o", "x", "--method", "contast"): "contrast?",
    ("diagnos", "m", "photos"): "'diagnose'?",
    ("eval", "discovry", NEVER, "photos"): "discovery?",
    ("eval", "knn", NEVER, "photos", "--set", "seeed=1"): "seed?",
    ("eval", "discovery", NEVER, "photos", "--set", "method=tokencutt"): "tokencut?",
    ("papers", "test-time-cuont"): "test-time-count?",
    ("train", "emergense"): "emergence?",
    ("diagnose", "vit_tiny_patch16_24", "photos"): "timm:vit_tiny_patch16_224",
    ("diagnose", "tim:vit_tiny_patch16_224", "photos"): "timm:vit_tiny_patch16_224?",
    ("diagnose", "facebook/dinov2-base", "photos"): "hf:facebook/dinov2-base?",
    ("diagnose", "ViT-B-32/openai", "photos"): "open_clip:ViT-B-32/openai?",
    ("diagnose", "vit_tiny_patch16_224.augreg_in21k_ft", "photos"): "timm:vit_tiny_patch16_224.augreg_in21k",
    ("diagnose", "hf:dinov", "photos", "--random-weights"): "hf:dinov2",
    ("diagnose", "timm:test_vit", "photos", "--random-weights", "--dtype", "bfloat61"): "bfloat16?",
}


@pytest.mark.parametrize(("line", "says"), list(TYPOS.items()), ids=list(TYPOS.values()))
def test_did_you_mean_wherever_a_name_is_chosen(run, here, line, says):
    code, out, err = run(*line)
    assert code in (1, 2)
    assert out == ""
    assert f"Did you mean {says}" in " ".join(err.replace("│", " ").split())


def test_a_bare_name_of_timms_is_tried_as_timms(run, here):
    code, said, _ = run("diagnose", "vit_tiny_patch16_224", "photos", "--random-weights", "--limit", 1)
    assert code == 0
    assert said.startswith("No artifacts: timm:vit_tiny_patch16_224\n")
    (here / "vit_tiny_patch16_224").mkdir()  # a folder goes before
    fails(run("diagnose", "vit_tiny_patch16_224", "photos"), "holds no model")


# -- help -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "width"), list(product([None, *COMMANDS], (60, 80))))
def test_help_fits_and_names_every_option(run, monkeypatch, name, width):
    monkeypatch.setenv("COLUMNS", str(width))
    code, said, _ = run(*([name] if name else []), "--help")
    assert code == 0
    assert max(map(len, said.splitlines())) <= width
    if name is None:
        first = said.splitlines()[:12]
        assert all(any(line.strip().startswith(command[:12]) for line in first) for command in START)
        assert all(f"  {command} " in said for command in COMMANDS)
        return
    for param in COMMANDS[name].params:
        for option in param.opts:
            assert not option.startswith("-") or option in said, option


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_of_the_help_can_be_parsed(run, name):
    _, said, _ = run(name, "--help")
    examples = said.partition("\nExamples\n")[2].replace(" \\\n   ", "").splitlines()
    assert examples
    for line in examples:
        assert parsed(line.strip())["command"] == name
    for line in START:
        if line.split()[1] == name:
            parsed(line)


@pytest.mark.parametrize("task", TASKS)
def test_the_help_of_a_task_lists_its_settings(run, task):
    _, said, _ = run("eval", task, "--help")
    settings = said.partition("Settings of")[2]
    shared = {field.name for field in fields(Config)} - {"seed"}
    for field in fields(TASKS[task].config):
        assert (f"  {field.name} " in settings) == (field.name not in shared)


def test_the_help_of_a_recipe_says_what_to_expect(run):
    _, said, _ = run("train", "emergence", "--help")
    assert "cost" in said
    assert "7449 steps" in " ".join(said.split())
    assert "  image_size " in said


@pytest.mark.slow
@pytest.mark.parametrize("line", [("--help",), ("diagnose", "--help"), ("eval", "--help"), ("--version",)])
def test_help_loads_no_torch(line):
    code = f"import sys; sys.argv = ['vitreg', *{line!r}]; import atexit; from vitreg.cli.main import main;"
    code += " atexit.register(lambda: print('torch' in sys.modules)); main()"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "False"


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
