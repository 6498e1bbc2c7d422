"""`vitreg demo`: the bundled example, and a real model."""

import json
import re
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from drawn_reports import make_report

import vitreg
from vitreg.cli.main import main
from vitreg.demo import run, run_real
from vitreg.diagnosis.version_figures import before_after
from vitreg.phantoms.bundled import HELD_OUT, PLANTED_LAYER, measure, object_cover, scenes
from vitreg.viewing.at_hand import DEFAULT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What the demo says, in one line, and the folder that it writes."""
    out = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr("rich.console.Console.print", lambda self, *what, **how: said.extend(what))
        run(out)
    return said, out


def words(said):
    return " ".join(" ".join(str(part) for part in said).split())


def cells(said, row):
    """A row of the table, as numbers: as trained, phantom, fixed."""
    (table,) = (part for part in said if hasattr(part, "columns"))
    first = list(table.columns[0].cells)
    at = next(i for i, name in enumerate(first) if name.startswith(row))
    found = [list(column.cells)[at] for column in table.columns[1:]]
    return [float(re.sub("[%x]", "", text)) for text in found]


def test_the_phantom_is_found_exactly(told):
    text = words(told[0])
    assert "It has no artifacts" in text
    found = re.search(r"(\d+) of (\d+) planted patches found, (\d+) false alarms", text)
    assert found[1] == found[2] != "0"
    assert found[3] == "0"
    assert "Register neurons found: 4 of 4 planted, of 4 named." in text


def test_the_fix_restores_what_the_phantom_spoiled(told):
    said, _ = told
    assert "It helps: it removes the artifacts" in words(said)
    assert cells(said, "outlier patches")[::2] == [0, 0]
    before, phantom, fixed = cells(said, "attention on outliers")
    assert before == fixed == 0
    assert phantom > 5
    before, phantom, fixed = cells(said, "attention on the object")
    assert phantom < before - 1  # of all photos, most of which have no outlier
    assert fixed > phantom
    top1 = cells(said, "top-1")
    assert top1[2] >= top1[1] - 1


def test_what_it_writes(told):
    _, out = told
    report = (out / "report.html").read_text()
    assert "artifacts were planted here on purpose" in report
    assert "The fix helps" in report
    assert report.count('data-version="1"') == 3  # before and after: norms, attention, features
    assert vitreg.load_fix(out / "fix").neurons.by_layer
    assert json.loads((out / "phantom.json").read_text())["layer"] == PLANTED_LAYER
    assert matplotlib.image.imread(out / "before_after.png").std() > 0.1


def test_the_example_knows_its_shapes_and_looks_at_them():
    vit, shown = vitreg.example(4)
    assert [scene.photo.size[::-1] for scene in shown] == [vit.image_size] * 4
    found = measure(vit, scenes(200, HELD_OUT))
    assert found.top1 > 0.8
    assert found.on_object > 1.8 * found.area


def test_an_object_covers_its_patches():
    (scene,) = scenes(1)
    cover = object_cover([scene], (12, 12))
    by_hand = [
        [scene.mask[8 * r : 8 * r + 8, 8 * c : 8 * c + 8].mean() for c in range(12)] for r in range(12)
    ]
    np.testing.assert_allclose(cover.reshape(12, 12), by_hand, atol=1e-6)


def test_nothing_to_measure():
    with pytest.raises(vitreg.DataError, match="no photos to measure, expected at least one"):
        measure(vitreg.example(1)[0], [])


def test_the_example_is_small():
    """It is in the repository and in the wheel."""
    folder = Path(vitreg.__file__).parent / "phantoms" / "bundled"
    assert 1e6 < sum(path.stat().st_size for path in folder.iterdir() if path.is_file()) < 4e6


# -- a real model ----------------------------------------------------------------------------------


def test_a_hub_out_of_reach_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["vitreg", "demo", "--real", "-o", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        main()
    lines = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 1
    assert len(lines) == 1
    assert lines[0].startswith(f"vitreg: could not load {DEFAULT}")
    assert "Check the name and the network" in lines[0]
    assert not (tmp_path / "out").exists()


def test_photos_of_ones_own_need_a_real_model(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["vitreg", "demo", "--images", "photos/"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "add --real" in capsys.readouterr().err


def test_the_real_story(shared, tmp_path, capsys):
    model = shared / "models/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    run_real(tmp_path, model=str(model))
    said = " ".join(capsys.readouterr().out.split())
    assert "as published fixed" in said
    assert "verdict artifacts no artifacts" in said
    assert vitreg.load_fix(tmp_path / "fix").neurons.by_layer[7] == [417]
    assert matplotlib.image.imread(tmp_path / "before_after.png").std() > 0.1


# -- the picture -----------------------------------------------------------------------------------


def test_versions_of_other_photos_are_refused():
    one, other = make_report(), make_report(examples=2)
    with pytest.raises(ValueError, match="expected diagnoses of the same photos"):
        before_after([("before", one), ("after", other)])
