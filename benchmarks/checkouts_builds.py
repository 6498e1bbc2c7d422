"""How benchmarks/checkouts.py builds models, small, from the code of their authors' checkouts.

    RECIPES["facebookresearch+dino ViT"].build(folder)

Nothing of that code is kept here but how it is called.
"""

import importlib
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """How a model is built from a checkout: what is called, with which arguments.

    `path` is module:name, and so are arguments that start with "@". `under` are the folders that go into
    sys.path, `bare` packages whose __init__ is passed over, `fake` packages that are not there: every name in
    them is a stand-in. `finish` makes the model of what was called; `forward` runs it where its own forward
    wants more than images. `blocks` is where it keeps its blocks; with `tokens_first` they give (n, b, d).
    """

    repository: str
    name: str
    path: str
    arguments: Arguments
    size: int = 32
    under: tuple[str, ...] = ("",)
    bare: tuple[str, ...] = ()
    fake: tuple[str, ...] = ()
    finish: Callable[[Any], Any] = lambda model: model
    forward: Callable[[Any, Tensor], Any] | None = None
    blocks: str = "blocks"
    tokens_first: bool = False

    def build(self, folder: Path) -> nn.Module:
        """The model with weights drawn wide, from the checkout in `folder`."""
        roots = [str(folder / self.repository / under) for under in self.under]
        sys.path[:0] = roots
        sys.meta_path.append(Fakes(self.fake))
        for name in self.bare:
            package = sys.modules[name] = types.ModuleType(name)
            package.__path__ = [f"{root}/{name.replace('.', '/')}" for root in roots]
        torch.manual_seed(0)
        arguments = {k: get(v[1:]) if str(v).startswith("@") else v for k, v in self.arguments.items()}
        model: nn.Module = self.finish(get(self.path)(**arguments))
        get("catalog:randomise")(model)
        model.eval()  # not every model returns itself
        return model


def get(path: str) -> Any:
    """What is at module:name, or what it gives when it is called, at module:name()."""
    module, _, name = path.partition(":")
    found = getattr(importlib.import_module(module), name.removesuffix("()"))
    return found() if name.endswith("()") else found


@dataclass
class Fakes(MetaPathFinder, Loader):
    """Finds packages that are not installed: they and every name in them are stand-ins."""

    names: tuple[str, ...]

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in self.names else None

    def create_module(self, spec: ModuleSpec) -> Any:
        return StandIn()

    def exec_module(self, module: Any) -> None:
        pass


class StandIn:
    """A module, a base class, a value, or a decorator or wrapper that changes nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *given: Any, **named: Any) -> Any:
        return given[0] if len(given) == 1 and callable(given[0]) else self

    def __mro_entries__(self, bases: Any) -> tuple[type, ...]:
        return ()


def older_mae(arguments: Arguments) -> Any:
    """MAE's autoencoder, with what timm and numpy had when it was written: `qk_scale` and `float`."""
    import numpy as np
    from timm.models import vision_transformer as timm_vit

    newer = timm_vit.Block
    vars(np)["float"] = float
    vars(timm_vit)["Block"] = lambda *args, qk_scale=None, **kwargs: newer(*args, **kwargs)
    return get("models_mae:MaskedAutoencoderViT")(**arguments)


def small_beit3(config: Any) -> Any:
    small = {"embed_dim": 32, "ffn_embed_dim": 64, "layers": 3, "attention_heads": 4}
    vars(config).update({f"encoder_{name}": value for name, value in small.items()})
    return get("modeling_utils:BEiT3Wrapper")(config)


def with_cropped_positions(model: Any) -> Any:
    get("radio.enable_cpe_support:enable_cpe")(model, max_img_size=64, num_cls_tokens=2, num_registers=4)
    return model


def initialised(model: Any) -> Any:
    model.init_weights()
    return model


