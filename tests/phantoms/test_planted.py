"""A phantom is called one wherever it is shown, by what was done to it and not by its name."""

import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from catalog import CATALOG
from matplotlib.text import Text
from phantoms import Member
from torch import Tensor

import vitreg
from vitreg.diagnosis.emergence import Emergence
from vitreg.diagnosis.result import Diagnosis, Sink
from vitreg.diagnosis.wording import name_of_queries, words_of_sink
from vitreg.evals.result import Metric, concluded
from vitreg.features.config import Config
from vitreg.fixes import TestTimeRegisters
from vitreg.models.backbone import Backbone
from vitreg.phantoms import plant_attention_outliers, plant_patch_outliers, plant_position_outliers
from vitreg.phantoms.locality import plant_lost_locality
from vitreg.phantoms.low_norm import plant_low_norms
from vitreg.phantoms.massive_dimensions import plant_massive_dimensions
from vitreg.phantoms.position_pattern import plant_position_pattern
from vitreg.phantoms.sinks_without_norm import plant_sinks
from vitreg.phantoms.token_content import plant_token_content
from vitreg.printing import PHANTOM
from vitreg.reports.parts import key_facts
from vitreg.reports.report import write

MEMBER = Member("timm vit")
PLANTERS: dict[str, Callable[[Backbone, Tensor], Any]] = {
    "neurons": lambda vit, x: vitreg.plant(vit, x, 1),
    "ramp": lambda vit, x: vitreg.plant(vit, x, [0, 1], activation="ramp"),
    "positions": lambda vit, x: plant_position_outliers(vit, [(0, 0), (2, 3)]),
    "attention": lambda vit, x: plant_attention_outliers(vit, x, 1),
    "patches": lambda vit, x: plant_patch_outliers(vit, x),
    "locality": lambda vit, x: plant_lost_locality(vit, 1),
    "low norms": lambda vit, x: plant_low_norms(vit, x, 1),
    "massive dimensions": lambda vit, x: plant_massive_dimensions(vit, x, 1),
    "pattern": lambda vit, x: plant_position_pattern(vit, x, 1),
    "sinks": lambda vit, x: plant_sinks(vit, x, 1),
    "content": lambda vit, x: plant_token_content(vit, x, 1, says="the photo"),
}


def rewrapped(vit: Backbone) -> Backbone:
    return vitreg.wrap(vit.model, vit.preprocess, image_size=vit.image_size, forward=vit.forward)


# What may become of a backbone. None has "phantom" in its name afterwards.
WAYS: dict[str, Callable[[Backbone], Backbone]] = {
    "renamed": lambda vit: vit,
    "deepcopied": copy.deepcopy,
    "pickled": lambda vit: pickle.loads(pickle.dumps(vit)),
    "around a copy": lambda vit: vit.with_model(copy.deepcopy(vit.model), "copy"),
    "wrapped again": rewrapped,
    "its copy wrapped": lambda vit: rewrapped(replace(vit, model=copy.deepcopy(vit.model))),
    "baked": lambda vit: rewrapped(replace(vit, model=TestTimeRegisters({1: [3]}).bake(vit.model))),
    "in half precision and back": lambda vit: vit.with_model(copy.deepcopy(vit.model).half().float(), "copy"),
}


@cache
def phantom(planter: str) -> Backbone:
    return PLANTERS[planter](MEMBER.backbone(), MEMBER.crops()).vit


@cache
def diagnosed(planted: bool) -> Diagnosis:
    vit = phantom("neurons") if planted else MEMBER.backbone()
    # The names lie.
    named = replace(vit, name="tiny" if planted else "phantom of tiny")
    return vitreg.diagnose(named, [MEMBER.crops()[:48]], examples=1)


@pytest.mark.parametrize("planter", PLANTERS)
def test_whoever_plants_says_so(planter):
    vit = phantom(planter)
    assert vit.planted
    assert not MEMBER.backbone().planted
    assert vit.name.startswith("phantom")
    report = vitreg.diagnose(replace(vit, name="tiny"), [MEMBER.crops()[:8]])
    assert report.planted
    assert PHANTOM in str(report)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("planter", ["neurons", "positions", "massive dimensions"])
def test_it_stays_one_whatever_becomes_of_it(planter, way):
    found = replace(WAYS[way](phantom(planter)), name="tiny")
    assert found.planted
    assert not replace(WAYS[way](MEMBER.backbone()), name="phantom of tiny").planted


