"""Every Python and console block of the pages is run, in order, page by page.

A page whose blocks name a model from a hub gets a small phantom in its place (`vitreg.load` and timm's
`create_model` are stood in for), and photos/, my-fix/ and other folders that pages name lie in the current
folder. What cannot be run here is marked in the page's source: `% skip: next "why"`.
"""

import shlex
import shutil
import sys
from pathlib import Path

import pytest
from sybil import Example, Sybil
from sybil.parsers.myst import CodeBlockParser, PythonCodeBlockParser, SkipParser

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

from stand_ins import Workshop

NOT_RUN = ("pip", "torchrun", "git", "scripts/", "./scripts/", "python", "source", "ssh", "ray", "accelerate")


def run_console(example: Example) -> None:
    """Run each `$ vitreg ...` line in this process. Raises AssertionError for another exit code than 0."""
    text = str(example.parsed).replace("\\\n", " ")
    for line in text.splitlines():
        if line.startswith("$ vitreg "):
            code = run_command(shlex.split(line, comments=True)[2:])
            assert code == 0, f"{line}: exit code {code}"
        elif line.startswith("$ "):
            assert line[2:].startswith(NOT_RUN), f"{line}: a command that is neither run nor known"


def run_command(arguments: list[str]) -> int:
    """The exit code of the `vitreg` command."""
    from vitreg.cli.main import app

    try:
        app(arguments, standalone_mode=False)
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop.made(tmp_path_factory.mktemp("workshop"))


@pytest.fixture(scope="module", autouse=True)
def in_a_folder_of_its_own(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory):
    """Each page has fresh copies of the folders that pages name."""
    folder = tmp_path_factory.mktemp("page")
    shutil.copytree(workshop.folder, folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("VITREG_CACHE", str(folder / "cache"))
        workshop.stand_in(patch)
        yield


pytest_collect_file = Sybil(
    parsers=[
        PythonCodeBlockParser(doctest_optionflags=0),
        CodeBlockParser(language="console", evaluator=run_console),
        SkipParser(),
    ],
    patterns=["*.md"],
    excludes=["tutorials/*.md", "reference/api/*.md"],
    fixtures=["workshop", "in_a_folder_of_its_own"],
    setup=lambda namespace: namespace.update({}),
).pytest()
