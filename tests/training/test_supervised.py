"""The supervised regime: its labels, pixels, mixes and losses are what DeiT-III says, and it learns."""

import math
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from timm.models import create_model, save_for_hf
from torch import Tensor, nn
from training_runs import CPU, save_classes, tiny

from vitreg.config.settings import with_settings
from vitreg.errors import DataError
from vitreg.fixes import load_fix
from vitreg.fixes.added_registers import NAME
from vitreg.models.loading import load
from vitreg.training.loop import train
from vitreg.training.recipe import find_recipe
from vitreg.training.sampler import seed_all
from vitreg.training.supervised import SupervisedObjective

pytestmark = pytest.mark.slow

PLAIN = {"augment": "", "color_jitter": 0.0, "crop_scale": 1.0, "mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three classes, whose photos have more of red, green or blue."""
    return save_classes(tmp_path_factory.mktemp("photos"), train=8)


def objective(data: Path, **settings) -> SupervisedObjective:
    return tiny(data, **PLAIN | settings).objective().train()


def test_labels_and_pixels_are_those_of_the_folders(data):
    found = objective(data)
    seed_all(0)
    items = [found.dataset[i] for i in range(len(found.dataset))]
    assert len(items) == 24
    assert [label for _, label in items] == sorted([0, 1, 2] * 8)
    for (pixels, label), path in zip(items, found.dataset.paths, strict=True):
        assert path.parent.name == f"c{label}"
        assert pixels.shape == (3, 32, 32)
        assert int(pixels.mean((1, 2)).argmax()) == label
    expected = torch.from_numpy(np.array(PIL.Image.open(found.dataset.paths[0]))).float().mean((0, 1)) / 255
    torch.testing.assert_close(items[0][0].mean((1, 2)), 2 * expected - 1, atol=0.05, rtol=0)


def test_augmentation_is_drawn_anew_from_the_global_generators(data):
    found = objective(data, augment="3a", color_jitter=0.3, crop_scale=0.1)
    drawn = []
    for seed in (0, 0, 1):
        seed_all(seed)
        drawn.append(found.dataset[0][0])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


class Seen(nn.Module):
    """Stands for a ViT: keeps the pixels that it is given."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, pixels: Tensor) -> Tensor:
        self.pixels = pixels
        return self.logits


def mixed(data: Path, seed: int, **settings) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Targets as the pixels have them (the label's channel is 1), logits, and what came of them."""
    found = objective(data, **settings)
    labels = torch.tensor([0, 1, 2, 1])
    pixels = F.one_hot(labels, 3).float()[:, :, None, None].expand(-1, -1, 32, 32).clone()
    found.vit = Seen(torch.randn(4, 3))
    seed_all(seed)
    values = found((pixels, labels))
    return found.vit.pixels.mean((2, 3)), found.vit.logits, values


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_targets_are_mixed_as_pixels_are(data, kind, smoothing):
    shares, logits, values = mixed(data, 3, **{kind: 1.0, "smoothing": smoothing})
    assert (shares.sort().values[:, 1] > 0.01).any()
    targets = shares * (1 - smoothing) + smoothing / 3
    torch.testing.assert_close(values["loss"], -(targets * logits.log_softmax(-1)).sum(-1).mean())
    right = logits.argmax(-1) == shares.argmax(-1)
    torch.testing.assert_close(values["train_top1"], 100 * right.float().mean())


def test_bce_takes_both_classes_of_a_mix_whole(data):
    shares, logits, values = mixed(data, 3, mixup=1.0, loss="bce")
    assert ((shares > 0).sum(-1) == 2).any()
    targets = (shares > 0).float()
    torch.testing.assert_close(values["loss"], F.binary_cross_entropy_with_logits(logits, targets))


@pytest.mark.parametrize("loss", ["ce", "bce"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses_without_mixing(data, loss, smoothing):
    shares, logits, values = mixed(data, 0, loss=loss, smoothing=smoothing)
    targets = shares * (1 - smoothing) + smoothing / 3
    expected = {
        "ce": -(targets * logits.log_softmax(-1)).sum(-1).mean(),
        "bce": F.binary_cross_entropy_with_logits(logits, targets),
    }
    torch.testing.assert_close(values["loss"], expected[loss])


def test_an_odd_number_of_photos_cannot_be_mixed(data):
    found = objective(data, mixup=0.8)
    with pytest.raises(
        DataError, match=r"mix photos in pairs, found 3 in a forward pass\. Set an even micro_b"
    ):
        found((torch.zeros(3, 3, 32, 32), torch.tensor([0, 1, 2])))


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"loss": "mse"}, "loss=mse: expected ce or bce"), ({"crop": "centre"}, "crop=centre: expected rrc or")],
)
def test_unknown_losses_and_crops(setting, message):
    with pytest.raises(DataError, match=message):
        with_settings(tiny("data"), setting)


