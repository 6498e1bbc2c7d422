"""One fix for one checkpoint in any library; independent copies; exported graphs.

A checkpoint with random weights is converted between a library's form and that of transformers, by name.
"""

import copy
import gc
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from catalog import CATALOG, DEPTH, HF_SMALL, open_clip_visual, randomise, timm_model
from torch import Tensor, nn

import vitreg
from vitreg.fixes import TestTimeRegisters
from vitreg.fixes.neurons import RegisterNeurons
from vitreg.fixes.saving import load_fix
from vitreg.models.probe import first_tensor

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
SIZE = (32, 32)


def fix_for(neurons: int) -> TestTimeRegisters:
    """Arbitrary neurons in every block, the last of each among them."""
    given = RegisterNeurons.of({0: [3, 17, neurons - 1], 1: [5], 2: [40, neurons - 1]})
    return TestTimeRegisters(given, registers=2, share="split")


def noise(count: int = 2, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, *SIZE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def shown(model: nn.Module, images: Tensor) -> Tensor:
    """Every token after the final norm; of open_clip's models, which hand out nothing else, CLS."""
    with torch.no_grad():
        if hasattr(model, "forward_features"):
            return model.forward_features(images)
        output = model(images)
    return output if isinstance(output, Tensor) else output.last_hidden_state


# -- one checkpoint in two forms ---------------------------------------------------------------------


@dataclass(frozen=True)
class Forms:
    """A family's own form and that of transformers, and which weight is which.

    In the names, {i} is a block and {p} weight or bias. Where theirs has {q} (query, key, value) or {g}
    (gate, up), one weight of the family's own form is several.
    """

    own: Callable[[], nn.Module]
    hf: Callable[[], nn.Module]
    same: dict[str, str]

    def pairs(self) -> list[tuple[str, list[str]]]:
        found = {}
        for ours, theirs in self.same.items():
            for i in range(DEPTH):
                for p in ("weight", "bias"):
                    parts = [{"q": q, "g": g} for q, g in zip("qkv", ("gate", "up", "up"), strict=True)]
                    names = [theirs.format(i=i, p=p, **part) for part in parts]
                    found[ours.format(i=i, p=p)] = list(dict.fromkeys(names))
        return list(found.items())

    def to_hf(self, model: nn.Module) -> nn.Module:
        state, twin = model.state_dict(), self.hf().eval()
        assert set(state) == {ours for ours, _ in self.pairs()}, "every weight has its place"
        parts = {
            name: part
            for ours, theirs in self.pairs()
            for name, part in zip(theirs, state[ours].chunk(len(theirs)), strict=True)
        }
        missing, unexpected = twin.load_state_dict(parts, strict=False)
        assert set(missing) <= {"embeddings.mask_token"}
        assert not unexpected
        return twin

    def from_hf(self, model: nn.Module) -> nn.Module:
        state, twin = model.state_dict(), self.own().eval()
        twin.load_state_dict({o: torch.cat([state[name] for name in theirs]) for o, theirs in self.pairs()})
        return twin


def hf(model: str, config: str, **changes: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        settings = HF_SMALL | {"layer_norm_eps": 1e-6} | changes
        made = getattr(transformers, config)(**settings)
        more = {"add_pooling_layer": False} if model == "ViTModel" else {}
        return getattr(transformers, model)(made, **more)

    return build


def own(name: str, **changes: Any) -> Callable[[], nn.Module]:
    return timm_model(name, img_size=SIZE, num_classes=0, **changes)


def own_clip() -> nn.Module:
    visual = open_clip_visual(image_size=SIZE)()
    visual.proj = None  # the normalised CLS token comes out, as `pooler_output` does
    return visual


def hf_clip() -> nn.Module:
    return hf(
        "CLIPVisionModel", "CLIPVisionConfig", intermediate_size=128, hidden_act="gelu", layer_norm_eps=1e-5
    )()


STEM = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.{p}": "embeddings.patch_embeddings.projection.{p}",
    "norm.{p}": "layernorm.{p}",
}
VIT = STEM | {
    "blocks.{i}.norm1.{p}": "layers.{i}.layernorm_before.{p}",
    "blocks.{i}.attn.qkv.{p}": "layers.{i}.attention.{q}_proj.{p}",
    "blocks.{i}.attn.proj.{p}": "layers.{i}.attention.o_proj.{p}",
    "blocks.{i}.norm2.{p}": "layers.{i}.layernorm_after.{p}",
    "blocks.{i}.mlp.fc1.{p}": "layers.{i}.mlp.fc1.{p}",
    "blocks.{i}.mlp.fc2.{p}": "layers.{i}.mlp.fc2.{p}",
}
DINOV2 = STEM | {
    "blocks.{i}.norm1.{p}": "encoder.layer.{i}.norm1.{p}",
    "blocks.{i}.attn.qkv.{p}": "encoder.layer.{i}.attention.{q}_proj.{p}",
    "blocks.{i}.attn.proj.{p}": "encoder.layer.{i}.attention.o_proj.{p}",
    "blocks.{i}.ls1.gamma": "encoder.layer.{i}.layer_scale1.lambda1",
    "blocks.{i}.norm2.{p}": "encoder.layer.{i}.norm2.{p}",
    "blocks.{i}.mlp.fc1.{p}": "encoder.layer.{i}.mlp.fc1.{p}",
    "blocks.{i}.mlp.fc2.{p}": "encoder.layer.{i}.mlp.fc2.{p}",
    "blocks.{i}.ls2.gamma": "encoder.layer.{i}.layer_scale2.lambda1",
}
SWIGLU = DINOV2 | {
    "blocks.{i}.mlp.fc1.{p}": "encoder.layer.{i}.mlp.{g}_proj.{p}",
    "blocks.{i}.mlp.fc2.{p}": "encoder.layer.{i}.mlp.down_proj.{p}",
}
CLIP = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre.{p}": "pre_layrnorm.{p}",
    "ln_post.{p}": "post_layernorm.{p}",
    "transformer.resblocks.{i}.ln_1.{p}": "encoder.layers.{i}.layer_norm1.{p}",
    "transformer.resblocks.{i}.attn.in_proj_{p}": "encoder.layers.{i}.self_attn.{q}_proj.{p}",
    "transformer.resblocks.{i}.attn.out_proj.{p}": "encoder.layers.{i}.self_attn.out_proj.{p}",
    "transformer.resblocks.{i}.ln_2.{p}": "encoder.layers.{i}.layer_norm2.{p}",
    "transformer.resblocks.{i}.mlp.c_fc.{p}": "encoder.layers.{i}.mlp.fc1.{p}",
    "transformer.resblocks.{i}.mlp.c_proj.{p}": "encoder.layers.{i}.mlp.fc2.{p}",
}

