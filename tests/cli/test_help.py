"""The help: within the terminal, with every option, and examples that can be run."""

import subprocess
import sys
from dataclasses import fields
from itertools import product

import pytest
import typer
from command_line import parsed

from vitreg.cli.help import START
from vitreg.cli.main import app
from vitreg.evals.tasks import TASKS
from vitreg.features.config import Config

COMMANDS = typer.main.get_command(app).commands

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
