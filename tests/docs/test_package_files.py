"""The package's own files: one version, metadata that agree, workflows that name what exists."""

import re
from pathlib import Path

import pytest

import vitreg

ROOT = Path(__file__).resolve().parents[2]
PROJECT = (ROOT / "pyproject.toml").read_text()
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_the_version_is_written_once():
    assert 'dynamic = ["version"]' in PROJECT
    assert not re.search(r'^version = "', PROJECT, re.MULTILINE)
    assert f'__version__ = "{vitreg.__version__}"' in (ROOT / "vitreg" / "version.py").read_text()


def test_the_changelog_speaks_of_this_version():
    assert vitreg.__version__ in (ROOT / "CHANGELOG.md").read_text()


def test_every_extra_is_explained_where_one_installs():
    extras = re.findall(
        r"^(\w+) = \[",
        PROJECT.partition("[project.optional-dependencies]")[2].partition("[project.urls]")[0],
        re.MULTILINE,
    )
    page = (ROOT / "docs" / "start" / "install.md").read_text()
    assert len(extras) > 8
    assert not [extra for extra in extras if f"`{extra}`" not in page]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_run_what_exists(path):
    text = path.read_text()
    named = re.findall(r"(?:scripts|tests|vitreg)/[\w/.-]+", text)
    assert not [one for one in named if not (ROOT / one).exists()]
    assert "permissions:" in text


def test_what_a_repository_needs_is_there():
    for name in (
        "CHANGELOG.md",
        "CITATION.cff",
        "CODE_OF_CONDUCT.md",
        "SECURITY.md",
        "CONTRIBUTING.md",
        "LICENSE",
    ):
        assert (ROOT / name).stat().st_size > 300, name
