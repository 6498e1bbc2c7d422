"""Text supervision: the loss by hand, the same in chunks and with two processes, and training to a result."""

import dataclasses
import math
import shutil
import subprocess
import sys

import numpy as np
import open_clip
import PIL.Image
import pytest
import torch
import torch.nn.functional as F

import vitreg
from vitreg.config.settings import with_settings
from vitreg.errors import DataError
from vitreg.training.loop import train
from vitreg.training.pairs import write_pairs
from vitreg.training.recipe import find_recipe
from vitreg.training.text import TextObjective, TextSupervised

pytestmark = pytest.mark.slow

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200), "white": (230, 230, 230)}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Photos of four colours: 12 of each to train on, 5 to measure on."""
    random, root = np.random.default_rng(0), tmp_path_factory.mktemp("colours")
    for split, count in (("train", 12), ("val", 5)):
        for name, colour in COLOURS.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = random.normal(colour, 40, (36, 40, 3)).clip(0, 255).astype(np.uint8)
                PIL.Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def data(photos):
    write_pairs(photos / "train", photos / "pairs", per_shard=20)
    return photos / "pairs"


@pytest.fixture
def recipe(data, photos) -> TextSupervised:
    return TextSupervised(
        about="colours",
        expected="",
        cost="",
        data=str(data),
        val=str(photos / "val"),
        model_args={"depth": 2, "embed_dim": 32, "num_heads": 2},
        image_size=32,
        batch_size=16,
        steps=25,
        warmup=5,
        lr=2e-3,
        embed=24,
        text_width=16,
        text_layers=1,
        text_heads=2,
        text_context=10,
        diagnose_every=0,
    )


def batch_of(objective: TextObjective, n: int = 8):
    return torch.utils.data.default_collate([objective.dataset[i] for i in range(n)])


def gradients(objective: TextObjective) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """To 1e-5 of the largest gradient of each weight (that of timm's tiny CLS token is large)."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-5 * max(1.0, float(gradient.abs().max())), name


# -- the loss ----------------------------------------------------------------------------------------


def test_the_loss_by_hand(recipe):
    objective = recipe.objective()
    pixels, tokens, replaced = batch_of(objective)
    assert pixels.shape == (8, 3, 32, 32)
    assert tokens.shape == (8, 10)
    with torch.no_grad():
        objective.logit_scale.fill_(math.log(30))
        found = objective((pixels, tokens, torch.tensor([0.0, 1] * 4)))
        image = objective.vit(pixels) @ objective.project.weight.T
        text = objective.text(tokens)
        cosines = F.cosine_similarity(image[:, None], text[None], dim=-1)
        odds = 30 * cosines
        right = odds.diagonal()
        expected = ((odds.logsumexp(0) - right).mean() + (odds.logsumexp(1) - right).mean()) / 2
    assert float(found["loss"]) == pytest.approx(float(expected), abs=1e-5)
    assert float(found["scale"]) == pytest.approx(30)
    assert float(found["replaced"]) == 50
    assert not replaced.any()


def test_cosines_are_not_rounded_to_half_precision(recipe):
    """At the largest scale, bfloat16 would round logits to halves."""
    objective = recipe.objective()
    with torch.no_grad():
        objective.logit_scale.fill_(math.log(100))
    seen = []
    objective.project.register_forward_hook(lambda *a: seen.append(a[-1].dtype))
    batch = batch_of(objective)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        loss = objective(batch)["loss"]
        image, text = objective.encode_image(batch[0], True), objective.encode_text(batch[1], True)
    odds = 100 * image.double() @ text.double().T
    expected = (F.cross_entropy(odds, torch.arange(8)) + F.cross_entropy(odds.T, torch.arange(8))) / 2
    assert seen[0] == torch.bfloat16
    assert float(loss) == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("registers", [0, 4])
def test_chunks_change_memory_alone(recipe, registers):
    whole = dataclasses.replace(recipe, registers=registers).objective()
    cut = dataclasses.replace(recipe, registers=registers, chunk=3).objective()
    cut.load_state_dict(whole.state_dict())
    batch = batch_of(whole)
    held = []
    for objective in (whole, cut):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, k=kept: k.append(t.numel()) or t, lambda t: t
        ):
            loss = objective(batch)["loss"]
        held.append(sum(kept))
        loss.backward()
    assert held[1] < 0.2 * held[0]
    assert_same(gradients(cut), gradients(whole))
    assert set(gradients(whole)) == {name for name, _ in whole.named_parameters()}


