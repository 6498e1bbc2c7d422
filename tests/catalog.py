"""Small Vision Transformers of every supported family, with random weights and what is true of each.

    CATALOG["timm dinov3"].backbone()      # a fresh Backbone, built without a download
    CATALOG["timm dinov3"].truth           # prefix, registers, grid, depth, width, neurons, heads

Each model is its library's own class, made small. LayerScale is 1 and the other weights are drawn wide,
so that blocks matter and attention is far from uniform: at their initial values an error in either
would be invisible.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import authors_models
import paired_models
import rotary_models
import torch
from torch import Tensor, nn

import vitreg

DEPTH = 3


class Truth(NamedTuple):
    """What is known of a model from its configuration."""

    prefix: int
    registers: int
    grid: tuple[int, int]
    depth: int
    width: int
    neurons: int
    heads: int


@dataclass(frozen=True)
class Entry:
    """How to build a model, the images it takes (height, width), and what is true of it."""

    build: Callable[[], nn.Module]
    image_size: tuple[int, int]
    truth: Truth

    def backbone(self, seed: int = 0) -> vitreg.Backbone:
        return vitreg.wrap(self.module(seed), image_size=self.image_size)

    def module(self, seed: int = 0) -> nn.Module:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some libraries deprecate their own constructors
            torch.manual_seed(seed)
            return randomise(self.build()).eval()


def images(vit: vitreg.Backbone, count: int = 2, seed: int = 0) -> Tensor:
    """Noise images (count, 3, h, w) of the size that the model was built for."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, *vit.image_size, generator=generator) * 2 - 1


@torch.no_grad()
def randomise(model: nn.Module) -> nn.Module:
    """Draw weights that make blocks matter: LayerScale 1, matrices of gain 1.5, wide tokens and positions."""
    matrices = {
        parameter
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv2d | nn.MultiheadAttention)
        for parameter in module.parameters(recurse=False)
    }
    for name, parameter in model.named_parameters():
        leaf = name.rpartition(".")[2]
        if leaf.startswith(("gamma", "lambda")):
            parameter.fill_(1.0)
        elif parameter.dim() >= 2:
            wide = 1.5 / parameter[0].numel() ** 0.5 if parameter in matrices else 0.5
            parameter.normal_(0, wide)
        elif parameter.dim() == 1:
            parameter.normal_(float(leaf == "weight"), 0.1)
    return model


# -- timm ------------------------------------------------------------------------------------------

SMALL = {
    "embed_dim": 32,
    "depth": DEPTH,
    "num_heads": 4,
    "patch_size": 8,
    "img_size": (32, 40),
    "num_classes": 5,
}


def timm_model(name: str, **changes: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, **(SMALL | changes))

    return build


