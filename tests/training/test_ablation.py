"""The ablation: it trains what is asked for and no more, says what came out, and refuses before it trains."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.text import Text
from timm.models import create_model, save_for_hf
from training_runs import CPU, Hit, Hits, save_classes, tiny

from vitreg.errors import DataError, OutputError
from vitreg.plots.style import png
from vitreg.training.ablation import Ablation, ablate
from vitreg.training.log import read_log
from vitreg.training.loop import Run

pytestmark = pytest.mark.slow

TASK, METRIC = "classification", "top-1"
SHORT = {"steps": 3, "diagnose_every": 2, "batch_size": 8}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return save_classes(tmp_path_factory.mktemp("photos"), train=6)


@pytest.fixture(scope="module")
def ran(data, tmp_path_factory) -> tuple[Path, Ablation]:
    out = tmp_path_factory.mktemp("ablation")
    found = ablate(tiny(data, **SHORT), [4, 0], out, CPU, {TASK: data, f"{TASK}.seed": "3"})
    assert found is not None
    return out, found


def test_each_number_is_trained_into_a_folder_of_its_own(ran):
    out, found = ran
    assert [arm.registers for arm in found.arms] == [0, 4]
    for arm in found.arms:
        log = read_log(out / f"registers-{arm.registers}")
        assert log[-1]["step"] == 3
        assert arm.logged == {n: log[-1][n] for n in ("outliers", "norm_ratio", "attention_outliers", "top1")}
        assert arm.results[TASK].seed == 3
    plain, more = (arm.cost for arm in found.arms)
    assert more.parameters - plain.parameters == (4 - 1) * 48  # CLS has no position beside registers
    assert more.flops > plain.flops
    assert found.arms[0].speed.ratio == found.arms[0].speed.best_ratio == 1


def test_results_are_those_of_the_trained_models(ran):
    """As the runs logged them, which measured at the end."""
    found = [arm.results[TASK].metrics[METRIC].value for arm in ran[1].arms]
    assert 100 * np.array(found) == pytest.approx([arm.logged["top1"] for arm in ran[1].arms], abs=1e-3)
    assert found[0] != found[1]


def test_the_same_call_trains_nothing_again(ran, data, monkeypatch):
    out, before = ran

    def train_a_step(*args):
        raise AssertionError

    monkeypatch.setattr("vitreg.training.loop._Training._one_step", train_a_step)
    after = ablate(tiny(data, **SHORT), [0, 4], out, CPU)
    assert [arm.logged for arm in after.arms] == [arm.logged for arm in before.arms]
    with pytest.raises(AssertionError):
        ablate(tiny(data, **SHORT), [1], out, CPU)


def test_a_terminated_one_reports_nothing_and_goes_on(data, tmp_path, monkeypatch):
    monkeypatch.setattr(Hits, "now", Hit("term", 2))
    stopped = ablate(tiny(data, **SHORT), [1, 2], tmp_path, CPU)
    assert isinstance(stopped, Run)
    assert (stopped.step, stopped.stopped, stopped.interrupted) == (2, True, False)
    assert not (tmp_path / "registers-2").exists()
    monkeypatch.setattr(Hits, "now", Hit())
    found = ablate(tiny(data, **SHORT), [1], tmp_path, CPU)
    assert found is not None
    assert "here: over those with 1 registers" in str(found)


def test_the_table_has_the_figures(ran):
    text = str(ran[1])
    assert max(map(len, text.splitlines())) <= 140
    rows = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    four = ran[1].arms[1]
    assert f"{four.logged['top1']:.1f}%" in rows["4"]
    assert f"{four.cost.parameters:,}" in rows["4"]
    assert f"{four.results[TASK].metrics[METRIC].value:.2%} [" in rows["4"]
    assert "+1.62%" in rows["ViT-L/14"]
    assert f"+{four.cost.flops / ran[1].arms[0].cost.flops - 1:.2%}" in rows["here"]
    assert "< 2%" in rows["Darcet"]


def test_it_is_saved_with_paired_differences(ran, tmp_path):
    found = ran[1]
    assert [path.name for path in found.save(tmp_path)] == ["ablation.json", "ablation.png"]
    document = json.loads((tmp_path / "ablation.json").read_text())
    assert document["about"] == found.about
    assert document["flops_growth"]["ViT-L/14"][1] == pytest.approx(0.0162, abs=1e-4)
    four = document["arms"][1]
    change = four["differences"][TASK][METRIC]
    values = [arm["results"][TASK]["metrics"][METRIC]["value"] for arm in document["arms"]]
    assert change["value"] == pytest.approx(values[1] - values[0])
    with pytest.raises(OutputError, match="there is no folder"):
        found.save(tmp_path / "nowhere")


def test_the_figure_shows_all_and_is_the_same_every_time(ran):
    found = ran[1]
    assert png(found.figure(), dpi=60) == png(found.figure(), dpi=60)
    texts = [text.get_text() for text in found.figure().findobj(Text)]
    for words in ("top-1", f"{TASK} {METRIC}", "ViT-L/14", "claimed at most (Darcet et al.)"):
        assert words in texts
    bars = found.figure().axes[2].collections[0].get_segments()
    assert [(ends[:, 0].mean(), ends[0, 1]) for ends in bars] == [(1, 0.02)]


def test_without_diagnosis_or_evals(ran):
    bare = replace(ran[1], arms=[replace(arm, logged={}, results={}) for arm in ran[1].arms])
    assert "-" in str(bare)
    assert png(bare.figure(), dpi=60)


def test_registers_for_a_pretrained_model(data, tmp_path):
    made = create_model("vit_tiny_patch16_224", depth=2, embed_dim=48, num_heads=3, num_classes=3)
    args = {"depth": 2, "embed_dim": 48, "num_heads": 3}
    save_for_hf(made, str(tmp_path / "model"), model_args=args, safe_serialization=True)
    recipe = tiny(data, **SHORT, pretrained=str(tmp_path / "model"), drop_path=0.0)
    found = ablate(recipe, [0, 2], tmp_path / "out", CPU)
    assert found is not None
    plain, more = (arm.cost for arm in found.arms)
    assert more.parameters - plain.parameters == 2 * 48
    assert more.flops > plain.flops


@pytest.mark.parametrize(
    ("registers", "evals", "message"),
    [
        (
            [],
            {},
            r"registers \(none\): expected one or more numbers, 0 or larger, each once, such as 0 1 2 4",
        ),
        ([0, 2, 2], {}, "registers 0 2 2: expected"),
        ([4, -1], {}, "registers 4 -1: expected"),
        ([0, 1], {"segmentatoin": "d"}, r"no task 'segmentatoin'\. Did you mean segmentation\?"),
        ([0, 1], {"knn": "no/such"}, r"there is no no/such: the task knn takes a folder with train/"),
        ([0, 1], {"knn": ".", "knn.kk": "3"}, r"the task knn has no setting 'kk'"),
        ([0, 1], {"knn.k": "3"}, r"the task knn has settings but no data: give knn=DIR, a folder with"),
        ([0, 1], {"vlm": "."}, r"the task vlm needs more than a ViT: run `vitreg eval vlm` by itself"),
    ],
)
def test_what_cannot_be_is_refused_before_training(registers, evals, message, tmp_path):
    with pytest.raises(DataError, match=message):
        ablate(tiny("no data"), registers, tmp_path / "out", CPU, evals)
    assert not (tmp_path / "out").exists()
