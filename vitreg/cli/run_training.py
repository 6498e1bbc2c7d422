"""`vitreg train`: one run, or the same recipe with several numbers of registers."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vitreg.config.settings import pairs, with_settings
from vitreg.errors import DataError
from vitreg.printing import terminal_width, text_table, wrapped
from vitreg.training.loop import Machine, Run, train
from vitreg.training.recipe import Recipe, bundled, find_recipe

INTERRUPTED = 130  # the exit code of what Ctrl-C has ended: 128 + SIGINT


def run(
    name: str,
    out: Path | None,
    *,
    data: str | None = None,
    settings: Sequence[str] = (),
    registers: Sequence[int] = (),
    evals: Sequence[str] = (),
    machine: Machine | None = None,
) -> None:
    """Train as a recipe says; with several numbers of registers, each of them, and compare (the ablation)."""
    recipe = with_settings(find_recipe(name), pairs(settings), f"recipe {name}")
    recipe = replace(recipe, data=data or recipe.data)
    if not recipe.data and recipe.needs:
        raise DataError(f"recipe {name} needs data: give --data DIR with {recipe.needs}.")
    folder = out or Path("runs") / Path(name).stem
    if len(registers) > 1:
        _ablate(recipe, registers, folder, pairs(evals), machine)
        return
    if evals:
        raise DataError("--eval compares several --registers. Use `vitreg eval` for one model.")
    recipe = replace(recipe, registers=registers[0]) if registers else recipe
    _tell(recipe, train(recipe, folder, machine))


def _tell(recipe: Recipe, result: Run) -> None:
    """Say what came out; exit as a command that Ctrl-C has ended."""
    if result.first:
        sys.stdout.write(_told(recipe, result))
    if result.interrupted:
        sys.exit(INTERRUPTED)


def _told(recipe: Recipe, result: Run) -> str:
    """What came out, beside what the recipe expects."""
    if result.stopped:
        where = f"stopped at step {result.step} of {recipe.steps} of {result.folder}"
        return f"{where}; the same command goes on from there.\n"
    last = result.log[-1]
    figures = "  ".join(f"{name} {value:.4g}" for name, value in last.items())
    files = "".join(f"{what}: {path}\n" for what, path in result.written.items())
    return f"{figures}\nexpected: {recipe.expected}\nlog: {result.folder / 'log.jsonl'}\n{files}"


def _ablate(
    recipe: Recipe, registers: Sequence[int], out: Path, evals: dict[str, str], machine: Machine | None
) -> None:
    from vitreg.training.ablation import ablate

    ablation = ablate(recipe, registers, out, machine, evals=evals)
    if ablation is None:  # another process reports
        return
    if isinstance(ablation, Run):
        _tell(recipe, ablation)
        return
    sys.stdout.write(f"{ablation}\n")
    for path in ablation.save(out):
        sys.stdout.write(f"{path}\n")


def listing() -> str:
    """The bundled recipes, and what each trains, within the width of the terminal."""
    rows = [(name, find_recipe(name).about) for name in bundled()]
    how = "`vitreg train RECIPE --help` says what to expect, what it costs, and lists the settings."
    width = terminal_width()
    return "\n".join([text_table(rows, left=2, width=width), "", *wrapped(how, width)])