def timm_entry(
    name: str,
    prefix: int = 1,
    registers: int = 0,
    neurons: int = 128,
    heads: int = 4,
    width: int = 32,
    size: tuple[int, int] = (32, 40),
    **changes: Any,
) -> Entry:
    patch = changes.get("patch_size", 8)
    truth = Truth(prefix, registers, (size[0] // patch, size[1] // patch), DEPTH, width, neurons, heads)
    settings = {"img_size": size, "embed_dim": width, "num_heads": heads} | changes
    return Entry(timm_model(name, **settings), size, truth)


def timm_own_head_width() -> nn.Module:
    """Attention wider than the model: its output projection also leads back to the width."""
    from timm.layers import Attention
    from timm.models.vision_transformer import VisionTransformer

    class Wide(Attention):
        def __init__(self, dim: int, **settings: Any) -> None:
            super().__init__(dim, attn_head_dim=12, **settings)

    return VisionTransformer(
        img_size=(32, 40),
        patch_size=8,
        num_classes=5,
        embed_dim=32,
        depth=DEPTH,
        num_heads=4,
        attn_layer=Wide,
    )


def timm_hybrid() -> nn.Module:
    from timm.layers import StdConv2dSame
    from timm.models.resnetv2 import ResNetV2
    from timm.models.vision_transformer import VisionTransformer
    from timm.models.vision_transformer_hybrid import HybridEmbed

    stem = ResNetV2(
        (1, 1), channels=(32, 32), num_classes=0, global_pool="", preact=False,
        stem_type="same", stem_chs=32, bottle_ratio=1, conv_layer=StdConv2dSame,
    )  # fmt: skip
    return VisionTransformer(
        img_size=(32, 40), patch_size=1, embed_dim=32, depth=DEPTH, num_heads=4, num_classes=5,
        embed_layer=lambda **kw: HybridEmbed(stem, **kw),
    )  # fmt: skip


TIMM = {
    "timm vit": timm_entry("vit_small_patch16_224"),
    "timm deit": timm_entry("deit_small_patch16_224"),
    "timm deit distilled": timm_entry("deit_small_distilled_patch16_224", prefix=2),
    "timm deit3": timm_entry("deit3_small_patch16_224"),
    "timm dinov2": timm_entry("vit_small_patch14_dinov2"),
    "timm dinov2 registers": timm_entry("vit_small_patch14_reg4_dinov2", registers=4),
    "timm dinov2 swiglu": timm_entry("vit_giant_patch14_dinov2", neurons=85),
    "timm dinov3": timm_entry("vit_small_patch16_dinov3", registers=4),
    "timm dinov3 swiglu": timm_entry("vit_small_plus_patch16_dinov3", registers=4),
    "timm eva02": timm_entry("eva02_tiny_patch14_224", neurons=85),
    "timm siglip": timm_entry("vit_base_patch16_siglip_224", prefix=0),
    "timm clip": timm_entry("vit_base_patch32_clip_224"),
    "timm beit": timm_entry("beit_base_patch16_224"),
    "timm beitv2": timm_entry("beitv2_base_patch16_224"),
    "timm relpos": timm_entry("vit_relpos_small_patch16_224", prefix=0),
    "timm relpos cls": timm_entry("vit_relpos_base_patch16_clsgap_224"),
    "timm srelpos": timm_entry("vit_srelpos_small_patch16_224", prefix=0),
    "timm rope mixed": timm_entry("vit_small_patch16_rope_mixed_224"),
    "timm pe core": timm_entry("vit_pe_core_tiny_patch16_384", attn_pool_num_heads=4),
    "timm pe spatial": timm_entry("vit_pe_spatial_tiny_patch16_512"),
    "timm so150m": timm_entry(
        "vit_so150m2_patch16_reg1_gap_256", prefix=0, registers=1, width=48, heads=3, neurons=125
    ),
    "timm naflexvit": timm_entry("naflexvit_base_patch16_gap", prefix=0, registers=4),
    "timm parallel attention": timm_entry(
        "vit_pwee_patch16_reg1_gap_256", prefix=0, registers=1, neurons=160
    ),
    "timm oblong patches": Entry(
        timm_model("vit_small_patch16_224", patch_size=(8, 4), img_size=(32, 24)),
        (32, 24),
        Truth(1, 0, (4, 6), DEPTH, 32, 128, 4),
    ),
    "timm own head width": Entry(timm_own_head_width, (32, 40), Truth(1, 0, (4, 5), DEPTH, 32, 128, 4)),
    "timm beit3": timm_entry("beit3_base_patch16_224"),
    "timm hybrid": Entry(timm_hybrid, (32, 40), Truth(1, 0, (4, 5), DEPTH, 32, 128, 4)),
}


# -- transformers ----------------------------------------------------------------------------------

HF_SMALL: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "layerscale_value": 1.0,
}


def hf_entry(
    model: str,
    config: str,
    prefix: int = 1,
    registers: int = 0,
    neurons: int = 128,
    size: tuple[int, int] = (32, 40),
    **changes: Any,
) -> Entry:
    def build() -> nn.Module:
        import transformers

        settings = HF_SMALL | ({} if "dinov2" in config.lower() else {"intermediate_size": neurons}) | changes
        return getattr(transformers, model)(getattr(transformers, config)(**settings))

    return Entry(build, size, Truth(prefix, registers, (size[0] // 8, size[1] // 8), DEPTH, 32, neurons, 4))


def hf_clip_tower() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    text = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    vision = HF_SMALL | {"intermediate_size": 128}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).vision_model


def hf_llava_tower() -> nn.Module:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(**HF_SMALL, intermediate_size=128)
    text = LlamaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        pad_token_id=0,
    )  # fmt: skip
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text)
    ).model.vision_tower


