"""The shape of the code: who imports whom, how long files and functions are, what is public."""

import ast
import importlib
import re
import runpy
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "vitreg").rglob("*.py"))
STUBS = sorted((ROOT / "vitreg").rglob("__init__.pyi"))
HOUSE = runpy.run_path(str(ROOT / "scripts" / "house.py"))


def lengths() -> dict[str, int]:
    """Lines of each function, by file and name."""
    return {
        f"{path.relative_to(ROOT)}: {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def test_the_drawing_is_what_the_code_says():
    assert (ROOT / "docs" / "house.md").read_text() == HOUSE["page"]()


def test_a_house_of_few_rooms():
    assert len(HOUSE["rooms"]()) <= 30


def test_a_circle_is_seen():
    with pytest.raises(ValueError, match="a circle: a -> b -> a"):
        HOUSE["floors"]({"a": {"b"}, "b": {"a"}})


def test_no_file_is_long():
    long = {path.name: n for path in FILES if (n := len(path.read_text().splitlines())) > 400}
    assert not long


def test_functions_are_short():
    found = lengths()
    assert not {name: n for name, n in found.items() if n > 60}
    assert statistics.quantiles(found.values(), n=10)[-1] <= 20


@pytest.mark.parametrize("stub", STUBS, ids=lambda path: path.parent.name)
def test_what_a_package_calls_public_exists_and_is_documented(stub):
    package = importlib.import_module(".".join(stub.parent.relative_to(ROOT).parts))
    named = ast.literal_eval(re.search(r"__all__ = (\[.*?\])", stub.read_text(), re.DOTALL)[1])
    assert set(named) <= set(package.__all__)
    for name in named:
        value = getattr(package, name)
        assert not callable(value) or value.__doc__, name


def test_every_package_says_what_it_is():
    for path in FILES:
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_no_package_is_called_like_a_public_name():
    """`vitreg.verify` would be a module as soon as one imports from it."""
    vitreg = importlib.import_module("vitreg")
    assert not {room for room in HOUSE["rooms"]() if room in vitreg.__all__}
