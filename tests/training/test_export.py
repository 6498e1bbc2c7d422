"""Models with added registers as their library's own register-aware class: equal, and loaded as any other."""

import re

import pytest
import timm
import torch
from catalog import CATALOG, Entry, hf_entry, images, randomise, timm_entry
from looking import close, different, footprint, same, tensors
from torch import Tensor

import vitreg
from vitreg.errors import FixError, UnsupportedModelError
from vitreg.fixes import TestTimeRegisters, TrainedRegisters
from vitreg.fixes.added_registers import add_registers
from vitreg.training.exporting import export

SQUARE = {"size": (32, 32)}  # of transformers' models: their own size
MODELS: dict[str, Entry] = {
    name: CATALOG[name]
    for name in (
        "timm vit", "timm deit3", "timm dinov2", "timm dinov2 registers", "timm dinov3", "timm eva02",
        "timm siglip", "timm rope mixed", "timm so150m", "timm parallel attention", "timm oblong patches",
    )
} | {
    "timm dynamic size": timm_entry("vit_small_patch16_224", dynamic_img_size=True),
    "timm no cls": timm_entry("vit_small_patch16_224", prefix=0, class_token=False, global_pool="avg"),
    "timm no head": timm_entry("vit_small_patch16_224", num_classes=0),
    "timm all tokens": timm_entry("vit_small_patch16_224", num_classes=0, global_pool=""),
    "hf dinov2": hf_entry("Dinov2Model", "Dinov2Config", **SQUARE),
    "hf dinov2 without mask token": hf_entry("Dinov2Model", "Dinov2Config", use_mask_token=False, **SQUARE),
    "hf dinov2 classifier": hf_entry("Dinov2ForImageClassification", "Dinov2Config", num_labels=5, **SQUARE),
    "hf dinov2 registers": hf_entry(
        "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", registers=4, **SQUARE
    ),
    "hf dinov3": hf_entry("DINOv3ViTModel", "DINOv3ViTConfig", registers=4, num_register_tokens=4, **SQUARE),
}  # fmt: skip


@pytest.fixture(params=MODELS)
def vit(request: pytest.FixtureRequest) -> vitreg.Backbone:
    """A model with two added registers."""
    vit = MODELS[request.param].backbone()
    add_registers(vit, 2, initial=torch.randn(2, vit.anatomy.width))
    return vit


def main_output(vit: vitreg.Backbone, batch: Tensor) -> Tensor:
    """What the model is run for, without registers."""
    with torch.no_grad():
        return without_registers(vit, tensors(vit(batch))[0])


def without_registers(vit: vitreg.Backbone, x: Tensor) -> Tensor:
    if x.shape[1] != vit.layout.tokens:
        return x
    return torch.cat([x[:, vit.layout.prefix_slice], x[:, vit.layout.patch_slice]], 1)


# -- equal -------------------------------------------------------------------------------------------


def test_the_exported_model_gives_the_same_outputs(vit):
    before = footprint(vit.model)
    batch = images(vit, 3)
    expected = main_output(vit, batch)
    twin = export(vit.model)
    other = vitreg.wrap(twin, image_size=vit.image_size)
    close(main_output(other, batch), expected)
    assert other.anatomy.registers == vit.anatomy.registers + 2
    assert (other.anatomy.prefix, other.layout.grid) == (vit.anatomy.prefix, vit.layout.grid)
    assert footprint(vit.model) == before
    assert same(main_output(vit, batch), expected)
    vit.model.added_registers.data.zero_()
    assert different(main_output(vit, batch), expected)  # or nothing would have been shown


def test_every_token_after_every_block_is_the_same(vit):
    batch = images(vit, 3)
    other = vitreg.wrap(export(vit.model), image_size=vit.image_size)
    with (
        torch.no_grad(),
        vitreg.trace(vit, residuals=True) as one,
        vitreg.trace(other, residuals=True) as two,
    ):
        vit(batch)
        other(batch)
    for x, y in zip(one.residuals, two.residuals, strict=True):
        close(without_registers(other, y), without_registers(vit, x))


def test_another_image_size():
    vit = MODELS["timm dynamic size"].backbone()
    add_registers(vit, 2, initial=torch.randn(2, 32))
    twin, batch = export(vit.model), torch.rand(2, 3, 48, 24)
    with torch.no_grad():
        close(twin(batch), vit.model(batch))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_it_has_the_type_and_mode_of_the_original(dtype):
    vit = MODELS["timm vit"].backbone()
    vit.model.to(dtype).train()
    registers = add_registers(vit.model, 2)
    twin = export(vit.model)
    assert {x.dtype for x in twin.parameters()} == {dtype}
    assert twin.training
    assert torch.equal(twin.reg_token[0], registers)


def test_positions_of_registers_are_zero():
    vit = MODELS["timm vit"].backbone()
    add_registers(vit, 2)
    twin = export(vit.model)
    assert twin.pos_embed.shape[1] == vit.model.pos_embed.shape[1] + 2
    assert not twin.pos_embed[:, 1:3].any()
    assert torch.equal(twin.pos_embed[:, [0, *range(3, 23)]], vit.model.pos_embed)