_CLIP_TRUTH = Truth(1, 0, (4, 5), DEPTH, 32, 128, 4)

TRANSFORMERS = {
    "hf dinov2": hf_entry("Dinov2Model", "Dinov2Config"),
    "hf dinov2 swiglu": hf_entry("Dinov2Model", "Dinov2Config", neurons=88, use_swiglu_ffn=True),
    "hf dinov2 registers": hf_entry("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", registers=4),
    "hf dinov2 registers swiglu": hf_entry(
        "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", registers=4, neurons=88, use_swiglu_ffn=True
    ),
    "hf dinov3": hf_entry("DINOv3ViTModel", "DINOv3ViTConfig", registers=4, num_register_tokens=4),
    "hf dinov3 gated": hf_entry("DINOv3ViTModel", "DINOv3ViTConfig", neurons=48, use_gated_mlp=True),
    "hf clip": hf_entry("CLIPVisionModel", "CLIPVisionConfig"),
    "hf clip projection": hf_entry("CLIPVisionModelWithProjection", "CLIPVisionConfig", projection_dim=16),
    "hf clip inside CLIPModel": Entry(hf_clip_tower, (32, 40), _CLIP_TRUTH),
    "hf clip inside LLaVA": Entry(hf_llava_tower, (32, 40), _CLIP_TRUTH),
    "hf siglip": hf_entry("SiglipVisionModel", "SiglipVisionConfig", prefix=0),
    "hf siglip2": hf_entry(
        "Siglip2VisionModel", "Siglip2VisionConfig", prefix=0, size=(24, 48), num_patches=16
    ),
    "hf vit": hf_entry("ViTModel", "ViTConfig"),
    "hf vit classifier": hf_entry("ViTForImageClassification", "ViTConfig"),
    "hf deit": hf_entry("DeiTModel", "DeiTConfig", prefix=2),
    "hf beit": hf_entry("BeitModel", "BeitConfig", size=(32, 32), use_relative_position_bias=True),
    "hf data2vec": hf_entry(
        "Data2VecVisionModel", "Data2VecVisionConfig", size=(32, 32), use_shared_relative_position_bias=True
    ),
    "hf msn": hf_entry("ViTMSNModel", "ViTMSNConfig"),
    "hf aimv2": hf_entry("Aimv2VisionModel", "Aimv2VisionConfig", prefix=0, size=(32, 32)),
    "hf internvl": hf_entry(
        "InternVLVisionModel",
        "InternVLVisionConfig",
        size=(32, 32),
        image_size=(32, 32),
        patch_size=(8, 8),
    ),
    "hf dinov2 backbone": hf_entry(
        "Dinov2Backbone", "Dinov2Config", out_features=["stage1", "stage3"], reshape_hidden_states=True
    ),
    "hf ijepa": hf_entry("IJepaModel", "IJepaConfig", prefix=0),
}


# -- open_clip -------------------------------------------------------------------------------------


def open_clip_visual(**vision: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from open_clip.model import CLIP

        settings = {"layers": DEPTH, "width": 32, "head_width": 8, "patch_size": 8, "image_size": (32, 40)}
        text = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 2}
        return CLIP(16, settings | vision, text).visual

    return build


_OPEN_CLIP_TRUTH = Truth(1, 0, (4, 5), DEPTH, 32, 128, 4)