# What most call their arguments.
COMMON: Arguments = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4}
IMAGE, LIST = COMMON | {"img_size": 32}, COMMON | {"img_size": [32]}
OPENAI: Arguments = {"patch_size": 8, "width": 32, "layers": 3, "heads": 4}
OPENAI_IMAGE = OPENAI | {"image_size": 32, "mlp_ratio": 4.0}
LUCID = {
    "image_size": 32,
    "patch_size": 8,
    "num_classes": 5,
    "dim": 32,
    "depth": 3,
    "heads": 4,
    "mlp_dim": 64,
}
AIM = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_blocks": 3, "num_heads": 4}
INTERN = {
    "patch_size": 8, "image_size": 32, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3,
    "intermediate_size": 64, "use_flash_attn": False,
}  # fmt: skip
CAPI = {
    "patch_size": 8, "n_registers": 4, "encoder_kwargs": {"embed_dim": 32, "depth": 3},
    "transformers_kwargs": {"block_kwargs": {"attn_kwargs": {"num_heads": 4}}, "drop_path_rate": 0.0},
    "decoder_kwargs": {"embed_dim": 32, "depth": 1},
}  # fmt: skip
CROCO = {
    "img_size": 32, "patch_size": 8, "enc_embed_dim": 32, "enc_depth": 3, "enc_num_heads": 4,
    "dec_embed_dim": 32, "dec_depth": 1, "dec_num_heads": 4,
}  # fmt: skip
RELATIVE = IMAGE | {"use_abs_pos_emb": False, "use_rel_pos_bias": True, "init_values": 1.0}
SHARED = IMAGE | {"use_abs_pos_emb": False, "use_shared_rel_pos_bias": True, "init_values": 1.0}
EVA02 = IMAGE | {"rope": True, "subln": True, "pt_hw_seq_len": 4}
SCALED, STEM = IMAGE | {"block_layers": "@models_v2:Layer_scale_init_Block"}, [8, 16, 32]
LAVIS: Arguments = {"bare": ("lavis", "lavis.models", "lavis.common"), "fake": ("fairscale", "iopath")}
POSE: Arguments = {"bare": ("mmpose", "mmpose.models", "mmpose.models.backbones"), "fake": ("mmcv",)}
INTERNVL = "internvl.model.internvl_chat"
CHUNKS = IMAGE | {"block_chunks": 0}
VIT = "VisionTransformer"
RES = "transformer.resblocks"