def test_stochastic_depth_and_registers_reach_the_model(data):
    vit = objective(data, registers=3, drop_path=0.2).vit
    assert vit.reg_token.shape == (1, 3, 48)
    assert vit.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)
    assert vit.head.out_features == 3


def test_a_pretrained_model_gets_registers_that_are_trained(data, tmp_path):
    shape = {"depth": 2, "embed_dim": 48, "num_heads": 3}
    made = create_model("vit_tiny_patch16_224", num_classes=3, **shape)
    save_for_hf(made, str(tmp_path / "model"), model_args=shape, safe_serialization=True)
    found = objective(data, pretrained=str(tmp_path / "model"), registers=2)
    assert torch.equal(found.vit.head.weight, made.head.weight)
    before = getattr(found.vit, NAME).detach().clone()
    run = train(tiny(data, **PLAIN, pretrained=str(tmp_path / "model"), registers=2, steps=2), tmp_path, CPU)
    after = torch.load(run.folder / "last.ckpt", weights_only=True)["objective"][f"vit.{NAME}"]
    assert before.shape == after.shape == (2, 48)
    assert not torch.equal(before, after)


def test_fine_tuning_keeps_the_head_and_ends_with_a_verdict(data, tmp_path):
    """A head of ImageNet's 1000 classes: photos are what their WordNet ids are there."""
    shape = {"depth": 2, "embed_dim": 48, "num_heads": 3}
    made = create_model("vit_tiny_patch16_224", num_classes=1000, **shape)
    save_for_hf(made, str(tmp_path / "model"), model_args=shape, safe_serialization=True)
    named = {"c0": "n01440764", "c1": "n01443537", "c2": "n04557648"}  # classes 0, 1 and 898
    for old, new in named.items():
        for part in ("train", "val"):
            shutil.copytree(data / part / old, tmp_path / "named" / part / new)
    settings = PLAIN | {"pretrained": str(tmp_path / "model"), "registers": 2}
    assert sorted(set(objective(tmp_path / "named", **settings).dataset.labels)) == [0, 1, 898]
    run = train(tiny(tmp_path / "named", **settings, steps=2, lr=1e-3), tmp_path / "run", CPU)
    assert run.written.keys() == {"fix", "verdict", "model"}
    vit, images = load(str(tmp_path / "model"), size=32), torch.randn(2, 3, 32, 32)
    after = load(str(run.written["model"]))
    plain = vit(images)
    with load_fix(run.written["fix"]).applied_to(vit):
        fixed = vit(images)
    torch.testing.assert_close(fixed, after(images), atol=1e-5, rtol=0)
    assert not torch.allclose(fixed, plain, atol=1e-3)


def test_stochastic_depth_of_a_pretrained_model_is_its_own(data):
    with pytest.raises(DataError, match=r"drop_path=0\.2: a pretrained model keeps its own"):
        tiny(data, pretrained="a/", drop_path=0.2)


def test_it_learns_what_photos_show_and_says_how_well(data, tmp_path):
    """Photos of val are others than those it was trained on; chance is a third."""
    recipe = tiny(data, **PLAIN, steps=40, lr=3e-3, registers=1, checkpoint_every=0, micro_batch=8)
    log = train(recipe, tmp_path, CPU).log
    assert log[0]["loss"] == pytest.approx(math.log(3), abs=0.2)
    assert log[-1]["loss"] < 0.3
    assert log[-1]["top1"] == 100


def test_evaluation_is_the_share_of_right_answers_on_val(data):
    found = objective(data)
    nn.init.zeros_(found.vit.head.weight)
    with torch.no_grad():
        found.vit.head.bias.copy_(torch.tensor([0.0, 5.0, 1.0]))
    assert found.evaluate() == {"top1": pytest.approx(100 / 3)}


def test_classes_of_train_and_val_that_differ(data, tmp_path):
    folder = save_classes(tmp_path, train=2, val=2)
    (folder / "val" / "c2").rename(folder / "val" / "d2")
    with pytest.raises(DataError, match=r"train/ and val/ of .* have other classes: c2, d2 in one only"):
        tiny(folder).objective()


@pytest.mark.nightly
def test_the_full_size_recipe_takes_two_steps(data, tmp_path):
    """With 2 of its 12 blocks and 2 photos in a batch; all else is as in the recipe."""
    recipe = find_recipe("supervised_vit_b")
    assert recipe.steps * recipe.batch_size == pytest.approx(240 * 14_197_122, rel=1e-3)
    short = {"data": str(data), "model_args": '{"depth": 2}', "batch_size": "2", "steps": "2", "warmup": "1"}
    run = train(with_settings(recipe, short), tmp_path, CPU)
    assert (run.step, run.stopped) == (2, False)
    assert all(math.isfinite(value) for value in run.log[-1].values())
    held = torch.load(tmp_path / "last.ckpt", weights_only=True, mmap=True)
    state = held["objective"]
    assert state["vit.reg_token"].shape == (1, 4, 768)
    assert state["vit.pos_embed"].shape == (1, 196, 768)
    assert "vit.blocks.1.ls2.gamma" in state
