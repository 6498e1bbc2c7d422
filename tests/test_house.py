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
DOCS = sorted((ROOT / "docs").glob("*.md"))
STUBS = sorted((ROOT / "vitreg").rglob("__init__.pyi"))
HOUSE = runpy.run_path(str(ROOT / "scripts" / "house.py"))


def lengths() -> list[tuple[int, str]]:
    """Lines of each function, with its file and name."""
    return [
        ((node.end_lineno or 0) - node.lineno + 1, f"{path.relative_to(ROOT)}: {node.name}")
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def test_the_drawing_is_what_the_code_says():
    assert (ROOT / "docs" / "house.md").read_text() == HOUSE["page"]()


WALKS = (ROOT / "CONTRIBUTING.md").read_text().partition("## Walks")[2].partition("## Adding a fix")[0]


def names_in(path: Path) -> set[str]:
    """Functions, classes and their methods that a file defines."""
    defined: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
            inner = node.body if isinstance(node, ast.ClassDef) else []
            defined |= {f"{node.name}.{one.name}" for one in inner if isinstance(one, ast.FunctionDef)}
    return defined


@pytest.mark.parametrize("walk", WALKS.split("### ")[1:], ids=lambda walk: walk.splitlines()[0])
def test_a_walk_is_forward_and_each_step_is_named_where_one_comes_from(walk):
    steps = re.findall(r"^(\d+)\. `([\w/]+\.py)`(?: \((\d+)\))?: (.*(?:\n   .*)*)", walk, re.MULTILINE)
    assert [int(step[0]) for step in steps] == list(range(1, len(steps) + 1))
    assert len(steps) >= 7
    files = [file for _, file, _, _ in steps]
    assert len(set(files)) == len(files), "a walk comes back to a file that it left"
    for number, file, comes_from, says in steps:
        named = re.findall(r"`(\w+(?:\.\w+)?)`", says)
        assert named[0] in names_in(ROOT / "vitreg" / file), f"{file}: {named[0]}"
        if int(number) > 1:
            before = files[int(comes_from or int(number) - 1) - 1]
            names = {name for one in named for name in one.split(".")} | {Path(file).stem}
            source = (ROOT / "vitreg" / before).read_text()
            assert any(re.search(rf"\b{name}\b", source) for name in names), f"{before} does not name {file}"


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
    assert not [function for function in found if function[0] > 60]
    assert statistics.quantiles([n for n, _ in found], n=10)[-1] <= 20


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


PRIVATE = {"_orig_mod", "_compiled_call_impl", "_is_replica", "_forward_hooks", "_forward_pre_hooks", "_C"}


def test_private_names_of_torch_are_in_one_file():
    for path in FILES:
        if path.name != "torch_internals.py":
            tree = ast.parse(path.read_text())
            attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
            modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
            assert not attributes & PRIVATE, path
            assert not [name for name in modules if name.startswith("torch") and "._" in name], path


@pytest.mark.parametrize("stub", STUBS, ids=lambda path: path.parent.name)
def test_no_module_is_called_like_a_public_name_of_its_package(stub):
    """Importing the name would give a module or a function, by what was imported before."""
    package = importlib.import_module(".".join(stub.parent.relative_to(ROOT).parts))
    assert not {path.stem for path in stub.parent.iterdir()} & set(package.__all__)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in DOCS)])
def test_files_that_a_page_names_exist(page):
    """Those of this repository, and what it links to."""
    text = (ROOT / page).read_text()
    named = re.findall(r"`((?:tests|benchmarks|docs|scripts|vitreg)/[\w/.-]+\.\w+)`", text)
    named += [f"{page}/../{link}" for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text)]
    missing = [name for name in named if not (ROOT / name).resolve().exists()]
    assert not missing