def test_it_is_what_the_library_builds():
    """The weights load into a model that was built with registers from the start."""
    vit = MODELS["timm vit"].backbone()
    add_registers(vit, 2, initial=torch.randn(2, 32))
    twin = export(vit.model)
    fresh = timm_entry("vit_small_patch16_224", reg_tokens=2).module()
    fresh.load_state_dict(twin.state_dict())
    with torch.no_grad():
        assert same(fresh(images(vit)), twin(images(vit)))
    assert type(twin) is type(fresh)
    assert not [name for module in twin.modules() for name in vars(module) if "vitreg" in name]


# -- of a fix ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 2])
def test_a_model_with_the_fix_is_exported(n):
    vit = MODELS["timm vit"].backbone()
    after = MODELS["timm vit"].backbone()
    if n:
        add_registers(after, n, initial=torch.randn(n, 32))
    randomise(after.model.blocks[1])
    fix = TrainedRegisters.between(vit, after)
    expected = main_output(after, images(vit))
    plain = main_output(vit, images(vit))
    with fix.applied_to(vit):
        twins = [export(vit.model)]
        assert same(main_output(vit, images(vit)), expected)
    for twin in (*twins, export(fix.bake(vit.model))):
        with torch.no_grad():
            close(twin(images(vit)), expected)
        assert (twin.reg_token is None) == (n == 0)
    assert same(main_output(vit, images(vit)), plain)
    assert different(expected, plain)


def test_the_fix_on_top_of_added_registers():
    vit = MODELS["timm vit"].backbone()
    after = MODELS["timm vit"].backbone()
    add_registers(after, 1, initial=torch.randn(1, 32))
    randomise(after.model.blocks[1])
    fix = TrainedRegisters.between(vit, after)
    add_registers(vit, 2, initial=torch.randn(2, 32))
    with fix.applied_to(vit):
        twin, expected = export(vit.model), main_output(vit, images(vit))
    with torch.no_grad():
        close(twin(images(vit)), expected)
    assert torch.equal(twin.reg_token[0], torch.cat([vit.model.added_registers, fix.tokens]))


# -- saved and loaded --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["timm vit", "timm dinov3", "hf dinov2", "hf dinov2 classifier", "hf dinov3"]
)
def test_it_is_loaded_like_any_other_model(name, tmp_path):
    vit = MODELS[name].backbone()
    add_registers(vit, 2, initial=torch.randn(2, 32))
    expected, twin = main_output(vit, images(vit)), export(vit.model)
    if name.startswith("timm"):
        timm.models.save_for_hf(twin, str(tmp_path), safe_serialization=True)
    else:
        twin.save_pretrained(tmp_path)
    loaded = vitreg.load(str(tmp_path))
    assert loaded.anatomy.registers == vit.anatomy.registers + 2
    assert loaded.image_size == vit.image_size
    close(main_output(loaded, images(vit)), expected)


def test_the_real_vit(shared, tmp_path):
    """Saved in timm's format and loaded again: the same logits, preprocessing and artifacts."""
    vit = vitreg.load(str(shared / "models/vit_tiny_patch16_224.augreg_in21k_ft_in1k"))
    add_registers(vit, 4, initial=0.5)
    timm.models.save_for_hf(export(vit.model), str(tmp_path), safe_serialization=True)
    loaded = vitreg.load(str(tmp_path))
    photos = shared / "data/imagenette/val/n01440764"
    batch = next(iter(vitreg.read_images(photos, loaded, limit=8)))
    assert same([batch.pixels], [next(iter(vitreg.read_images(photos, vit, limit=8))).pixels])
    with torch.no_grad():
        close(loaded(batch.pixels), vit(batch.pixels), 1e-5)
    one, two = (vitreg.diagnose(each, [batch]) for each in (vit, loaded))
    assert one.has_artifacts
    assert (one.detect_layer, one.outlier_fraction) == (two.detect_layer, two.outlier_fraction)
    assert two.register_tokens == 4


# -- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["timm deit distilled", "timm beit", "timm relpos", "timm hybrid", "timm naflexvit", "hf vit", "hf clip",
     "open_clip vit", "torchvision vit"],
)  # fmt: skip
def test_classes_without_registers_are_refused_with_what_there_is(name):
    vit = CATALOG[name].backbone()
    add_registers(vit, 2)
    message = (
        f"register-aware class for this {type(vit.model).__name__}. There are timm's VisionTransformer and"
    )
    with pytest.raises(UnsupportedModelError, match=re.escape(message) + r".*Keep the state dict"):
        export(vit.model)


@pytest.mark.parametrize("name", ["timm clip", "timm pe core"])
def test_a_norm_before_the_blocks_is_refused(name):
    """The library's registers would pass through it."""
    vit = CATALOG[name].backbone()
    add_registers(vit, 2, initial=1.0)
    with pytest.raises(UnsupportedModelError, match=r"gives other outputs \(by 0\.\d+.*a norm before them"):
        export(vit.model)


def test_a_model_without_registers_is_copied():
    vit = CATALOG["timm beit"].backbone()
    twin = export(vit.model)
    twin.cls_token.data.zero_()
    assert vit.model.cls_token.any()
    assert type(twin) is type(vit.model)


def test_models_with_other_fixes_are_refused():
    vit = MODELS["timm vit"].backbone()
    add_registers(vit, 2)
    with TestTimeRegisters({0: [3]}).applied_to(vit), pytest.raises(FixError, match="'registers' is applied"):
        export(vit.model)
    export(vit.model)
