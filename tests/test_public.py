"""What a newcomer meets first: the public names, the README's example, the demo."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from catalog import CATALOG
from checkpoints import tiny_timm
from phantoms import crops

import vitreg
import vitreg.errors
from vitreg.data.images import demo_photos

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


def test_every_public_name_exists_and_says_what_it_is():
    for name in vitreg.__all__:
        assert getattr(vitreg, name).__doc__, name
    assert vitreg.__all__ == sorted(vitreg.__all__, key=lambda name: (name[0].islower(), name))


@pytest.mark.parametrize(("old", "new"), [("find_cure", "find_fix"), ("Cure", "FixSearch")])
def test_a_renamed_name_still_works_and_says_what_it_is_called_now(old, new):
    with pytest.warns(DeprecationWarning, match=rf"vitreg\.{old} is now vitreg\.{new}\."):
        assert getattr(vitreg, old) is getattr(vitreg, new)


def test_every_error_is_public_and_drawn_in_the_tree():
    errors = [x for x in vars(vitreg.errors).values() if isinstance(x, type) and issubclass(x, Exception)]
    for error in errors:
        assert issubclass(error, vitreg.VitregError | UserWarning)
        assert error.__name__ in vitreg.__all__
        assert error.__name__ in (vitreg.errors.__doc__ or "")


def test_optional_and_heavy_libraries_wait_until_they_are_used():
    heavy = ("timm", "transformers", "open_clip", "torchvision", "matplotlib", "webdataset")
    code = f"import sys, vitreg.cli.main; print([m for m in {heavy} if m in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "[]\n"


def test_the_readmes_example_runs(monkeypatch, tmp_path):
    """The example as printed, with a small model and the bundled photos in place of what it names."""
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    assert len(code.strip().splitlines()) <= 15
    small = vitreg.wrap(tiny_timm(depth=12))
    read = vitreg.read_images
    monkeypatch.setattr(vitreg, "load", lambda name: small)
    monkeypatch.setattr(vitreg, "read_images", lambda source, vit: read(demo_photos(), vit))
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert (tmp_path / "overview.png").stat().st_size > 10_000


def test_the_readmes_cure_runs(monkeypatch, tmp_path):
    """As printed, on a phantom; the last line applies the saved fix to the bare model."""
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[1]
    vit = CATALOG["timm vit"].backbone()
    photos = [crops(vit, 24, 0)]
    phantom = vitreg.plant(vit, photos, 1)
    monkeypatch.chdir(tmp_path)
    before = vitreg.diagnose(phantom.vit, photos)
    exec(code, {"vitreg": vitreg, "vit": phantom.vit, "photos": photos, "model": phantom.vit.model})
    assert before.has_artifacts
    assert not vitreg.diagnose(phantom.vit, photos).has_artifacts
    assert sum(path.stat().st_size for path in Path("my-fix").iterdir()) < 50_000


def test_the_map_names_every_room():
    tree = CONTRIBUTING[CONTRIBUTING.index("### Where things are") :].partition("## Walks")[0]
    for path in (ROOT / "vitreg").iterdir():
        if not path.name.startswith("__") and (path.suffix == ".py" or (path / "__init__.py").exists()):
            assert re.search(rf"\b{re.escape(path.name)}", tree), f"{path.name} is not in CONTRIBUTING's map"


@pytest.mark.parametrize("script", ["install", "demo", "check", "docs"])
def test_scripts_are_executable(script):
    assert (ROOT / "scripts" / script).stat().st_mode & 0o111
