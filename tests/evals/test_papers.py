"""`vitreg papers`: every row can be run, and one does, from its weights to its place in the list."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from catalog import CATALOG, images
from PIL import Image
from typer.testing import CliRunner

import vitreg
from vitreg.cli.main import app
from vitreg.config.settings import with_settings
from vitreg.data.evenly_spaced import evenly_spaced
from vitreg.errors import DataError, ModelLoadError
from vitreg.evals.papers import DATA, TABLES, FixRecipe, Row, Table, overview, run_table, table_text
from vitreg.evals.papers.kept import keep, measured
from vitreg.evals.papers.printed import command, number
from vitreg.evals.papers.running import found_fix, run_row, some_photos
from vitreg.evals.tasks import find_task
from vitreg.features.framing import Framing, Normalisation
from vitreg.fixes.attention_bias import AttentionBias
from vitreg.phantoms.phantom import plant
from vitreg.training.recipe import bundled

ROWS = [(name, row) for name, table in TABLES.items() for row in table.rows]
RUNNABLE = [(name, row) for name, row in ROWS if not row.needs]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VITREG_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("VITREG_DATA", raising=False)
    return tmp_path / "cache"


# -- the tables --------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", sorted({row.task for _, row in ROWS if row.task}))
def test_every_setting_exists(task: str) -> None:
    """Of rows that cannot be run, too: a wrong one would wait there for the weights."""
    config = find_task(task).config()
    rows = [row for _, row in ROWS if row.task == task]
    for row in rows:
        settings = {key: value.format(data="/data") for key, value in row.settings.items()}
        changed = with_settings(config, settings)
        assert all(getattr(changed, key) != getattr(config, key) or key == "features" for key in settings)


def test_every_model_is_known_to_its_library() -> None:
    open_clip = pytest.importorskip("open_clip")
    for name, row in RUNNABLE:
        scheme, _, rest = row.model.partition(":")
        if scheme == "timm":
            assert rest in timm.list_pretrained(), name
        elif scheme == "open_clip":
            architecture, _, tag = rest.partition("/")
            assert tag in open_clip.list_pretrained_tags_by_model(architecture), name
        else:
            assert scheme == "hf", name
            assert rest.count("/") == 1, name


def test_rows_are_complete_and_told_apart() -> None:
    for name, table in TABLES.items():
        names = [row.name for row in table.rows]
        assert len(set(names)) == len(names), name
    for name, row in ROWS:
        assert row.figures or row.remark, (name, row.name)
        assert row.needs or (row.model and row.task and row.data in DATA), (name, row.name)
        assert not row.data or row.data in DATA


def test_the_papers_figures_are_in_the_units_of_the_metrics() -> None:
    """Shares between 0 and 1: one in percent would be far from what is measured."""
    for name, row in ROWS:
        for metric, value in row.figures.items():
            plain = metric.startswith(("RMSE", "distance", "L2 error"))
            assert plain or 0.1 < value < 1, (name, row.name, metric)


def test_some_figures_at_random() -> None:
    def figures(table: str, row: str) -> list[float]:
        return next(list(x.figures.values()) for x in TABLES[table].rows if x.name == row)

    assert figures("test-time-features", "DINOv2-L, test-time register: ade20k") == [0.4913]
    assert figures("test-time-features", "OpenCLIP B/16: nyu") == [0.6025]
    assert figures("registers-tokens", "cars") == pytest.approx([0.108, 0.852, 0.915])
    assert figures("registers-regimes", "OpenCLIP B/16, 4 registers: nyu") == [0.661]
    assert figures("registers-discovery", "DINOv2, 4 registers: voc12") == [0.6]
    assert figures("test-time-tokens", "trained registers: cifar100") == [0.93]


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("mIoU", 0.4913, "49.13%"),
        ("mIoU", 0.4, "40.0%"),
        ("RMSE", 0.3876, "0.3876"),
        ("top-1", 0.599, "59.9%"),
    ],
)
def test_figures_are_written_as_in_papers(metric: str, value: float, text: str) -> None:
    assert number(metric, value) == text


# -- the list ----------------------------------------------------------------------------------------


def test_the_list_names_all_tables_and_what_keeps_rows_from_running() -> None:
    text = overview()
    assert all(f"  {name} " in text for name in TABLES)
    assert "arXiv 2309.16588" in text
    assert "measured here" not in text
    for name in TABLES:
        shown = table_text(name)
        assert shown.count("not run: needs") == len(TABLES[name].rows)
    assert "needs weights that were never published" in table_text("registers-regimes")
    text = " ".join(table_text("registers-ablation").split())
    recipes = re.findall(r"`vitreg train (\w+)", text)
    assert set(recipes) == {"self_supervised_vit_l", "ablation"}
    assert set(recipes) <= set(bundled())


def test_a_rows_command_is_one_that_the_command_line_takes() -> None:
    row = next(row for _, row in RUNNABLE if row.data == "coco20k" and row.recipe)
    text = command(row)
    assert text.startswith("vitreg eval discovery timm:vit_large_patch14_dinov2.lvd142m $VITREG_DATA/coco ")
    assert "--set files=$VITREG_DATA/coco/coco20k.txt" in text
    assert text.endswith("--fix FIX (45 neurons up to block 17, 1 register)")


def test_an_unknown_table_is_an_error_with_the_nearest() -> None:
    with pytest.raises(DataError, match="Did you mean test-time-tokens"):
        table_text("test-time-token")


# -- running -----------------------------------------------------------------------------------------


def segmentation_data(root: Path, count: int = 12) -> Path:
    """gtsegs_ijcv.mat in small: noise photos with a rectangle as the foreground."""
    h5py = pytest.importorskip("h5py")
    random = np.random.default_rng(0)
    root.mkdir()
    with h5py.File(root / "gtsegs_ijcv.mat", "w") as file:
        rows = {
            name: file.create_dataset(f"value/{name}", (count, 1), dtype=h5py.ref_dtype)
            for name in ("img", "gt")
        }
        for i in range(count):
            small = random.integers(0, 256, (8, 10, 3), dtype=np.uint8)
            photo = np.array(Image.fromarray(small).resize((50, 40)))
            mask = np.zeros((40, 50), np.uint8)
            mask[10 : 20 + i, 5:30] = 1
            rows["img"][i, 0] = file.create_dataset(f"i{i}", data=photo.T).ref
            cell = file.create_dataset(f"c{i}", (1, 1), dtype=h5py.ref_dtype)
            cell[0, 0] = file.create_dataset(f"m{i}", data=mask.T).ref
            rows["gt"][i, 0] = cell.ref
    return root


def tiny() -> vitreg.Backbone:
    """A small ViT with planted artifacts."""
    entry = CATALOG["timm vit"]
    squeeze = Framing(Normalisation((2.0,) * 3, (-1.0,) * 3), size=entry.image_size)
    vit = vitreg.wrap(entry.module(), squeeze, image_size=entry.image_size)
    return plant(vit, images(vit, 32), layer=1, rate=0.05).vit


def fake_load(calls: list[str]) -> Callable[..., vitreg.Backbone]:
    vit = tiny()

    def load(name: str, **options: object) -> vitreg.Backbone:
        calls.append(f"{name} {options['size']}")
        if name.startswith("open_clip"):
            raise ModelLoadError(f"could not load {name}: offline.")
        return replace(vit, name=name)

    return load


def test_a_table_runs_from_the_weights_to_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr("vitreg.models.loading.load", fake_load(calls))
    data, cli = segmentation_data(tmp_path / "data"), CliRunner()
    arguments = ["papers", "--run", "test-time-segmentation", "--data", str(data), "--workers", "0"]

    first = cli.invoke(app, arguments)
    assert first.exit_code == 0, first.output
    assert calls[:2] == ["timm:vit_large_patch14_dinov2.lvd142m 224"] * 2
    assert len(calls) == 4
    assert "OpenCLIP B/16: not run: could not load open_clip:ViT-B-16/laion2b_s34b_b88k" in first.output

    shown = cli.invoke(app, ["papers", "test-time-segmentation"]).output
    plain, fixed = (
        measured("test-time-segmentation", row) for row in TABLES["test-time-segmentation"].rows[:2]
    )
    assert plain is not None
    assert fixed is not None
    assert (plain["fix"], fixed["fix"]) == (None, "registers (45 neurons, 1 register tokens)")
    assert plain["config"]["side"] == 224
    assert plain["metrics"]["mIoU"] != fixed["metrics"]["mIoU"]
    for result, paper in ((plain, "38.3%"), (fixed, "38.9%")):
        assert f"paper {paper}" in shown
        assert f"here {result['metrics']['mIoU']['value']:.2%} [" in shown
    assert shown.count("not run: needs the weights of open_clip:ViT-B-16") == 2
    listed = " ".join(cli.invoke(app, ["papers"]).output.split())
    assert "4 rows, 2 measured here" in listed

    again = cli.invoke(app, arguments)
    assert again.exit_code == 0
    assert again.output.count("measured before") == 2
    assert len(calls) == 6  # those that failed, only
    assert len(cli.invoke(app, [*arguments, "--again"]).output.split("measured before")) == 1
    assert len(calls) == 10


@pytest.mark.parametrize("name", ["lost", "test-time-vlm"])
def test_offline_each_row_names_the_weights_it_lacks(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for row in TABLES[name].rows:
        (tmp_path / DATA[row.data].path).mkdir(parents=True, exist_ok=True)
    with pytest.raises(DataError, match=f"no row of {name} could be run"):
        run_table(name, tmp_path, lambda row, build: build(row.model, size=row.size), workers=0)
    lines = capsys.readouterr().out.splitlines()
    for line, row in zip(lines, TABLES[name].rows, strict=True):
        assert line.startswith(f"{row.name}: not run: could not load {row.model}: ")
        assert "Check the name and the network" in line
    assert not list((tmp_path / "cache").rglob("*.json"))


def test_without_the_data_nothing_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def load(row: Row, build: object) -> vitreg.Backbone:
        raise AssertionError("a download for nothing")

    for name in TABLES:
        with pytest.raises(DataError, match=f"no row of {name} could be run"):
            run_table(name, tmp_path, load)
        lines = capsys.readouterr().out.splitlines()
        for line, row in zip(lines, TABLES[name].rows, strict=True):
            lacks = row.needs or f"there is no {tmp_path / DATA[row.data].path}"
            assert lacks in line
            assert row.needs or f"the weights of {row.model}" in line


def test_the_folder_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="expected --data ROOT, or VITREG_DATA"):
        run_table("lost", None, lambda row, build: tiny())
    monkeypatch.setenv("VITREG_DATA", str(tmp_path / "there"))
    result = CliRunner().invoke(app, ["papers", "--run", "lost"])
    assert isinstance(result.exception, DataError)
    assert f"there is no {tmp_path / 'there' / 'VOCdevkit/VOC2007'}" in result.output


def test_a_row_that_runs_out_of_memory_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = segmentation_data(tmp_path / "data", count=3)
    row = TABLES["test-time-segmentation"].rows[0]
    table = Table("paper", "title", (replace(row, name="large"), replace(row, name="small")))
    monkeypatch.setitem(TABLES, "two", table)

    def load(row: Row, build: object) -> vitreg.Backbone:
        if row.name == "large":
            raise RuntimeError("CUDA out of memory")
        return tiny()

    run_table("two", data, load, workers=0)
    assert "large: not run: CUDA out of memory" in capsys.readouterr().out
    assert measured("two", table.rows[0]) is None
    assert measured("two", table.rows[1]) is not None


def test_a_row_that_has_changed_was_not_measured(tmp_path: Path, own_cache: Path) -> None:
    data = segmentation_data(tmp_path / "data", count=3)
    row = replace(TABLES["test-time-segmentation"].rows[0], model="tiny")
    keep("t", row, run_row(row, data, lambda row, build: tiny(), workers=0))
    assert measured("t", row) is not None
    assert measured("t", replace(row, figures={}, remark="other words")) is not None
    assert measured("t", replace(row, settings={"side": "112"})) is None
    assert measured("t", replace(row, recipe=FixRecipe(1))) is None
    assert measured("u", row) is None
    file = next(own_cache.rglob("*.json"))
    file.write_text(file.read_text()[:-20])
    assert measured("t", row) is None
    file.write_text(json.dumps({"row": {}}))
    assert measured("t", row) is None


def test_a_metric_that_the_task_does_not_give_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = segmentation_data(tmp_path / "data", count=3)
    row = replace(
        TABLES["test-time-segmentation"].rows[0], figures={"mIoU": 0.3, "sIoU": 0.2}, remark="words"
    )
    monkeypatch.setitem(TABLES, "t", Table("paper", "title", (row,)))
    run_table("t", data, lambda row, build: tiny(), workers=0)
    shown = table_text("t")
    assert "sIoU  paper 20.0%   here not among the results" in shown
    assert "  words\n" in shown
    assert "calling every pixel background" in shown


# -- the fix of a row --------------------------------------------------------------------------------


def test_recipes_make_the_papers_fixes(tmp_path: Path) -> None:
    vit, folder = tiny(), tmp_path / "photos"
    folder.mkdir()
    for i in range(12):
        small = np.random.default_rng(i).integers(0, 256, (8, 10, 3), dtype=np.uint8)
        Image.fromarray(small).resize((50, 40)).save(folder / f"{i}.png")
    paths, config = sorted(folder.iterdir()), with_settings(find_task("tokens").config(), {"workers": "0"})

    def found(recipe: FixRecipe) -> vitreg.fixes.Fix:
        return found_fix(recipe, vit, paths, config)

    register = found(FixRecipe(top_k=3, top_layer=1))
    assert isinstance(register, vitreg.TestTimeRegisters)
    assert (register.registers, register.neurons.top_k, register.neurons.method) == (1, 3, "paper")
    assert max(register.neurons.by_layer) <= 1
    assert found(FixRecipe(top_k=3, registers=4)).registers == 4  # type: ignore[attr-defined]
    zeroed = found(FixRecipe(top_k=3, top_layer=17, registers=0))  # a layer that this model does not have
    assert zeroed.registers == 0  # type: ignore[attr-defined]
    assert isinstance(found(FixRecipe(top_k=3, bias=True)), AttentionBias)
    assert found(FixRecipe()).neurons.search  # as few as suffice
    with zeroed.applied_to(vit), torch.no_grad():
        vit(images(vit))


def test_a_fix_is_found_on_the_rows_own_photos(tmp_path: Path) -> None:
    """Not on masks, and not on the training set."""
    config = find_task("discovery").config()
    row = Row("r", "m", "discovery", "voc12")
    for folder in ("JPEGImages", "SegmentationClass"):
        (tmp_path / "VOC2012" / folder).mkdir(parents=True)
        for i in range(300):
            Image.new("L", (4, 4)).save(tmp_path / "VOC2012" / folder / f"{i:03}.png")
    with some_photos(row, tmp_path / "VOC2012", config) as paths:
        assert [int(path.stem) for path in paths] == evenly_spaced(300, 256)
        assert {path.parent.name for path in paths} == {"JPEGImages"}

    nyu = tmp_path / "nyu_depth_v2"
    nyu.mkdir()
    for name in ("a.jpg", "a.png", "b.jpg", "b.png"):
        Image.new("L", (4, 4)).save(nyu / name)
    (nyu / "nyu_test.txt").write_text("a.jpg a.png 518.8\nb.jpg b.png 518.8\n")
    with some_photos(replace(row, data="nyu"), nyu, config) as paths:
        assert [path.name for path in paths] == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize(
    ("task", "data", "settings"),
    [
        ("tokens", "imagenette", {"limit": "60"}),
        ("linear", "imagenette", {"limit": "100", "protocol": "dinov2", "steps": "3"}),
        ("position", "imagenette/val", {"limit": "24"}),
        ("reconstruction", "imagenette/val", {"limit": "24"}),
        ("discovery", "VOCdevkit/VOC2012", {"limit": "4", "method": "lost"}),
        ("segmentation", "camvid", {"limit": "3", "steps": "2"}),
        ("depth", "depth", {"limit": "8", "only": "slam5", "unit": "mm", "steps": "2"}),
    ],
)
def test_every_figure_is_of_a_metric_that_its_task_gives(
    shared: Path, task: str, data: str, settings: dict[str, str]
) -> None:
    vit = tiny()
    config = with_settings(replace(find_task(task).config(), workers=0), settings)
    fix = vitreg.TestTimeRegisters({1: [0]})
    with fix.applied_to(vit):
        result = find_task(task).evaluate(vit, shared / "data" / data, config)
    wanted = {metric for _, row in RUNNABLE if row.task == task for metric in row.figures}
    assert wanted - set(result.metrics) <= {"trained register"}  # this model has none
