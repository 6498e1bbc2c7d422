"""Recipes are found by name or file, set by name, and refused with what to do."""

from dataclasses import replace
from pathlib import Path

import pytest
from training_runs import tiny

from vitreg.config.settings import pairs, with_settings
from vitreg.errors import DataError, MissingExtraError
from vitreg.training.recipe import bundled, find_recipe

GOOD = """
from __future__ import annotations
from dataclasses import dataclass
from vitreg.training.supervised import Supervised

@dataclass(frozen=True)
class Mine(Supervised):
    sauce: float | None = None

recipe = Mine(about="a", expected="b", cost="c", steps=3)
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.py"
    path.write_text(text)
    return path


def test_bundled_recipes_are_found_by_name():
    assert "supervised_small" in bundled()
    assert find_recipe("supervised_small").model_args == {"depth": 6}


def test_a_file_may_define_a_regime_of_its_own(tmp_path):
    recipe = find_recipe(written(tmp_path, GOOD))
    assert (recipe.about, recipe.steps) == ("a", 3)
    assert with_settings(recipe, pairs(["sauce=2", "registers=4"])) == replace(recipe, sauce=2.0, registers=4)


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(DataError, match=r"this recipe has no setting 'register'\. Did you mean registers\?"):
        with_settings(tiny("data"), {"register": "4"}, "this recipe")


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("registers=four", "setting registers=four: expected int"),
        ("lr=", "setting lr=: expected float"),
        ("betas=0.9", r"setting betas=0.9: expected tuple\[float, float\]"),
        ("registers=-1", "registers=-1: expected 0 or more"),
        ("steps=0", "steps=0: expected 1 or more"),
        ("micro_batch=3", "micro_batch=3 does not divide batch_size=8"),
    ],
)
def test_a_value_that_does_not_fit(pair, message):
    with pytest.raises(DataError, match=message):
        with_settings(tiny("data"), pairs([pair]))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "supervised_smal",
            r"no recipe 'supervised_smal'\. Did you mean supervised_small\? Expected a Python",
        ),
        ("nowhere/mine.py", r"no recipe 'nowhere/mine\.py'"),
    ],
)
def test_a_recipe_that_is_not_there(name, message):
    with pytest.raises(DataError, match=message):
        find_recipe(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", r"mine\.py holds no recipe\. Expected `recipe = "),
        ("recipe = 3", "holds no recipe"),
        ("recipe = (", "cannot be run: SyntaxError"),
        ("import nothing_of_the_kind", "cannot be run: ModuleNotFoundError: No module named 'nothing_of"),
        ("open('/no/such/file')", "cannot be run: FileNotFoundError"),
        (GOOD.replace("steps=3", "stepz=3"), "cannot be run: TypeError: .*stepz"),
        (GOOD.replace("steps=3", "steps=-3"), r"^steps=-3: expected 1 or more\.$"),
    ],
)
def test_a_file_that_makes_no_recipe(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        find_recipe(written(tmp_path, text))


def test_a_missing_library_is_named_by_the_recipe(tmp_path):
    text = "from vitreg.errors import MissingExtraError\nraise MissingExtraError('lightly', 'train')"
    with pytest.raises(MissingExtraError, match=r"lightly is not installed.*vitreg\[train\]"):
        find_recipe(written(tmp_path, text))