OPEN_CLIP = {
    "open_clip vit": Entry(open_clip_visual(), (32, 40), _OPEN_CLIP_TRUTH),
    "open_clip vit layer scale": Entry(open_clip_visual(ls_init_value=1e-5), (32, 40), _OPEN_CLIP_TRUTH),
    "open_clip vit qk norm": Entry(open_clip_visual(qk_norm=True), (32, 40), _OPEN_CLIP_TRUTH),
    "open_clip coca": Entry(
        open_clip_visual(attentional_pool=True, attn_pooler_heads=4, output_tokens=True),
        (32, 40),
        _OPEN_CLIP_TRUTH,
    ),
    "open_clip timm tower": Entry(
        open_clip_visual(timm_model_name="test_vit", timm_pool="token", image_size=(64, 80)),
        (64, 80),
        Truth(1, 0, (4, 5), 6, 64, 192, 2),
    ),
}


# -- torchvision -----------------------------------------------------------------------------------


def torchvision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 8, DEPTH, 4, 32, 128, num_classes=5)


TORCHVISION = {"torchvision vit": Entry(torchvision_vit, (32, 32), Truth(1, 0, (4, 4), DEPTH, 32, 128, 4))}


# -- as authors write them: attention step by step ------------------------------------------------


def authors(first: bool = False, **kind: Any) -> Entry:
    return Entry(
        lambda: authors_models.Authors(first=first, **kind), (32, 40), Truth(1, 0, (4, 5), DEPTH, 32, 128, 4)
    )


def timm_step_by_step(name: str) -> Entry:
    """A timm model as it is built where no fused kernel is wanted."""

    def build() -> nn.Module:
        from timm.layers import set_fused_attn

        set_fused_attn(False)
        try:
            return TIMM[name].build()
        finally:
            set_fused_attn(True)

    return replace(TIMM[name], build=build)


def hf_step_by_step(name: str) -> Entry:
    def build() -> nn.Module:
        model: Any = TRANSFORMERS[name].build()
        model.set_attn_implementation("eager")
        return model

    return replace(TRANSFORMERS[name], build=build)


STEP_BY_STEP = {
    "authors dino": authors(attention=authors_models.Attention),
    "authors in place": authors(attention=authors_models.InPlace),
    "authors einsum": authors(attention=authors_models.Einsum),
    "authors folded heads": authors(attention=authors_models.Folded),
    "authors where": authors(attention=authors_models.Where),
    "authors rotary halves": authors(attention=rotary_models.Halves),
    "authors rotary centred": authors(attention=rotary_models.Centred),
    "authors rotary interleaved": authors(attention=rotary_models.Interleaved),
    "authors rotary complex": authors(attention=rotary_models.Complex),
    "authors added positions": authors(attention=rotary_models.Added),
    "authors pairs": Entry(paired_models.Paired, (32, 40), Truth(1, 0, (4, 5), DEPTH, 32, 128, 4)),
    "authors pairs by number": Entry(
        lambda: paired_models.Paired(authors_models.Einsum, "by number"),
        (32, 40),
        Truth(1, 0, (4, 5), DEPTH, 32, 128, 4),
    ),
    "authors chunks": authors(chunks=[range(2), range(2, 3)]),
    "timm beit step by step": timm_step_by_step("timm beit"),
    "timm dinov3 step by step": timm_step_by_step("timm dinov3"),
    "hf beit step by step": hf_step_by_step("hf beit"),
    "hf dinov2 registers step by step": hf_step_by_step("hf dinov2 registers"),
}

CATALOG: dict[str, Entry] = TIMM | TRANSFORMERS | OPEN_CLIP | TORCHVISION | STEP_BY_STEP

# One of each kind: plain, another library's, rotary, with a positional bias, nn.MultiheadAttention, step by
# step, with positions made in the blocks.
FEW = [
    "timm vit",
    "hf dinov2 registers",
    "timm dinov3",
    "timm beit",
    "hf beit",
    "open_clip vit",
    "authors folded heads",
    "authors rotary halves",
]


@cache
def built(name: str) -> vitreg.Backbone:
    return CATALOG[name].backbone()