TWO = """
import sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
recipes, state, batch = torch.load(f"{folder}/in.pt", weights_only=False)
found = []
for recipe in recipes:
    objective = recipe.objective()
    objective.load_state_dict(state)
    module = DistributedDataParallel(objective)
    loss = module([part.chunk(2)[rank] for part in batch])["loss"]
    loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    found.append((mean / 2, {name: p.grad for name, p in objective.named_parameters()}))
if rank == 0:
    torch.save(found, f"{folder}/out.pt")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_are_as_one(recipe, tmp_path):
    """Losses and gradients under DDP, with and without chunks."""
    recipe = dataclasses.replace(recipe, registers=2, val="")
    objective = recipe.objective()
    batch = batch_of(objective)
    loss = objective(batch)["loss"]
    loss.backward()
    recipes = (recipe, dataclasses.replace(recipe, chunk=3))
    torch.save((recipes, objective.state_dict(), batch), tmp_path / "in.pt")
    started = [
        subprocess.Popen([sys.executable, "-c", TWO, str(rank), str(tmp_path)], stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1].decode() for process in started]
    assert [process.returncode for process in started] == [0, 0], errors
    for mean, found in torch.load(tmp_path / "out.pt"):
        assert float(mean) == pytest.approx(float(loss.detach()), abs=1e-5)
        assert_same(found, gradients(objective))


def test_the_scale_stays_between_1_and_100(recipe):
    objective = recipe.objective()
    assert float(objective.logit_scale.detach().exp()) == pytest.approx(1 / 0.07)
    for wild, kept in ((9.0, 100.0), (-3.0, 1.0), (2.0, math.e**2)):
        with torch.no_grad():
            objective.logit_scale.fill_(wild)
        objective.after_step(1, 10)
        assert float(objective.logit_scale.detach().exp()) == pytest.approx(kept)


# -- training and measuring --------------------------------------------------------------------------


@pytest.mark.parametrize("registers", [0, 4])
def test_colours_are_learnt_from_captions(recipe, tmp_path, photos, registers):
    """Chance is 25%. With the classes' folders renamed in turn, the same model is always wrong."""
    recipe = dataclasses.replace(recipe, registers=registers, model_args=recipe.model_args, val="")
    run = train(recipe, tmp_path / "run")
    objective = dataclasses.replace(recipe, val=str(photos / "val")).objective()
    held = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["objective"]
    objective.load_state_dict(held)
    objective.train()
    assert objective.evaluate()["top1"] >= 90
    assert objective.training
    names = list(COLOURS)
    for name, other in zip(names, names[1:] + names[:1], strict=True):
        shutil.copytree(photos / "val" / name, tmp_path / "moved" / other)
    moved = dataclasses.replace(recipe, val=str(tmp_path / "moved")).objective()
    moved.load_state_dict(held)
    assert moved.evaluate()["top1"] <= 10
    assert run.log[-1]["loss"] < run.log[0]["loss"]
    vit = vitreg.load(str(run.written["model"]))
    assert vit.image_size == (32, 32)
    assert vit.layout.registers == registers


def test_without_labelled_photos_nothing_is_measured(recipe):
    objective = dataclasses.replace(recipe, val="").objective()
    assert objective.evaluate() == {}
    assert list(objective.photos) == []
    assert [len(batch) for batch in recipe.objective().photos] == [20]


def test_labelled_photos_of_one_class_cannot_be_told_apart(recipe, photos):
    with pytest.raises(DataError, match="val/red holds one class only"):
        dataclasses.replace(recipe, val=str(photos / "val" / "red")).objective()


def test_registers_for_a_pretrained_vit(recipe, tmp_path):
    """A timm folder, with registers added to it; only its head is left out."""
    run = train(dataclasses.replace(recipe, steps=1, warmup=0, val=""), tmp_path / "run")
    tuned = dataclasses.replace(recipe, pretrained=str(run.written["model"]), registers=3).objective()
    assert dict(tuned.vit.named_parameters())["added_registers"].shape == (3, 32)
    batch = batch_of(tuned)
    tuned(batch)["loss"].backward()
    assert tuned.vit.added_registers.grad.abs().sum() > 0


# -- settings ----------------------------------------------------------------------------------------


def test_a_contrastive_batch_cannot_be_cut(recipe):
    with pytest.raises(DataError, match=r"compares all pairs of a batch.* chunk=4 saves the memory"):
        with_settings(recipe, {"micro_batch": "4"})
    with pytest.raises(DataError, match="chunk=0: expected 1 or more"):
        with_settings(recipe, {"chunk": "0"})
    with pytest.raises(DataError, match="text_width=16 is not a multiple of text_heads=3"):
        with_settings(recipe, {"text_heads": "3"})


# -- the bundled recipes -----------------------------------------------------------------------------


def test_the_small_recipe_is_what_it_says(data):
    recipe = find_recipe("text_small")
    assert isinstance(recipe, TextSupervised)
    objective = dataclasses.replace(recipe, data=str(data), registers=4).objective()
    assert objective.vit.reg_token.shape == (1, 4, 192)
    assert objective.vit.patch_embed.grid_size == (8, 8)


@pytest.mark.nightly
def test_the_full_size_recipe_takes_two_steps(data, tmp_path):
    """The true towers, those of open_clip's ViT-B/16 with four registers; only the batch is small."""
    recipe = dataclasses.replace(find_recipe("text_vit_b"), data=str(data), val="", batch_size=2, steps=2)
    run = train(recipe, tmp_path / "run")
    assert [line["step"] for line in run.log][-1] == 2
    theirs = open_clip.get_model_config("ViT-B-16")
    assert (recipe.embed, recipe.text_width) == (theirs["embed_dim"], theirs["text_cfg"]["width"])
