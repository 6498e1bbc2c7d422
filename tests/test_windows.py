"""vitreg imports and runs where POSIX is not: Windows, and macOS, which spawns its processes too."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from phantoms import save_crops
from windows import POSIX_MODULES, POSIX_OS, POSIX_SIGNALS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("vitreg/**/*.py"), *ROOT.glob("benchmarks/*.py")])
OURS = [path for path in SOURCES if path.is_relative_to(ROOT / "vitreg")]


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> dict:
    """What windows.py says of a run of nearly everything."""
    folder = tmp_path_factory.mktemp("windows")
    save_crops(folder / "photos", 24)
    (folder / "out").mkdir()
    script = Path(__file__).with_name("windows.py")
    options = ["-W", "ignore", "-X", "warn_default_encoding"]
    run = subprocess.run(
        [sys.executable, *options, str(script), str(folder / "out"), str(folder / "photos")],
        env=os.environ
        | {
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        },
        capture_output=True,
        encoding="utf-8",
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


def test_every_module_imports(done):
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in OURS}
    names = {name.removesuffix(".__init__") for name in names}
    assert names - set(done["modules"]) == {"vitreg", "vitreg.__main__"}


def test_everything_runs(done):
    """Diagnosis, fix, cache, training that Ctrl-C has stopped and that goes on, shards."""
    assert (done["images"], done["failed"]) == (25, [])
    assert done["fix"] == "registers"
    assert done["features"] == 25
    assert done["steps"] == [[2, True], [4, False]]
    assert done["log"] == [1, 2, 3, 4]
    assert done["shards"] == ["00000.tar", "00001.tar", "00002.tar"]


def test_files_have_names_that_windows_takes(done):
    reserved = re.compile(r'[<>:"\\|?*\x00-\x1f]|[. ]$|^(con|prn|aux|nul|com\d|lpt\d)(\.|$)', re.IGNORECASE)
    parts = {part for name in done["files"] for part in name.split("/")}
    assert {"last.ckpt", "fix.json", "00001.tar"} <= parts
    assert [part for part in parts if reserved.search(part)] == []


def test_a_pipe_of_another_encoding_is_no_traceback(tmp_path):
    """What is piped on Windows is in the encoding of the country."""
    (tmp_path / "日本.jpg").write_bytes(b"no photo")
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; from vitreg.cli.main import main; sys.argv[1:] = "
         f"['diagnose', {str(tmp_path / '日本')!r}, 'x']; main()"],
        env=os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONPATH": str(ROOT)},
        capture_output=True, timeout=300, check=False,
    )  # fmt: skip
    assert run.returncode == 1
    assert run.stderr.startswith(b"vitreg: ")
    assert rb"\u65e5\u672c" in run.stderr


# -- what no run comes by ----------------------------------------------------------------------------


def calls(path: Path) -> Iterator[tuple[ast.Call, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield node, getattr(node.func, "attr", getattr(node.func, "id", ""))


def without_encoding(path: Path) -> list[str]:
    """Text files that are opened in whatever encoding the system has."""
    found = []
    for call, name in calls(path):
        words = {word.arg for word in call.keywords}
        modes = [*call.args[1:2], *(word.value for word in call.keywords if word.arg == "mode")]
        binary = any(isinstance(mode, ast.Constant) and "b" in str(mode.value) for mode in modes)
        opens = name in ("open", "fdopen", "NamedTemporaryFile") and not isinstance(call.func, ast.Attribute)
        text = name in ("read_text", "write_text") or (opens and not binary)
        if text and "encoding" not in words:
            found.append(f"{path.relative_to(ROOT)}:{call.lineno} {name}")
    return found


def test_text_has_an_encoding():
    assert [place for path in SOURCES for place in without_encoding(path)] == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("open('a')", True),
        ("open('a', 'w')", True),
        ("open('a', mode='a')", True),
        ("open('a', 'rb')", False),
        ("open('a', mode='xb')", False),
        ("open('a', encoding='utf-8')", False),
        ("path.read_text()", True),
        ("Path('a').write_text('b')", True),
        ("path.read_text(encoding='utf-8')", False),
        ("Image.open('a')", False),
    ],
)
def test_the_search_for_encodings_finds_them(source, expected, tmp_path, monkeypatch):
    monkeypatch.setattr("test_windows.ROOT", tmp_path)
    (tmp_path / "a.py").write_text(source, encoding="utf-8")
    assert bool(without_encoding(tmp_path / "a.py")) is expected


def test_nothing_of_posix_alone_is_used():
    found = []
    for path in OURS:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
                continue
            names = {"os": POSIX_OS, "signal": POSIX_SIGNALS}.get(node.value.id, [])
            if node.attr in names:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.value.id}.{node.attr}")
    assert found == []


def test_modules_of_posix_alone_may_be_missing():
    """They are imported where they are used, and caught."""
    found = []
    for path in OURS:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            found += [f"{path.relative_to(ROOT)}: {name}" for name in names if name in POSIX_MODULES]
    assert found == []
