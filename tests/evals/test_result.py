"""Metrics, their intervals and differences; settings from text; the command's own errors."""

import json

import numpy as np
import pytest
from command_line import fails

import vitreg
from vitreg.config.settings import with_settings
from vitreg.data.datasets.classes import by_wordnet, splits
from vitreg.errors import DataError, MissingExtraError
from vitreg.evals import TASKS, Metric, Result, compare, differences, find_task
from vitreg.evals.knn import KnnConfig
from vitreg.features.config import Config, default_cache


def result(*metrics: Metric, **changes) -> Result:
    named = {f"m{i}": metric for i, metric in enumerate(metrics)}
    return Result("task", "model", "data", named, len(metrics[0].samples), {}, **changes)


def test_a_mean_and_its_interval():
    values = np.random.default_rng(0).normal(3, 2, 400)
    found = Metric.mean(values).estimate()
    assert found.value == pytest.approx(values.mean())
    half = 1.96 * values.std() / 20
    assert (found.low, found.high) == (
        pytest.approx(values.mean() - half, abs=0.03),
        pytest.approx(values.mean() + half, abs=0.03),
    )


def test_images_without_a_say_are_left_out():
    found = Metric.mean([1, np.nan, 3])
    assert found.value == 2
    assert 1 <= found.estimate().low < found.estimate().high <= 3


def test_a_ratio_of_sums_is_no_mean_of_ratios():
    metric = Metric(np.array([[1.0, 1.0], [1.0, 3.0]]), reduce=lambda means: means[:, 0] / means[:, 1])
    assert metric.value == 0.5


def test_differences_are_paired_over_images():
    random = np.random.default_rng(0)
    hard = random.normal(0, 10, 200)
    before, after = Metric.mean(hard), Metric.mean(hard + 1 + random.normal(0, 0.1, 200))
    change = after.less(before)
    assert change.value == pytest.approx(1, abs=0.03)
    assert 0.9 < change.low < change.high < 1.1
    assert before.estimate().high - before.estimate().low > 2
    unpaired = after.less(Metric.mean(hard[:100]))
    assert unpaired.high - unpaired.low > 2


def test_a_table_of_two_results():
    before = result(Metric.mean([0, 1], ".0%"), Metric.mean([5, 5]))
    after = result(Metric.mean([1, 1], ".0%"), fix="registers", notes=("n",))
    assert compare(before, after).full().splitlines()[1:] == [
        "      as it is        registers          difference",
        "  m0  50% [0%, 100%]  100% [100%, 100%]  +50% [+0%, +100%]",
        "  m1  5 [5, 5]",
        "n",
    ]
    assert differences(before, after).keys() == {"m0"}


def test_json_says_all_that_is_needed_to_repeat_it():
    found = result(Metric.mean([1.0, 2.0]), seed=3, notes=("said",)).to_json()
    assert found["metrics"]["m0"].keys() == {"value", "low", "high"}
    assert (found["n"], found["seed"], found["notes"], found["task"]) == (2, 3, ["said"], "task")
    assert found["versions"]["vitreg"] == vitreg.__version__
    assert json.loads(json.dumps(found)) == found


# -- settings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "value"), [("10", 10), ("10,20", (10, 20)), ("[10, 20]", (10, 20))])
def test_settings_from_text(text, value):
    assert with_settings(KnnConfig(), {"k": text}).k == value


def test_settings_of_text_with_and_without_commas():
    assert with_settings(KnnConfig(), {"poolings": "cls,mean"}).poolings == ("cls", "mean")
    assert with_settings(KnnConfig(), {"poolings": "cls"}).poolings == "cls"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"limits": "3"}, "no setting 'limits'. Did you mean limit?"),
        ({"seed": "many"}, "setting seed=many: expected int."),
        ({"limit": "1.5"}, "setting limit=1.5: expected int | None."),
    ],
)
def test_wrong_settings_are_named(settings, says):
    with pytest.raises(DataError, match=says.replace("|", r"\|")):
        with_settings(Config(), settings)


def test_results_name_settings_and_not_machines():
    assert Config(limit=3, workers=2, batch_size=7).settings() == {"limit": 3}


