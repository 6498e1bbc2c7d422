"""What vitreg makes of models as their authors publish them: small builds from checkouts.

    python benchmarks/checkouts.py FOLDER [--only PATTERN] [--json F] [--write PAGE] [--deps DIR]

FOLDER holds checkouts named OWNER+NAME. Each model is built from the checkout's own code in a process of its
own, three blocks deep, with random weights; nothing of that code is kept here but how it is called. `--deps`
is a folder of packages that some import: pip install --no-deps --target DIR einops torchscale.

A model is accepted, refused (vitreg says why), not built (the code does not run here), or vitreg crashes. Of
accepted ones is asked, by hooks of this file's own:

    norms      token norms are those of what each block gives back
    rows       attention rows are those of the model's own softmax (recomputed from q and k where it is fused)
    registers  test-time registers run, change the output and keep its shape; so does one without neurons
    splitting  all tokens that are not forked stay what they were
    bias       the attention bias runs and changes the output
    planted    artifacts that are planted in block 1 are found there, and the neurons that make them
    undo       after all of that the output is what it was, bit by bit
    compiled   the model with registers, compiled (backend "eager"), gives the eager answer
"""

import argparse
import fnmatch
import importlib
import json
import subprocess
import sys
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from checkouts_page import Row, page, summary
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import vitreg
from vitreg.errors import VitregError
from vitreg.fixes.neurons import RegisterNeuron, RegisterNeurons

NEURONS = RegisterNeurons.of({1: [3, 5]})
Arguments = dict[str, Any]


# -- how models are built --------------------------------------------------------------------------


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


# -- what is asked of them -------------------------------------------------------------------------


class Case:
    """A model that vitreg accepted, and what it gave before anything was done to it."""

    def __init__(self, recipe: Recipe, vit: vitreg.Backbone, images: Tensor) -> None:
        self.recipe, self.vit, self.images = recipe, vit, images
        self.plain = self.outputs()

    @torch.no_grad()
    def outputs(self, model: Any = None) -> list[Tensor]:
        """All tensors that the model gives, or its blocks where its head gives none."""
        with self.streams() as streams:
            given = tree_leaves((self.vit if model is None else model)(self.images))
        return [value for value in given if isinstance(value, Tensor)] or streams

    @contextmanager
    def streams(self) -> Iterator[list[Tensor]]:
        """What each block gives back, (b, n, d), by hooks."""
        found: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            stream = next(x for x in tree_leaves(output) if isinstance(x, Tensor) and x.dim() == 3)
            found.append(stream.transpose(0, 1) if self.recipe.tokens_first else stream)

        blocks = self.vit.model.get_submodule(self.recipe.blocks).children()
        hooks = [block.register_forward_hook(keep) for block in blocks]
        yield found
        for hook in hooks:
            hook.remove()

    def changed_by(self, fix: vitreg.Fix) -> str:
        with fix.applied_to(self.vit):
            fixed = self.outputs()
        shapes = [x.shape for x in fixed] == [x.shape for x in self.plain]
        changed = shapes and apart(fixed, self.plain) > 1e-6 and all(bool(x.isfinite().all()) for x in fixed)
        return yes(changed, "the output has another shape, is as it was, or is not finite")


def apart(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """How far tensors are apart, each in terms of its largest value."""
    pairs = [(a.float(), b.float()) for a, b in zip(ours, theirs, strict=True)]
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs)


def yes(right: bool, otherwise: str) -> str:
    return "yes" if right else f"NO: {otherwise}"


@torch.no_grad()
def norms(case: Case) -> str:
    with case.streams() as streams, vitreg.trace(case.vit) as t:
        case.vit(case.images)
    off = apart([t.norms], [torch.stack(streams).norm(dim=-1)])
    return yes(off < 1e-5, f"off by {off:.2g}")


