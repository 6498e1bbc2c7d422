"""Outputs are checked before any work, and nothing is overwritten unasked."""

from pathlib import Path

import pytest
from catalog import CATALOG
from command_line import fails
from phantoms import crops

import vitreg
from vitreg.evals.tasks import TASKS
from vitreg.files import FIGURES
from vitreg.plots.style import image

NEVER = "timm:never-loaded"


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


def test_figures_follow_the_suffix_and_all_but_pdfs_are_the_same_every_time():
    vit = CATALOG["timm vit"].backbone()
    report = vitreg.diagnose(vit, [crops(vit, 8, 0)])
    starts = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}
    assert starts.keys() == set(FIGURES)
    for suffix, start in starts.items():
        made = [image(report.figure(), suffix.upper()) for _ in range(2)]
        assert made[0].startswith(start)
        assert suffix == ".pdf" or made[0] == made[1]


def test_only_tasks_that_draw_say_so():
    """Against their modules: one that gives a picture draws."""
    for task in TASKS.values():
        source = Path(task.module.__file__).read_text()
        assert ("picture=picture" in source) == task.draws, task.name


def test_an_earlier_demo_stays(run, here):
    (here / "demo").mkdir()
    (here / "demo" / "report.html").write_text("mine")
    fails(run("demo", "-o", here / "demo"), "report.html exists already", "--overwrite")