def test_the_cache_is_where_the_user_wants_it(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("VITREG_CACHE", raising=False)
    assert default_cache() == tmp_path / "vitreg"
    monkeypatch.setenv("VITREG_CACHE", str(tmp_path / "mine"))
    assert default_cache() == tmp_path / "mine"


def test_every_task_can_be_run():
    for task in TASKS.values():
        assert issubclass(task.config, Config), task.name
        assert callable(task.evaluate), task.name
        assert callable(task.load), task.name
    with pytest.raises(DataError, match=r"no task 'segmentatoin'\. Did you mean segmentation\?"):
        find_task("segmentatoin")


def test_a_missing_library_names_the_extra(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name="sklearn")

    monkeypatch.setattr("vitreg.evals.tasks.import_module", missing)
    with pytest.raises(MissingExtraError, match=r"sklearn is not installed.*vitreg\[eval\]"):
        _ = find_task("linear").module


# -- labelled photos ---------------------------------------------------------------------------------


def tree(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def test_classes_from_wordnet_ids_or_as_many_folders(tmp_path):
    ids = tree(
        tmp_path / "a", "val/n01440764/x.jpg", "val/n01443537_goldfish.png", "train/x.jpg", "val/.y.jpg"
    )
    found = by_wordnet(ids, 1000)
    assert (found.labels, [path.name for path in found.paths]) == (
        (0, 1),
        ["x.jpg", "n01443537_goldfish.png"],
    )
    folders = tree(tmp_path / "b", "cat/1.jpg", "dog/1.jpg", "dog/2.jpg")
    assert by_wordnet(folders, 2).labels == (0, 1, 1)


def test_folders_that_are_links_count(tmp_path):
    tree(tmp_path / "real", "n01440764/x.jpg")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/n01440764").symlink_to(tmp_path / "real/n01440764")
    assert by_wordnet(tmp_path / "linked", 1000).labels == (0,)


def test_train_and_val(tmp_path):
    root = tree(tmp_path, "train/cat/1.jpg", "train/dog/a/1.jpg", "val/dog/1.jpg", "val/cat/9.jpg")
    train, val = splits(root)
    assert (train.classes, train.labels, val.labels) == (("cat", "dog"), (0, 1), (0, 1))


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["train/a/1.jpg", "train/b/1.jpg"], "there is no folder .*val. Expected train/CLASS"),
        (["train/a/1.jpg", "val/a/1.jpg"], "holds one class only .a."),
        (["train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg", "val/c/1.jpg"], "other classes: b, c in one only"),
        (["train/a/1.jpg", "train/b/1.jpg", "train/1.jpg", "val/a/1.jpg"], "lies in no class's folder"),
        (["train/a/1.txt", "val/a/1.jpg"], "holds no photo"),
    ],
)
def test_bad_class_folders(tmp_path, names, says):
    with pytest.raises(DataError, match=says):
        splits(tree(tmp_path, *names))


@pytest.mark.parametrize(
    ("names", "says"),
    [(["a/1.jpg", "b/2.jpg"], "2 of 2 photos have no class of this 1000-way head"), ([], "no folder")],
)
def test_photos_without_classes(tmp_path, names, says):
    with pytest.raises(DataError, match=says):
        by_wordnet(tree(tmp_path / "x", *names), 1000)


# -- the command -------------------------------------------------------------------------------------


def test_eval_with_and_without_a_fix(run, model, classes, tmp_path):
    vitreg.TestTimeRegisters({1: [3]}).save(tmp_path / "fix")
    out = tmp_path / "out.json"
    common = ["eval", "classification", model, classes, "--cache", tmp_path / "cache", "--json", out]
    code, said, _ = run(*common)
    assert (code, json.loads(out.read_text())["n"]) == (0, 3)
    assert "top-1" in said
    fails(run(*common), "out.json exists already", "--overwrite")
    code, said, _ = run(*common, "--fix", tmp_path / "fix", "--compare", "--overwrite")
    found = json.loads(out.read_text())
    assert code == 0
    assert (found["without"]["fix"], found["with"]["fix"]) == (
        None,
        "registers (1 neurons, 1 register tokens)",
    )
    assert found["difference"].keys() == {"top-1", "top-5"}
    assert "registers (1 neuron" in said
    assert list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--compare"], "--compare needs --fix"),
        (["--set", "colour=3"], "no setting 'colour'"),
        (["--set", "seed"], "expected KEY=VALUE"),
        (["--figure", "f.png"], "draws no figure"),
        (["--json", "no/where.json"], "no folder"),
    ],
)
def test_eval_says_what_is_wrong_in_a_line(run, model, classes, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    code, _, error = run("eval", "classification", model, classes, "--no-cache", *arguments)
    assert code == 1
    assert says in error
    assert error.strip().splitlines()[-1].startswith("vitreg: ")


def test_a_model_without_a_head_is_sent_elsewhere(run, classes):
    code, _, error = run("eval", "classification", "hf:dinov2", classes, "--random-weights", "--size", 28)
    assert code == 1
    assert "Use knn or linear" in error
