"""What keeps the documentation true, without building it: links, commands, options, names, errors.

`scripts/docs` builds the site, runs every code block and tutorial, and follows every link of the built pages.
"""

import ast
import re
import shlex
import sys
from pathlib import Path

import pytest

import vitreg
import vitreg.errors

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS / "_ext"))

import command_pages  # noqa: E402
import model_pages  # noqa: E402

GENERATED = {"reference/commands.md", "reference/api.md", "models/table.md"}
PAGES = sorted(path for path in DOCS.rglob("*.md") if "api" not in path.parts)
TOP_FILES = {"contributing.md", "changelog.md"}  # made of files beside docs/
COMMANDS = command_pages.commands()


def name(path: Path) -> str:
    return path.relative_to(DOCS).as_posix()


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^(`{3,}).*?^\1", "", text, flags=re.DOTALL | re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_pages_and_headings_that_exist(page):
    for link, anchor in re.findall(
        r"\]\((?!https?:|mailto:)([^)#\s]*)(#[^)\s]+)?\)", without_code(page.read_text())
    ):
        target = (page.parent / link).resolve() if link else page
        place = target.relative_to(DOCS).as_posix() if target.is_relative_to(DOCS) else ""
        if place in GENERATED or place.startswith("reference/api/"):
            continue
        assert target.exists(), f"{link} does not exist"
        if anchor and place not in TOP_FILES:
            assert anchor[1:] in headings(target), f"{link}{anchor}: no such heading"


def headings(page: Path) -> set[str]:
    """The headings of a page as anchors."""
    found = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in found}


def written_commands(page: Path) -> list[list[str]]:
    """The words of each `vitreg ...` that a page writes as code, in line or in a block."""
    text = page.read_text()
    pieces = re.findall(r"(?<!`)`(vitreg [^`]+)`(?!`)", text)
    pieces += re.findall(r"^\$ (?:torchrun .*-m )?(vitreg .*)$", text, re.MULTILINE)
    words = []
    for piece in pieces:
        try:
            words.append(shlex.split(" ".join(piece.split()), comments=True))
        except ValueError:
            words.append(piece.split())
    return words


@pytest.mark.parametrize("page", [page for page in PAGES if name(page) not in GENERATED], ids=name)
def test_commands_and_options_that_pages_name_exist(page):
    for words in written_commands(page):
        for command in words[1].split("|") if words[1:] else []:
            if not re.fullmatch(r"[a-z]+", command):
                continue  # COMMAND, --help, ...
            assert command in COMMANDS, " ".join(words)
            known = {
                option
                for param in COMMANDS[command].params
                for option in [*param.opts, *param.secondary_opts]
            }
            options = {word.partition("=")[0] for word in words[2:] if re.match(r"--?[a-z]", word)}
            assert options <= known | {"--help"}, " ".join(words)


def test_the_reference_has_every_command_and_option():
    page = command_pages.page()
    for command, found in COMMANDS.items():
        section = page.partition(f"## vitreg {command}\n")[2].partition("\n## ")[0]
        assert section, command
        for param in found.params:
            for option in param.opts:
                if option.startswith("-") and option != "--help" and not param.hidden:
                    assert f"`{option}`" in section, f"vitreg {command} {option}"


def test_every_error_and_warning_has_its_section():
    page = (DOCS / "reference" / "errors.md").read_text()
    for error in vars(vitreg.errors).values():
        if isinstance(error, type) and issubclass(error, Exception):
            assert f"\n## {error.__name__}\n" in page or f"[{error.__name__}](" in page, error


def test_every_public_name_has_a_place_in_the_reference():
    import api_pages

    shown = [one for names in api_pages.packages().values() for one in names]
    assert len(shown) == len(set(shown))
    assert {f"vitreg.{one}" for one in vitreg.__all__ if not one.startswith("_")} <= set(shown)
    for stub in (ROOT / "vitreg").glob("*/__init__.pyi"):
        for one in api_pages.names_of(stub):
            assert {f"vitreg.{one}", f"vitreg.{stub.parent.name}.{one}"} & set(shown), one


def test_the_table_has_every_model_that_was_tried():
    rows = model_pages.rows()
    assert len(rows) > 1500
    assert {row[3] for row in rows} <= {"supported", "refused", "not built"}
    assert sum(row[0] == "authors' code" for row in rows) == 66
    assert all(row[4] for row in rows if row[3] == "refused" and row[0] != "authors' code")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_of_the_pages_is_python(page):
    for block in re.findall(
        r"^```(?:python|\{code-cell\})\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE
    ):
        ast.parse(re.sub(r"^%.*$", "", block, flags=re.MULTILINE))


def test_every_page_is_in_a_table_of_contents():
    listed: set[Path] = {DOCS / "index.md"}
    for page in PAGES:
        for tree in re.findall(r"^```\{toctree\}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            entries = [
                line.strip() for line in tree.splitlines() if line.strip() and not line.startswith(":")
            ]
            listed |= {(page.parent / f"{entry}.md").resolve() for entry in entries}
    lost = {name(page) for page in PAGES} - {name(page) for page in listed}
    assert not lost


def test_nothing_of_the_sites_own_files_comes_from_a_network():
    """Of the built pages, docs/_ext/check_site.py says it."""
    for path in (DOCS / "_static").iterdir():
        assert "http" not in path.read_text(), path