@pytest.mark.parametrize("name", ["timm dinov2 registers", "hf clip", "open_clip vit"])
def test_in_any_library(name):
    member = replace(MEMBER, name=name)
    vit = vitreg.plant(member.backbone(), member.crops(), 1).vit
    assert [vit.planted, rewrapped(vit).planted, member.backbone().planted] == [True, True, False]


def words(figure: Any) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(Text))


def verdict(planted: bool) -> vitreg.Verdict:
    vit = phantom("neurons") if planted else MEMBER.backbone()
    # Without artifacts: nothing is measured.
    report = replace(diagnosed(planted), verdict="no artifacts")
    return vitreg.verify(replace(vit, name="m"), TestTimeRegisters({1: [3]}), [MEMBER.crops()], report=report)


def result(planted: bool) -> Any:
    vit = replace(phantom("neurons") if planted else MEMBER.backbone(), name="m")
    figure = replace(diagnosed(False), model="m").figure  # of a task: it knows nothing of phantoms
    return concluded("task", vit, "data", {"top-1": Metric.mean([0, 1])}, Config(), picture=figure)


def study(planted: bool) -> Any:
    vit = replace(CATALOG["timm dinov2 registers"].backbone(), name="m", planted=planted)
    return vitreg.what_registers_learn(vit, [torch.randn(2, 3, *vit.image_size)])


def page(made: Callable[[bool], Any]) -> Callable[[bool, Path], str]:
    return lambda planted, folder: write(made(planted), folder / "x.html").read_text(encoding="utf-8")


def emergence(planted: bool) -> Emergence:
    return Emergence([replace(diagnosed(planted), model="m"), replace(diagnosed(False), model="n")])


SHOWN: dict[str, Callable[[bool, Path], str]] = {
    "diagnosis": lambda planted, _: str(replace(diagnosed(planted), model="m")),
    "diagnosis, figure": lambda planted, _: words(replace(diagnosed(planted), model="m").figure()),
    "diagnosis, page": page(lambda planted: replace(diagnosed(planted), model="m")),
    "verdict": lambda planted, _: str(verdict(planted)),
    "emergence": lambda planted, _: str(emergence(planted)),
    "emergence, figure": lambda planted, _: words(emergence(planted).figure()),
    "evaluation": lambda planted, _: str(result(planted)),
    "evaluation, picture": lambda planted, _: words(result(planted).picture()),
    "evaluations": lambda planted, _: str(vitreg.evals.compare(result(planted), result(planted))),
    "registers": lambda planted, _: str(study(planted)),
    "registers, figure": lambda planted, _: words(study(planted).figure()),
}


@pytest.mark.slow
@pytest.mark.parametrize("shown", SHOWN)
def test_it_is_called_one_wherever_it_is_shown_and_no_other_is(shown, tmp_path):
    assert "phantom" in SHOWN[shown](True, tmp_path).lower()
    text = SHOWN[shown](False, tmp_path).lower().replace("p.phantom", "").replace(".phantom", "")
    assert "phantom" not in text


@pytest.mark.parametrize("planted", [True, False])
def test_json_says_it(planted):
    for found in (diagnosed(planted), verdict(planted), result(planted), study(planted)):
        assert json.loads(json.dumps(found.to_json()))["planted"] is planted
    assert [x["planted"] for x in emergence(planted).to_json()["models"]] == [planted, False]


# -- what is found is data; words are made where it is printed --------------------------------------


@pytest.mark.parametrize(("ratio", "queries"), [(0.493, "patches"), (1.7, "cls")])
def test_sinks_and_queries_are_data_and_words_where_they_are_printed(ratio, queries):
    sink = Sink("nop" if ratio < 0.5 else "broadcast", ratio)
    report = replace(diagnosed(True), sink=sink, attention_queries=queries)
    document = json.loads(json.dumps(report.to_json()))
    assert document["sink"] == {"kind": sink.kind, "value_norm_ratio": ratio}
    assert document["attention_queries"] == queries
    said = report.full()
    shown = "".join(words for _, words in key_facts(report))
    for text in (words_of_sink(sink), f"from {name_of_queries(queries)}"):
        assert text in said
        assert text in shown
    assert f"{ratio:.2f}x" in words_of_sink(sink)
    source = {"cls": "CLS attention", "patches": "patch attention"}[queries]
    assert source in words(report.figure())


def test_without_a_sink():
    report = replace(diagnosed(True), sink=None)
    assert report.to_json()["sink"] is None
    assert "kind of sink" not in report.full()
