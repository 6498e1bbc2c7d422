"""Self-distillation: where registers start, what is trained, what comes out."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import transformers
from PIL import Image

import vitreg
from vitreg.errors import DataError
from vitreg.fixes.added_registers import NAME, add_registers
from vitreg.models.positions import position_table
from vitreg.training.distillation import Distillation
from vitreg.training.loop import train
from vitreg.training.recipe import find_recipe
from vitreg.training.register_init import _smooth, initial_registers
from vitreg.training.sampler import seed_all
from vitreg.training.tuned_model import top1

TINY = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
QUICK = Distillation(
    about="", expected="", cost="", pretrained="the model",
    registers=2, image_size=64, batch_size=4, steps=3, warmup=0, lr=1e-3, weight_decay=0.0, views=2,
    log_every=1, diagnose_every=0,
)  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small ViT with a head of ten classes, in timm's folder format."""
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, embed_dim=48, depth=2, num_heads=3, num_classes=10
    )
    timm.models.save_for_hf(vit, str(tmp_path / "vit"), safe_serialization=True)
    return tmp_path / "vit"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Eight photos of noise."""
    (tmp_path / "photos").mkdir()
    for i in range(8):
        pixels = torch.randint(0, 255, (72, 80, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
    return tmp_path / "photos"


def test_a_run_writes_a_fix_that_makes_the_student_of_the_model(
    model: Path, photos: Path, tmp_path: Path
) -> None:
    recipe = replace(QUICK, pretrained=str(model), data=str(photos))
    run = train(recipe, tmp_path / "run")
    assert [line["step"] for line in run.log] == [1, 2, 3]
    verdict = json.loads((tmp_path / "run" / "verdict.json").read_text())
    assert verdict["verdict"] == "no artifacts"  # random weights have none
    before, exported = vitreg.load(str(model)), vitreg.load(str(tmp_path / "run" / "model"))
    images = torch.randn(2, 3, 64, 64)
    plain = before(images)
    with vitreg.load_fix(tmp_path / "run" / "fix").applied_to(before):
        fixed = before(images)
    assert not torch.allclose(plain, fixed, atol=1e-3)
    assert torch.allclose(fixed, exported(images), atol=1e-5)
    assert exported.anatomy.registers == 2


def test_the_loss_falls_on_the_same_photos(model: Path, photos: Path) -> None:
    objective = replace(QUICK, pretrained=str(model), data=str(photos)).objective()
    batch = torch.stack([objective.dataset[i] for i in range(8)])
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=2e-4)
    losses = []
    for _ in range(20):
        loss = objective(batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_only_what_is_named_is_trained(model: Path, photos: Path) -> None:
    recipe = replace(QUICK, pretrained=str(model), data=str(photos))

    def trained(*parts: str) -> set[str]:
        objective = replace(recipe, train=parts).objective().train()
        assert not objective.training  # nor does dropout
        assert not any(p.requires_grad for p in objective.teacher.parameters())
        return {name for name, p in objective.vit.named_parameters() if p.requires_grad}

    assert trained() == {NAME}
    assert trained("positions") == {NAME, "pos_embed"}
    assert trained("patches") == {NAME, "patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert all(name == NAME or name.startswith("blocks.1.") for name in trained("last block"))
    assert len(trained("last block")) == 13
    assert len(trained("all")) == 1 + len(list(vitreg.load(str(model)).model.parameters()))


def test_the_teacher_may_be_any_saved_fix(model: Path, photos: Path, tmp_path: Path) -> None:
    vit = vitreg.load(str(model))
    fix = vitreg.TestTimeRegisters({0: [3, 5]})
    fix.save(tmp_path / "fix", vit=vit)
    recipe = replace(QUICK, pretrained=str(model), data=str(photos), teacher=str(tmp_path / "fix"))
    objective = recipe.objective()
    assert [handle.fix.type for handle in vitreg.applied(objective.teacher)] == ["registers"]
    images = torch.randn(2, 3, 64, 64)
    with fix.applied_to(vit):
        assert torch.equal(objective.teacher(images), vit(images))


def test_a_student_that_is_its_teacher_has_no_loss(model: Path, photos: Path, tmp_path: Path) -> None:
    vit = vitreg.load(str(model))
    vitreg.TestTimeRegisters({}, 0).save(tmp_path / "nothing", vit=vit)
    recipe = replace(
        QUICK, pretrained=str(model), data=str(photos), teacher=str(tmp_path / "nothing"), registers=0
    )
    with torch.no_grad():
        losses = recipe.objective()(torch.randn(2, 3, 64, 64))
    assert all(abs(float(losses[name])) < 1e-5 for name in ("loss", "patches", "cls", "logits"))
    assert float(losses["cosine"]) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pretrained": None}, "pretrained is not set: expected the model that gets registers"),
        ({"train": ("head",)}, "train='head': expected some of positions, patches"),
    ],
)
def test_recipes_that_cannot_be(change: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        replace(QUICK, **change).objective()


# -- where registers start -------------------------------------------------------------------------


def test_tables_of_positions_are_found() -> None:
    vit = vitreg.wrap(timm.create_model("vit_tiny_patch16_224", depth=2), image_size=224)
    assert position_table(vit).weight is vit.model.pos_embed
    small = transformers.Dinov2Config(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, image_size=56, patch_size=14
    )
    dino = vitreg.wrap(transformers.Dinov2Model(small), image_size=56)
    assert position_table(dino).weight is dino.model.embeddings.position_embeddings
    clip = transformers.CLIPVisionConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=3, image_size=64,
        patch_size=16,
    )  # fmt: skip
    tower = vitreg.wrap(transformers.CLIPVisionModel(clip), image_size=64)
    table = position_table(tower)
    assert table is not None
    assert (table.weight.shape, table.others) == ((17, 48), 1)
    rotary = timm.create_model("vit_small_patch16_rope_mixed_224", embed_dim=48, depth=2, num_heads=3)
    wrapped = vitreg.wrap(rotary, image_size=224)
    assert position_table(wrapped) is None


def test_bound_positions_become_those_of_their_neighbours() -> None:
    vit = vitreg.wrap(timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2), image_size=64)
    table = vit.model.pos_embed
    before = table.detach().clone()
    bound = torch.zeros(4, 4, dtype=torch.bool)
    bound[0, 0] = bound[2, 2] = bound[2, 3] = True
    _smooth(table, bound, vit.layout)
    old, new = (x[0, 1:].view(4, 4, -1) for x in (before, table.detach()))
    assert torch.equal(new[~bound], old[~bound])
    assert torch.equal(table[0, 0], before[0, 0])  # CLS
    assert torch.allclose(new[0, 0], (old[0, 1] + old[1, 0] + old[1, 1]) / 3)
    assert torch.allclose(new[2, 3], (old[1, 2] + old[1, 3] + old[3, 2] + old[3, 3]) / 4)


def test_without_bound_outliers_nothing_is_seeded() -> None:
    vit = vitreg.wrap(timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2), image_size=64)
    before = vit.model.pos_embed.detach().clone()
    assert initial_registers(vit, [torch.randn(4, 3, 64, 64)], 2) is None
    assert torch.equal(vit.model.pos_embed, before)


def test_seeding_alone_moves_the_sinks_of_the_real_model(shared: Path) -> None:
    vit = vitreg.load(str(shared / "models" / TINY))
    val = shared / "data" / "imagenette" / "val"
    photos = [b.pixels for b in vitreg.read_images(val, vit, batch_size=20, limit=40, workers=0)]
    before = vitreg.diagnose(vit, photos, examples=0)
    original = vit.model.pos_embed.detach().clone()
    registers = initial_registers(vit, photos, 4)
    assert registers is not None
    moved = (vit.model.pos_embed != original).any(-1)[0, 1:].nonzero().flatten().tolist()
    assert moved == [0, 13, 182, 195]  # the corners, and nothing else
    add_registers(vit.model, 4, initial=registers)
    after = vitreg.diagnose(vit, photos, examples=0)
    assert before.outlier_fraction > 0.015
    assert after.outlier_fraction < 0.001


def test_a_few_steps_on_the_real_model_keep_its_predictions(shared: Path, tmp_path: Path) -> None:
    """The recipe itself, on 48 photos and in four steps; the whole run is in docs/."""
    model, data = shared / "models" / TINY, shared / "data" / "imagenette"
    folder = tmp_path / "photos"
    folder.mkdir()
    for path in sorted((data / "train").rglob("*.*"))[::31][:48]:
        (folder / path.name).symlink_to(path)
    recipe = replace(
        find_recipe("registers_vit_tiny"), pretrained=str(model), data=str(folder), batch_size=8,
        steps=4, warmup=0, views=1, val=None, diagnose_every=4,
    )  # fmt: skip
    seed_all(0)
    run = train(recipe, tmp_path / "run")
    assert run.log[-1]["outliers"] < 0.1
    verdict = json.loads(run.written["verdict"].read_text())
    agreement = next(m for m in verdict["measures"] if m["name"] == "agreement")
    assert agreement["after"]["value"] > 0.85
    assert top1(vitreg.load(str(run.written["model"])), str(data / "val")) > 68
