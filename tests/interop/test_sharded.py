"""A model that `fully_shard` spreads over processes equals the local one, under every fix, in both orders."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from wrapped import FIXES, model, wrap

import vitreg
from vitreg.data.images import read_images
from vitreg.distributed import Ranks
from vitreg.errors import UnsupportedModelError

HERE = Path(__file__).parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs gloo"
    ),
]


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def answers(request, tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("sharded")
    commands = [
        [
            sys.executable,
            "sharding.py",
            str(rank),
            str(request.param),
            str(folder / "store"),
            str(folder / f"{rank}"),
        ]
        for rank in range(request.param)
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    started = [
        subprocess.Popen(command, cwd=HERE, env=environment, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    for process in started:
        _, said = process.communicate(timeout=240)
        assert process.returncode == 0, said
    found = [json.loads((folder / f"{rank}").read_text()) for rank in range(request.param)]
    assert all(each == found[0] for each in found)
    return found[0]


@pytest.mark.parametrize("name", FIXES)
def test_a_fix_before_and_after_sharding(answers, name):
    distances = answers[name]
    assert distances.pop("moved") > 0.01
    refusals = {order: distances.pop(order) for order, why in list(distances.items()) if isinstance(why, str)}
    assert max(distances.values()) < 1e-5, distances
    if name != "shift-average":  # its views run through a copy
        assert refusals == {}
        return
    assert "was applied" in refusals.pop("fix first")
    assert set(refusals) == {"fix last", "again"}
    assert all("copy of the model" in why for why in refusals.values())


def test_gradients_through_a_fix(answers):
    assert answers["training"] < 1e-5


def test_what_is_read_of_a_sharded_model(answers):
    assert answers["read"] == {
        "hash": True, "artifacts": True, "norms": True, "neurons": True, "verified": True, "doctor": True,
    }  # fmt: skip


def test_photos_are_not_shared_out_where_the_model_is(tmp_path, monkeypatch):
    """Processes that hold a model together run the same passes, or wait for each other for ever."""
    vit = wrap(model())
    monkeypatch.setattr("vitreg.data.images.is_sharded", lambda parameter: True)
    with pytest.raises(UnsupportedModelError, match="without `ranks`"):
        read_images(tmp_path, vit, ranks=Ranks(0, 2, 2))
    with pytest.raises(vitreg.ImageError):  # the folder is empty
        read_images(tmp_path, vit)