FAMILIES = {
    "vit": Forms(own("vit_small_patch16_224"), hf("ViTModel", "ViTConfig", intermediate_size=128), VIT),
    "dinov2": Forms(own("vit_small_patch14_dinov2"), hf("Dinov2Model", "Dinov2Config"), DINOV2),
    "dinov2 swiglu": Forms(
        own("vit_giant_patch14_dinov2", mlp_ratio=5.5),
        hf("Dinov2Model", "Dinov2Config", use_swiglu_ffn=True),
        SWIGLU,
    ),
    "clip": Forms(own_clip, hf_clip, CLIP),
}


def both(family: str, trained_as: str) -> tuple[nn.Module, nn.Module]:
    """(own form, transformers form) of one checkpoint, converted one way or the other."""
    forms = FAMILIES[family]
    if trained_as == "own":
        model = randomise(forms.own()).eval()
        return model, forms.to_hf(model)
    model = randomise(forms.hf()).eval()
    return forms.from_hf(model), model


def comparable(one: nn.Module, other: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """What both forms hand out."""
    first, second = shown(one, images), shown(other, images)
    if first.dim() == second.dim():
        return first, second
    with torch.no_grad():  # CLIP: CLS, normalised
        return first, other(images).pooler_output


@pytest.mark.parametrize("trained_as", ["own", "hf"])
@pytest.mark.parametrize("found_on", ["own", "hf"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fix_goes_from_one_form_of_a_checkpoint_to_the_other(tmp_path, family, found_on, trained_as):
    """With no warning about other weights: warnings are errors here."""
    mine, theirs = both(family, trained_as)
    plain = comparable(mine, theirs, noise())
    torch.testing.assert_close(*plain, **CLOSE)
    source, target = (mine, theirs) if found_on == "own" else (theirs, mine)
    vit = vitreg.wrap(source)
    folder = fix_for(vit.anatomy.neurons).save(tmp_path / "fix", vit=vit)
    load_fix(folder).apply(source)
    load_fix(folder).apply(target)
    fixed = comparable(mine, theirs, noise())
    torch.testing.assert_close(*fixed, **CLOSE)
    assert all((a - b).abs().max() > 0.05 for a, b in zip(fixed, plain, strict=True))


# -- copies ------------------------------------------------------------------------------------------

# Of each library one, rotary positions, and positional biases.
NAMES = ["timm vit", "timm dinov3", "timm relpos cls", "hf dinov2", "open_clip vit"]


def wrapped(name: str) -> vitreg.Backbone:
    module = CATALOG[name].module()
    return vitreg.wrap(module, image_size=SIZE if name.startswith("hf") else CATALOG[name].image_size)


def batch(vit: vitreg.Backbone, count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, *vit.image_size, generator=generator) * 2 - 1


def run(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return first_tensor(model(images))


@pytest.mark.parametrize("name", NAMES)
def test_a_baked_copy_is_independent(name):
    vit = wrapped(name)
    fix, images = fix_for(vit.anatomy.neurons), batch(vit, 2)
    plain = run(vit.model, images)
    keys = list(vit.model.state_dict())
    twin = fix.bake(vit.model)
    assert torch.equal(run(vit.model, images), plain)
    with fix.applied_to(vit):
        expected = run(vit.model, images)
    assert not torch.allclose(expected, plain, atol=0.05)
    assert torch.equal(run(twin, images), expected)  # and undoing the other changed nothing
    assert list(twin.state_dict()) == keys
    with torch.no_grad():
        for parameter in vit.model.parameters():
            parameter.zero_()
    del vit
    gc.collect()
    assert torch.equal(run(twin, images), expected)
    assert torch.equal(run(copy.deepcopy(twin), images), expected)


# -- exported graphs ---------------------------------------------------------------------------------


def fixed(name: str) -> tuple[vitreg.Backbone, Tensor]:
    """A fixed model and what it gave before."""
    vit = wrapped(name)
    plain = run(vit.model, batch(vit, 3, seed=1))
    fix_for(vit.anatomy.neurons).apply(vit)
    return vit, plain


@pytest.mark.slow
@pytest.mark.parametrize(("name", "strict"), [*((name, False) for name in NAMES), ("hf dinov2", True)])
def test_torch_export(name, strict):
    """With any number of images."""
    vit, plain = fixed(name)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the libraries
        sizes = ({0: torch.export.Dim("images", min=1, max=64)},)
        program = torch.export.export(vit.model, (batch(vit, 2),), dynamic_shapes=sizes, strict=strict)
    other = batch(vit, 3, seed=1)
    expected = run(vit.model, other)
    torch.testing.assert_close(run(program.module(), other), expected, **CLOSE)
    assert (expected - plain).abs().max() > 0.05


BY_NIGHT = [pytest.param(name, marks=pytest.mark.nightly) for name in ("timm dinov3", "open_clip vit")]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm vit", "hf dinov2", *BY_NIGHT])
def test_onnx(name: str, tmp_path: Path):
    vit, plain = fixed(name)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            vit.model, (batch(vit, 2),), dynamo=True, dynamic_shapes=({0: "images"},), verbose=False
        )
    program.save(tmp_path / "fixed.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "fixed.onnx")
    other = batch(vit, 3, seed=1)
    expected = run(vit.model, other)
    found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: other.numpy()})[0])
    torch.testing.assert_close(found, expected, **CLOSE)
    assert (expected - plain).abs().max() > 0.05