# Repository, module:name, the arguments of each model, and what else its recipe holds.
BUILDS: list[tuple[str, str, dict[str, Arguments], Arguments]] = [
    ("facebookresearch+dino", "vision_transformer:" + VIT, {"ViT": LIST | {"qkv_bias": True}}, {}),
    ("facebookresearch+deit", "models:DistilledVisionTransformer", {"distilled": IMAGE}, {}),
    ("facebookresearch+deit", "models_v2:vit_models", {
        "III": SCALED, "III without layer scale": IMAGE,
        "III in parallel": IMAGE | {"block_layers": "@models_v2:Layer_scale_init_Block_paralx2"},
    }, {}),
    ("facebookresearch+deit", "models_v2:vit_models", {
        "III hMLP stem": SCALED | {"patch_size": 16, "img_size": 64, "Patch_layer": "@models_v2:hMLP_stem"},
    }, {"size": 64}),
    ("facebookresearch+deit", "cait_models:cait_models", {"CaiT": IMAGE}, {}),
    ("bytedance+ibot", "models.vision_transformer:" + VIT, {
        "ViT": LIST | {"qkv_bias": True}, "all tokens": LIST | {"init_values": 1.0},
    }, {}),
    ("facebookresearch+ijepa", "src.models.vision_transformer:" + VIT, {"ViT": LIST}, {}),
    ("facebookresearch+msn", "src.deit:" + VIT, {
        "ViT": LIST | {"qkv_bias": True},
        "stem": LIST | {"conv_stem": True, "conv_stem_channels": STEM, "conv_stem_strides": [2, 2, 2]},
    }, {}),
    ("facebookresearch+mae", "models_vit:" + VIT, {"ViT": IMAGE},
     {"forward": lambda m, x: m.forward_features(x)}),
    ("facebookresearch+mae", "builtins:dict", {
        "autoencoder": IMAGE | {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 4},
    }, {"finish": older_mae, "forward": lambda m, x: m.forward_encoder(x, 0.0)}),
    ("openai+CLIP", "clip.model:" + VIT, {"visual": OPENAI | {"input_resolution": 32, "output_dim": 16}},
     {"bare": ("clip",), "blocks": RES, "tokens_first": True}),
    ("facebookresearch+dinov2", "dinov2.models.vision_transformer:DinoVisionTransformer", {
        "ViT": CHUNKS | {"init_values": 1.0}, "three chunks": IMAGE | {"block_chunks": 3},
        "registers, SwiGLU": CHUNKS | {"num_register_tokens": 4, "ffn_layer": "swiglufused"},
    }, {}),
    ("facebookresearch+dinov2", "dinov2.models.vision_transformer:DinoVisionTransformer",
     {"one chunk": IMAGE | {"block_chunks": 1}}, {"blocks": "blocks.0"}),
    ("facebookresearch+dinov3", "dinov3.models.vision_transformer:DinoVisionTransformer", {
        "ViT": IMAGE | {"layerscale_init": 1.0, "n_storage_tokens": 4, "mask_k_bias": True},
        "SwiGLU": IMAGE | {"ffn_layer": "swiglu", "pos_embed_rope_dtype": "fp32", "norm_layer": "rmsnorm"},
    }, {"finish": initialised}),
    ("DepthAnything+Depth-Anything-V2", "depth_anything_v2.dpt:DepthAnythingV2",
     {"ViT-S": {"encoder": "vits"}}, {"size": 56, "fake": ("cv2",), "blocks": "pretrained.blocks"}),
    ("facebookresearch+capi", "model:EncoderDecoder", {"encoder": CAPI}, {"blocks": "encoder.blocks"}),
    ("facebookresearch+vjepa2", "src.models.vision_transformer:" + VIT, {
        "ViT": IMAGE, "RoPE": IMAGE | {"use_rope": True, "embed_dim": 96},
    }, {}),
    ("facebookresearch+perception_models", "core.vision_encoder.pe:" + VIT, {
        "PE core": OPENAI_IMAGE | {"use_cls_token": True, "attn_pooler_heads": 4},
        "PE spatial": OPENAI_IMAGE | {"pool_type": "none", "ls_init_value": 1.0, "output_dim": None},
    }, {"blocks": RES}),
    ("microsoft+unilm", "modeling_finetune:" + VIT, {"BEiT": RELATIVE, "BEiT shared": SHARED},
     {"under": ("beit",)}),
    ("microsoft+unilm", "modeling_finetune:" + VIT, {"BEiT v2": RELATIVE}, {"under": ("beit2",)}),
    ("microsoft+unilm", "modeling_utils:_get_base_config", {
        "BEiT-3": {"img_size": 32, "patch_size": 8, "vocab_size": 16},
    }, {"under": ("beit3",), "fake": ("fairscale",), "finish": small_beit3, "blocks": "beit3.encoder.layers",
        "forward": lambda m, x: m.beit3(textual_tokens=None, visual_tokens=x)}),
    ("baaivision+EVA", "modeling_finetune:" + VIT, {"EVA-01": RELATIVE}, {"under": ("EVA-01/eva",)}),
    ("baaivision+EVA", "modeling_finetune:" + VIT, {
        "EVA-02": EVA02 | {"naiveswiglu": True}, "EVA-02 xformers": EVA02 | {"swiglu": True},
    }, {"under": ("EVA-02/asuka",), "fake": ("xformers", "apex")}),
    ("baaivision+EVA", "eva_clip.eva_vit_model:EVAVisionTransformer", {
        "EVA-CLIP": IMAGE, "EVA-CLIP post-norm": IMAGE | {"postnorm": True},
        "EVA-02-CLIP": EVA02 | {"naiveswiglu": True},
    }, {"under": ("EVA-CLIP/rei",), "bare": ("eva_clip",)}),
    ("salesforce+LAVIS", "lavis.models.eva_vit:" + VIT, {"EVA ViT": IMAGE}, LAVIS),
    ("salesforce+LAVIS", "lavis.models.vit:" + VIT, {"BLIP ViT": IMAGE}, LAVIS),
    ("salesforce+LAVIS", "lavis.models.clip_vit:" + VIT, {
        "CLIP ViT": OPENAI | {"input_resolution": 32, "use_grad_checkpointing": False},
    }, LAVIS | {"blocks": RES, "tokens_first": True}),
    ("OpenGVLab+InternVL", INTERNVL + ".configuration_intern_vit:InternVisionConfig", {
        "InternViT 6B": INTERN | {"norm_type": "rms_norm"},
        "InternViT": INTERN | {"norm_type": "layer_norm", "qk_normalization": False, "qkv_bias": True},
    }, {"under": ("internvl_chat",), "bare": ("internvl", "internvl.model", INTERNVL),
        "blocks": "encoder.layers",
        "finish": lambda c: get(INTERNVL + ".modeling_intern_vit:InternVisionModel")(c)}),
    ("ViTAE-Transformer+ViTPose", "mmpose.models.backbones.vit:ViT", {"ViT": IMAGE}, POSE),
    ("ViTAE-Transformer+ViTPose", "mmpose.models.backbones.vit_moe:ViTMoE", {
        "ViT MoE": IMAGE | {"qkv_bias": True, "num_expert": 2, "part_features": 8},
    }, POSE | {"forward": lambda m, x: m(x, torch.zeros(len(x), dtype=torch.long))}),
    ("apple+ml-aim", "aim.v1.torch.models:_aim", {"AIM": AIM | {"probe_layers": 2}}, {
        "under": ("aim-v1",), "finish": lambda parts: get("aim.v1.torch.models:AIM")(*parts),
        "blocks": "trunk.blocks"}),
    ("apple+ml-aim", "aim.v2.torch.models:AIMv2VisionEncoder", {"AIM v2": AIM | {"mlp_hidden_dim": 64}},
     {"under": ("aim-v1", "aim-v2"), "blocks": "trunk.blocks"}),
    ("naver+croco", "models.croco:CroCoNet", {
        "encoder": CROCO, "encoder RoPE": CROCO | {"pos_embed": "RoPE100"},
    }, {"blocks": "enc_blocks", "forward": lambda m, x: m._encode_image(x)[0]}),
    ("NVlabs+RADIO", "timm:create_model", {"ViT with CPE": IMAGE | {"model_name": "vit_small_patch16_224"}}, {
        "bare": ("radio",), "finish": with_cropped_positions, "forward": lambda m, x: m.forward_features(x)}),
    ("NVlabs+RADIO", "radio.vision_transformer_xpos:" + VIT, {"xPos": COMMON},
     {"bare": ("radio",), "forward": lambda m, x: m.forward_features(x)}),
    ("tue-mps+eomt", "models.vit:ViT", {
        "EoMT": {"img_size": (64, 64), "backbone_name": "test_vit", "ckpt_path": "-"},
    }, {"size": 64, "finish": lambda vit: get("models.eomt:EoMT")(vit, 5, 4, 2)}),
    ("nickjiang2378+test-time-registers", "dinov2.models.vision_transformer:DinoVisionTransformer",
     {"DINOv2": CHUNKS}, {"under": ("dinov2", "")}),
    ("nickjiang2378+test-time-registers", "clip.transformer:" + VIT, {
        "CLIP": OPENAI_IMAGE | {"hook": "@clip.hook:HookManager()"},
    }, {"under": ("clip", ""), "bare": ("clip",), "blocks": RES}),
    *[("lucidrains+vit-pytorch", f"vit_pytorch.{module}:{kind}", {
        module: LUCID | ({"cls_depth": 1} if kind == "CaiT" else {}),
    }, {"bare": ("vit_pytorch",), "blocks": "transformer.layers"}) for kind, module in (
        ("ViT", "vit"), ("ViT", "parallel_vit"), ("ViT", "learnable_memory_vit"),
        ("ViT", "vit_for_small_dataset"),
        ("SimpleViT", "simple_vit"), ("SimpleViT", "simple_vit_with_register_tokens"),
        ("SimpleViT", "simple_vit_with_qk_norm"), ("SimpleViT", "simple_flash_attn_vit"),
        ("SimpleViT", "simple_vit_with_patch_dropout"), ("SimpleViT", "simple_vit_with_value_residual"),
        ("DeepViT", "deepvit"), ("CaiT", "cait"), ("nViT", "normalized_vit"),
    )],
]  # fmt: skip
RECIPES = {
    f"{repository} {name}": Recipe(repository, name, path, arguments, **settings)
    for repository, path, models, settings in BUILDS
    for name, arguments in models.items()
}
