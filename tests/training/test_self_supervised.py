"""Self-supervision: what its objective computes, that processes and micro-batches agree, and its recipes."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from self_supervised_runs import tiny
from torch import Tensor
from training_runs import CPU, losses, save_classes

from vitreg.config.settings import with_settings
from vitreg.errors import DataError, MissingExtraError
from vitreg.training.centring import balanced, health
from vitreg.training.loop import train
from vitreg.training.recipe import find_recipe
from vitreg.training.sampler import seed_all
from vitreg.training.self_supervised import DinoIbot

pytestmark = pytest.mark.slow

pytest.importorskip("lightly")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return save_classes(tmp_path_factory.mktemp("photos"), train=4)


def batch_of(objective: DinoIbot, photos: range = range(4)) -> list[Tensor]:
    seed_all(7)
    return torch.utils.data.default_collate([objective.dataset[i] for i in photos])


def moved(objective: DinoIbot) -> DinoIbot:
    """Student and teacher that differ, to which photos look different, and centres after one step."""
    for weights in objective.parameters():
        weights.data += 0.3 * torch.randn_like(weights)
    objective.train()(batch_of(objective))
    objective.after_step(1, 10)
    return objective


def test_crops_have_the_models_own_normalisation(data) -> None:
    crops = tiny(data).objective().dataset[0]
    assert [tuple(crop.shape) for crop in crops] == [(3, 32, 32)] * 2 + [(3, 16, 16)] * 2
    values = torch.cat([crop.flatten() for crop in crops])
    assert values.min() >= -1  # timm's mean and deviation for this model are 0.5, not ImageNet's
    assert values.max() <= 1


def test_masked_patches_are_not_seen(data) -> None:
    """Neither their pixels nor the place of the mask token in the state: only where the mask is."""
    student = tiny(data).objective().student.eval()
    torch.nn.init.normal_(student.mask_token)
    photos, mask = torch.randn(2, 3, 32, 32), torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[0, 1, 2] = True
    other = photos.clone()
    other[0, :, 8:16, 16:24] = 5.0
    cls, patches = student(photos, mask)
    assert torch.equal(cls, student(other, mask)[0])
    assert not torch.allclose(cls[0], student(other)[0][0])
    tokens = student.vit.forward_features(photos)
    assert torch.equal(student(photos)[0], tokens[:, 0])
    assert torch.equal(student(photos)[1], tokens[:, 3:])  # CLS and two registers
    assert torch.equal(patches[1], tokens[1, 3:])
    assert not torch.allclose(patches[0], tokens[0, 3:])


def test_losses_by_hand(data) -> None:
    """DINO: all pairs of a large crop and another crop. iBOT: mean over masked patches, then over crops."""
    recipe = tiny(data, teacher_temp=0.05, warmup_teacher_temp=0.05)
    objective = moved(recipe.objective()).eval()
    batch = batch_of(objective)
    seed_all(5)
    mask = objective._mask(8)
    seed_all(5)
    found = objective(batch)

    large = torch.cat(batch[:2])
    cls, patches = objective.teacher(large)
    shown, shown_patches = objective.student(large, mask)
    guesses = [*objective.student.cls_head(shown).chunk(2)]
    guesses += [objective.student.cls_head(objective.student(crop)[0]) for crop in batch[2:]]
    targets = ((objective.teacher.cls_head(cls) - objective.dino.center[0]) / 0.05).softmax(-1).chunk(2)
    pairs = [(t, s) for t in range(2) for s in range(4) if t != s]
    dino = torch.stack([-(targets[t] * (guesses[s] / 0.1).log_softmax(-1)).sum(-1).mean() for t, s in pairs])
    target = ((objective.teacher.patch_head(patches) - objective.ibot.center.value) / 0.05).softmax(-1)
    each = -(target * (objective.student.patch_head(shown_patches) / 0.1).log_softmax(-1)).sum(-1)
    hidden = mask.flatten(1)
    ibot = sum(each[i][hidden[i]].mean() for i in range(8) if hidden[i].any()) / 8
    unit = F.normalize(shown, dim=-1)
    koleo = sum(
        -(torch.cdist(half, half) + 10 * torch.eye(4)).min(1).values.log().mean() for half in unit.chunk(2)
    )
    assert hidden.any(1).sum() == 4  # half of the crops
    torch.testing.assert_close(found["dino"], dino.mean())
    torch.testing.assert_close(found["ibot"], ibot)
    torch.testing.assert_close(found["koleo"], koleo, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found["loss"], found["dino"] + found["ibot"] + 0.1 * found["koleo"])


def test_centres_move_once_per_step_to_the_mean_of_all_micro_batches(data) -> None:
    objective = tiny(data, mask_probability=1.0).objective().eval()
    scores = []
    for photos in (range(4), range(4, 8)):
        batch = batch_of(objective, photos)
        seed_all(3)
        first = objective(batch)
        assert not objective.dino.center.any()
        assert not objective.ibot.center.value.any()
        scores.append(objective.teacher.cls_head(objective.teacher(torch.cat(batch[:2]))[0]))
        assert torch.isfinite(first["loss"])
    objective.after_step(1, 4)
    torch.testing.assert_close(objective.dino.center[0, 0], 0.1 * torch.cat(scores).mean(0))
    assert objective.ibot.center.value.any()


def test_sinkhorn_balances_the_prototypes(data) -> None:
    """The loss gets scores whose softmax is the assignment: rows are shares, columns nearly equally full."""
    objective = tiny(data, centring="sinkhorn").objective().eval()
    scores = torch.randn(40, 32).mul(0.3) + 2.0 * torch.eye(32)[0]  # everybody prefers the first
    assert (scores / 0.3).softmax(-1).mean(0)[0] > 0.8
    chosen = (balanced(scores, 0.3) / 0.3).softmax(-1)
    torch.testing.assert_close(chosen.mean(0), torch.full((32,), 1 / 32), atol=0.01, rtol=0)
    order = scores[:, 1:].argmax(-1)
    assert (chosen[:, 1:].argmax(-1) == order).float().mean() > 0.5  # still each its own
    objective(batch_of(objective))["loss"].backward()
    objective.after_step(1, 4)
    assert not objective.dino.center.any()


def test_a_batch_without_masked_patches_leaves_their_centre(data) -> None:
    objective = tiny(data, mask_probability=0.0).objective()
    tiny(data, mask_probability=0.0, centring="sinkhorn").objective()(batch_of(objective))
    found = objective(batch_of(objective))
    found["loss"].backward()
    objective.after_step(1, 4)
    assert found["ibot"] == 0
    assert not objective.ibot.center.value.any()
    assert all(p.grad is not None for p in objective.student.parameters() if p.requires_grad)


def test_the_teacher_is_a_moving_average_without_gradient_or_noise(data) -> None:
    objective = tiny(data, momentum=0.75).objective().train()
    assert objective.student.training
    assert not any(module.training for module in objective.teacher.modules())
    assert objective.vit is objective.teacher.vit
    assert objective.vit.num_reg_tokens == 2
    objective(batch_of(objective))["loss"].backward()
    assert all(p.grad is None for p in objective.teacher.parameters())
    before = objective.vit.cls_token.detach().clone()
    torch.testing.assert_close(before, objective.student.vit.cls_token.detach())
    objective.student.vit.cls_token.data += 1
    objective.after_step(1, 100)
    torch.testing.assert_close(objective.vit.cls_token.data, before + 0.25)
    objective.after_step(100, 100)  # the momentum ends at 1
    torch.testing.assert_close(objective.vit.cls_token.data, before + 0.25)


def test_schedules_follow_the_step(data) -> None:
    recipe = tiny(data, teacher_temp=0.08, warmup_teacher_temp_steps=4, freeze_last_layer=1)
    objective = recipe.objective()
    prototypes = objective.student.cls_head.last_layer.weight_v
    seen = []
    for step in range(1, 6):
        objective.zero_grad()
        objective(batch_of(objective))["loss"].backward()
        seen.append((objective._temperature(), bool(prototypes.grad.any())))
        objective.after_step(step, 10)
    assert [t for t, _ in seen] == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.08])
    assert [still for _, still in seen] == [False, True, True, True, True]


def test_a_state_loads_back(data) -> None:
    objective = moved(tiny(data).objective())
    other = tiny(data).objective()
    other.load_state_dict(objective.state_dict())
    assert other.dino.center.any()
    assert other.ibot.center.value.any()
    assert other.done == 1
    batch, found = batch_of(objective), []
    for one in (objective, other):
        seed_all(9)
        found.append(one.train()(batch)["loss"])
    assert torch.equal(*found)


def test_health_tells_a_collapse() -> None:
    same, apart = torch.ones(4, 6), torch.eye(4, 6)
    collapsed, healthy = health(same, 1 * same, 0.1), health(apart, apart, 0.01)
    assert collapsed["std"] == 0
    assert collapsed["entropy"] == pytest.approx(math.log(6))
    assert collapsed["entropy_mean"] == pytest.approx(math.log(6))
    assert healthy["std"] == pytest.approx(math.sqrt(1 - 1 / 4))
    assert healthy["entropy"] == pytest.approx(0, abs=1e-5)
    assert healthy["entropy_mean"] == pytest.approx(math.log(4), abs=1e-5)


def test_neighbours_are_compared_with_those_of_random_weights(data) -> None:
    objective = tiny(data).objective()
    objective.vit.norm.weight.data.zero_()  # every photo looks the same
    objective.vit.norm.bias.data.fill_(1)
    seed_all(1)
    before = torch.get_rng_state()
    found = objective.evaluate()
    assert found["knn"] == pytest.approx(100 / 3, abs=0.1)
    assert found["knn_random"] > 60  # the classes are colours
    assert torch.equal(before, torch.get_rng_state())


def test_photos_without_labels_are_enough(data) -> None:
    objective = tiny(data / "val").objective()
    assert len(objective.dataset) == 12
    assert objective.evaluate() == {}


PROCESS = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from training_runs import CPU
from self_supervised_runs import tiny
from vitreg.training.centring import balanced, health
from vitreg.training.loop import train
torch.set_num_threads(1)
train(tiny(sys.argv[2]), sys.argv[3], CPU)
torch.distributed.barrier()  # a process that is gone makes gloo abort the other
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(data, tmp_path) -> None:
    """One takes both micro-batches of a step, two take one each."""
    script = tmp_path / "process.py"
    script.write_text(PROCESS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        [*torchrun, script, tests, data, tmp_path / "two"], capture_output=True, text=True, cwd=tests.parent
    )
    assert done.returncode == 0, done.stderr
    run = train(tiny(data), tmp_path / "one", CPU)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one == pytest.approx(two, abs=1e-5)
    assert len(one) == run.step == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": ""}, "data is not set. Expected a folder of photos"),
        ({"image_size": 36}, "image_size=36: expected a multiple of the patch size, 8"),
        ({"local_size": 12}, "local_size=12: expected a multiple of the patch size, 8"),
        ({"image_size": 16}, "2 x 2 patches may be less than one patch"),
        ({"neighbours": 20}, "neighbours=20: expected 1 to 12, the photos in train/"),
    ],
)
def test_settings_that_do_not_fit(data, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        tiny(**{"data": data} | settings).objective()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"micro_batch": 1}, "KoLeo compares the photos of a micro-batch. Use 2 or more"),
        ({"centring": "median"}, "centring='median': expected 'mean' or 'sinkhorn'"),
        ({"pretrained": "timm:x"}, "starts from random weights"),
    ],
)
def test_settings_that_no_data_fit(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        tiny("", **settings)
    tiny("", micro_batch=1, koleo_weight=0.0)


def test_without_lightly_the_extra_is_named(monkeypatch) -> None:
    monkeypatch.delitem(sys.modules, "vitreg.training.self_supervised")
    monkeypatch.delitem(sys.modules, "vitreg.training.centring")
    monkeypatch.setitem(sys.modules, "lightly.loss", None)
    with pytest.raises(MissingExtraError, match=r"vitreg\[train\]"):
        __import__("vitreg.training.self_supervised")


def test_the_small_recipe_starts(data, tmp_path) -> None:
    recipe = with_settings(
        find_recipe("self_supervised_small"),
        {"data": str(data), "steps": "2", "batch_size": "4", "micro_batch": "4", "neighbours": "3"},
    )
    for registers in ("0", "4"):
        run = train(with_settings(recipe, {"registers": registers}), tmp_path / registers, CPU)
        assert run.step == 2


@pytest.mark.nightly
def test_the_full_size_recipe_takes_two_steps(data, tmp_path) -> None:
    """All settings but these, for memory (true size: 5 GB of checkpoint): 2 of 24 blocks, 256 prototypes."""
    recipe = with_settings(
        find_recipe("self_supervised_vit_l"),
        {
            "data": str(data / "val"),
            "steps": "2",
            "warmup": "1",
            "batch_size": "2",
            "micro_batch": "2",
            "model_args": '{"drop_path_rate": 0.4, "depth": 2}',
            "output_dim": "256",
        },
    )
    run = train(recipe, tmp_path, CPU)
    assert all(math.isfinite(line["loss"]) for line in run.log)
    assert run.step == 2