class Softmaxes(TorchFunctionMode):
    """The attention weights of a pass: what a softmax gives, or would give inside a fused function."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens, self.rows = tokens, list[Tensor]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = rows = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            call = dict(zip(("q", "k", "v", "attn_mask"), args, strict=False)) | kwargs
            scores = call["q"] @ call["k"].mT * (call.get("scale") or call["q"].shape[-1] ** -0.5)
            mask = call.get("attn_mask")
            if mask is not None:
                scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
            rows = scores.softmax(-1)
        elif func is F.multi_head_attention_forward:
            rows = func(*args, **(kwargs | {"need_weights": True, "average_attn_weights": False}))[1]
        elif getattr(func, "__name__", "") != "softmax":
            return given
        if tuple(rows.shape[-2:]) == (self.tokens, self.tokens):
            self.rows.append(rows.float())
        return given


@torch.no_grad()
def rows(case: Case) -> str:
    with vitreg.trace(case.vit, attention="full") as t:
        case.vit(case.images)
    with Softmaxes(t.inner.tokens) as seen:
        case.vit(case.images)
    if len(seen.rows) != len(t.attention):
        return f"NO: {len(seen.rows)} softmaxes were seen in {len(t.attention)} blocks"
    off = apart(list(t.attention), [x.reshape(t.attention[0].shape) for x in seen.rows])
    return yes(off < 1e-5, f"off by {off:.2g}")


def registers(case: Case) -> str:
    with vitreg.TestTimeRegisters(RegisterNeurons.of({}), 1).applied_to(case.vit):
        if [x.shape for x in case.outputs()] != [x.shape for x in case.plain]:
            return "NO: without neurons the output has another shape"
    return case.changed_by(vitreg.TestTimeRegisters(NEURONS, 2))


@torch.no_grad()
def splitting(case: Case) -> str:
    """Neurons mark where they are highest among the patches of these images."""
    with vitreg.trace(case.vit, neurons=True, residuals=True) as before:
        case.vit(case.images)
    chosen = []
    for layer in (0, 1):
        level = before.neurons[layer][:, before.layout.patch_slice].flatten(0, 1).sort(0).values[-3]
        index = int(level.argmax())
        chosen.append(RegisterNeuron(layer, index, threshold=0.999 * float(level[index])))
    fix = vitreg.TokenSplitting(RegisterNeurons(tuple(chosen)), capacity=0.6)
    with fix.applied_to(case.vit) as handle, vitreg.trace(case.vit, residuals=True) as after:
        case.vit(case.images)
    fork = handle.carried
    forked = torch.zeros(after.residuals.shape[1:3], dtype=torch.bool).scatter(1, fork.position, fork.valid)
    off = (after.residuals - before.residuals).abs().amax(-1) / before.residuals.abs().max()
    if not bool((off[-1][forked] > 1e-6).any()):
        return "NO: nothing was forked"
    return yes(float(off[:, ~forked].max()) < 1e-5, f"other tokens are off by {off[:, ~forked].max():.2g}")


def bias(case: Case) -> str:
    return case.changed_by(vitreg.AttentionBias.calibrate(case.vit, [case.images], NEURONS))


def planted(case: Case) -> str:
    photos = get("phantoms:crops")(case.vit, 96, 0)
    phantom = vitreg.plant(case.vit, photos, 1)
    report = vitreg.diagnose(phantom.vit, [photos], examples=0)
    if (report.verdict, report.onset_layer) != ("artifacts", 1):
        return f"NO: {report.verdict}, from block {report.onset_layer}"
    found = vitreg.find_register_neurons(phantom.vit, [photos], report, top_k=4).by_layer
    right = {layer: sorted(ids) for layer, ids in found.items()} == {1: sorted(phantom.neurons)}
    return yes(right, f"found {found}, planted {phantom.neurons}")


def undo(case: Case) -> str:
    return yes(apart(case.outputs(), case.plain) == 0, "the output is another")


def compiled(case: Case) -> str:
    with vitreg.TestTimeRegisters(NEURONS, 2).applied_to(case.vit):
        run = case.vit.forward or case.vit.model
        fast: Any = torch.compile(lambda images: run(images), backend="eager")
        off = apart(case.outputs(fast), case.outputs())
    return yes(off < 1e-5, f"the compiled answer is off by {off:.2g}")


CHECKS = {
    check.__name__: check for check in (norms, rows, registers, splitting, bias, planted, undo, compiled)
}


# -- one model, in a process of its own ------------------------------------------------------------


def judged(recipe: Recipe, folder: Path) -> Row:
    row = {"repository": recipe.repository, "model": recipe.name}
    try:
        model = recipe.build(folder)
        own = recipe.forward
        images = torch.rand(2, 3, recipe.size, recipe.size) * 2 - 1
        with torch.no_grad():
            own(model, images) if own else model(images)
    except Exception as error:
        return row | {"verdict": f"not built: {said(error)}"}
    wrapped: list[vitreg.Backbone] = []
    row["verdict"] = tried(lambda: wrapped.append(vitreg.wrap(model, image_size=recipe.size, forward=own)))
    if wrapped:
        case = Case(recipe, wrapped[0], images)
        row |= {name: tried(check, case) for name, check in CHECKS.items()}
    return row


def tried(run: Callable[..., str | None], *args: Any) -> str:
    try:
        return run(*args) or "accepted"
    except VitregError as error:
        return f"refused: {' '.join(str(error).split())}"
    except Exception as error:
        return f"CRASH: {said(error)}"


def said(error: Exception) -> str:
    """Type and message of an error, the line that raised it, and the last one of vitreg's."""
    frames = list(traceback.extract_tb(error.__traceback__))
    frames = [frames[-1], *[frame for frame in frames if "/vitreg/" in frame.filename][-1:]]
    places = " from ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]} ({places})"


def in_child(name: str, arguments: list[str]) -> Row:
    done = subprocess.run([sys.executable, *arguments, "--child", name], capture_output=True, text=True)
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = [*done.stderr.splitlines(), "no message"][-1]
        return {"repository": name, "model": "", "verdict": f"CRASH: {last} (exit code {done.returncode})"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="the folder of checkouts, named OWNER+NAME")
    parser.add_argument("--only", default="*", help="a pattern of 'OWNER+NAME model'")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--write", type=Path, help="also write a page (Markdown) here")
    parser.add_argument("--deps", type=Path, help="a folder of packages that checkouts import")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        sys.path += [str(Path(__file__).parents[1] / "tests"), str(args.deps or "")]
        warnings.simplefilter("ignore")
        print(json.dumps(judged(RECIPES[args.child], args.folder)))
        return
    table = [in_child(name, sys.argv) for name in RECIPES if fnmatch.fnmatch(name, args.only)]
    print(summary(table, list(CHECKS)))
    if args.write:
        args.write.write_text(page(table, list(CHECKS)), encoding="utf-8")
    if args.json:
        args.json.write_text(json.dumps(table, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
