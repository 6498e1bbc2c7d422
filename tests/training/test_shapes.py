"""Drawn photos, and the recipe that learns from them."""

import dataclasses
import json

import numpy as np
import pytest
import torch

import vitreg
from vitreg.data.shapes import CLASSES, SHAPES, draw
from vitreg.phantoms.bundled import HELD_OUT, SHOWN, load_example, measure, scenes
from vitreg.training.loop import Machine, train
from vitreg.training.recipe import find_recipe
from vitreg.training.sampler import Seeded

pytestmark = pytest.mark.slow

RECIPE = find_recipe("demo")


def test_a_seed_makes_one_photo():
    assert np.array_equal(draw(3).image, draw(3).image)
    assert not np.array_equal(draw(3).image, draw(4).image)
    assert draw(3, 64).image.shape == (64, 64, 3)
    assert draw(3).photo.size == (96, 96)


def test_a_label_can_be_chosen():
    assert [draw(5, label=k).label for k in range(len(CLASSES))] == list(range(len(CLASSES)))
    assert {draw(seed).label for seed in range(200)} == set(range(len(CLASSES)))


def test_the_mask_is_where_the_label_makes_a_difference():
    """Outside of both objects and their shadows, a scene with another object is drawn alike."""
    one, other = draw(8, label=CLASSES.index("disc")), draw(8, label=CLASSES.index("cross"))
    differs = np.abs(one.image.astype(int) - other.image).max(-1) > 40
    masks = one.mask | other.mask
    assert differs[masks].mean() > 5 * differs[~masks].mean()


def test_the_mask_of_a_disc_is_a_disc():
    mask = draw(8, label=CLASSES.index("disc")).mask
    rows, columns = np.nonzero(mask)
    box = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
    assert 0.6 < mask.sum() / box < 0.9  # pi / 4 for one that is not tilted
    assert mask[round(rows.mean()), round(columns.mean())]


@pytest.mark.parametrize("name", CLASSES)
def test_a_shape_fills_its_circle_and_no_more(name):
    line = np.linspace(-1.5, 1.5, 301, dtype=np.float32)
    x, y = np.meshgrid(line, line)
    inside = SHAPES[name](x, y) < 0
    reach = np.hypot(x, y)[inside].max()
    assert 0.85 < reach < 1.35
    assert 0.1 < inside.mean() * 9 / np.pi < 0.9


def test_objects_lie_anywhere_in_any_size():
    masks = np.stack([draw(seed).mask for seed in range(100)])
    assert masks.any((1, 2)).all()
    assert 0.02 < masks.mean((1, 2)).min() < masks.mean((1, 2)).max() < 0.5
    assert (masks.mean(0)[24:72, 24:72] > 0.05).all()


def test_training_photos_differ_and_are_never_those_to_measure_on():
    items = RECIPE.objective().dataset
    seeded = Seeded(items, 0)
    pixels, label, mask = seeded[(0, 5)]
    assert pixels.shape == (3, 96, 96)
    assert -1 <= pixels.min() < pixels.max() <= 1
    assert (label, mask.shape) == (seeded[(0, 5)][1], (96, 96))
    assert torch.equal(seeded[(0, 5)][0], pixels)
    assert not torch.equal(seeded[(1, 5)][0], pixels)
    assert min(SHOWN, HELD_OUT) >= 2**31  # training seeds are below


def test_the_recipe_makes_a_folder_that_loads(tmp_path):
    """Two steps on drawn photos: losses are logged, and what is saved is the ViT alone, in float16."""
    small = dataclasses.replace(
        RECIPE,
        steps=2,
        batch_size=4,
        held_out=8,
        diagnose_every=0,
        model_args=RECIPE.model_args | {"depth": 2},
    )
    run = train(small, tmp_path / "run", Machine(accelerator="cpu"))
    line = json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[-1])
    assert line["loss"] == pytest.approx(line["cls_loss"] + line["patch_loss"], rel=1e-4)
    vit = load_example(run.written["model"])
    assert (vit.image_size, vit.anatomy.depth) == ((96, 96), 2)
    config = json.loads((run.written["model"] / "config.json").read_text())
    assert config["label_names"] == list(CLASSES)
    found = measure(vit, scenes(8, HELD_OUT))
    assert 100 * found.top1 == pytest.approx(line["top1"])
    assert 100 * found.on_object == pytest.approx(line["attention_on_object"], abs=0.1)


@pytest.mark.parametrize("registers", [0, 2])
def test_the_objective_learns_to_tell_the_ground(registers):
    """On one batch the loss of patches falls far: masks and patches lie on each other."""
    torch.manual_seed(0)
    np.random.seed(0)
    small = dataclasses.replace(RECIPE, registers=registers, model_args=RECIPE.model_args | {"depth": 1})
    objective = small.objective()
    assert objective.vit.num_prefix_tokens == 1 + registers
    items = [objective.dataset[i] for i in range(8)]
    batch = (
        torch.stack([pixels for pixels, _, _ in items]),
        torch.tensor([label for _, label, _ in items]),
        torch.stack([mask for _, _, mask in items]),
    )
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        found = objective(batch)
        found["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(found["patch_loss"].item())
    assert losses[-1] < 0.4 * losses[5]
    assert all(block.attn.fused_attn for block in objective.vit.blocks)  # as it was: a trace sees attention


def test_the_example_has_no_artifacts_of_its_own():
    vit, shown = vitreg.example(32)
    report = vitreg.diagnose(vit, vitreg.read_images([scene.photo for scene in shown], vit))
    assert report.verdict == "no artifacts"
