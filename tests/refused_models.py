"""Models that are refused, and the reason that is given for each."""

from collections.abc import Callable
from functools import partial
from typing import Any

from authors_models import Authors, Films, MixedAfterwards, OverChannels, TalkingHeads, UsedTwice
from catalog import timm_model
from packed_models import AllTogether, of_transformers
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch import Tensor, nn


def small(name: str, **changes: Any) -> Callable[[], nn.Module]:
    return timm_model(name, **({"patch_size": 16, "img_size": 64} | changes))


def timm_plain(name: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, **settings)

    return build


def hf(model: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
        plain = {"image_size": 64, "patch_size": 16}
        return getattr(transformers, model)(getattr(transformers, config)(**sizes | plain | settings))

    return build


def hf_swin() -> nn.Module:
    from transformers import SwinConfig, SwinModel

    return SwinModel(SwinConfig(image_size=64, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4))


class SequenceFirst(nn.Module):
    """A ViT whose stream is (n, b, d), as PyTorch's own encoder has it by default."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 32, 16, 16)
        layers = [nn.TransformerEncoderLayer(32, 4, 64) for _ in range(3)]
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).permute(2, 0, 1)
        for layer in self.layers:
            x = layer(x)
        return x


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "swin": (
        timm_plain(
            "swin_tiny_patch4_window7_224",
            img_size=64,
            window_size=4,
            embed_dim=16,
            depths=(2, 2),
            num_heads=(2, 4),
        ),
        r"SwinTransformer .*found 2 stages of several blocks, but block 0 takes a 4-dimensional input"
        r" \(3, 16, 16, 16\)."
        r" Windowed and convolutional models cannot carry extra tokens",
    ),
    "hf swin": (
        hf_swin,
        r"SwinModel .*the residual stream changes from \(3, 256, 16\) to \(3, 64, 32\). Hierarchical",
    ),
    "sam": (
        small("samvit_base_patch16", global_attn_indexes=(2,), window_size=2),
        r"VisionTransformerSAM .*4-dimensional input \(3, 4, 4, 32\)",
    ),
    "pvt": (
        timm_plain("pvt_v2_b0", embed_dims=(8, 16, 32, 64), num_heads=(1, 2, 4, 8)),
        r"PyramidVisionTransformerV2 .*4-dimensional input|PyramidVision.*Hierarchical",
    ),
    "hiera": (
        timm_plain("hiera_tiny_224", img_size=64, embed_dim=16, num_heads=1, stages=(1, 2, 1, 1)),
        r"Hiera .*the residual stream changes from .*Hierarchical models",
    ),
    "resnet": (timm_plain("resnet18"), r"no stack of transformer blocks in ResNet"),
    "convnext": (
        timm_plain("convnext_atto", depths=(2, 2, 2, 2), dims=(8, 16, 32, 64)),
        r"no stack of transformer blocks in ConvNeXt",
    ),
    "mixer": (
        timm_plain("mixer_s16_224", img_size=64),
        r"MlpMixer .*block 0 made no attention that vitreg sees.* Other kinds",
    ),
    "xcit": (small("xcit_nano_12_p16_224"), r"Xcit .*over channels, not over tokens \(cross-covariance\)"),
    "cait": (small("cait_xxs24_224"), r"Cait .*changes its attention by 'permute' between q k\^T and"),
    "heads mixed before the softmax": (
        partial(Authors, TalkingHeads, grid=(8, 8)),
        "changes its attention by 'permute'",
    ),
    "heads mixed after the softmax": (
        partial(Authors, MixedAfterwards, grid=(8, 8)),
        "changes its attention by 'einsum'",
    ),
    "cross-covariance": (partial(Authors, OverChannels, grid=(8, 8)), "over channels, not over tokens"),
    "weights used twice": (partial(Authors, UsedTwice, grid=(8, 8)), "block 0 computes attention 2 times"),
    "differential attention": (
        small("vit_dpwee_patch16_reg1_gap_256"),
        r"block 0 computes attention 2 times, not once",
    ),
    "parallel blocks": (small("vit_small_patch16_18x2_224"), r"block 0 computes attention 2 times"),
    "hierarchical attention": (
        timm_plain("caformer_s18"),
        r"MetaFormer .*outside them .* self-attention over \[4\] tokens, not 16. Hierarchical models",
    ),
    "fused output": (
        lambda: VisionTransformer(
            img_size=64,
            embed_dim=32,
            depth=2,
            num_heads=2,
            block_fn=partial(ParallelScalingBlock, fuse_out_proj=True),
        ),
        r"attention and MLP share '.*', their only linear layer to the width",
    ),
    "masked autoencoder": (
        hf("ViTMAEModel", "ViTMAEConfig"),
        r"the same image gives them other tokens each time. Random masks",
    ),
    "tokens behind the patches": (
        hf("YolosModel", "YolosConfig", image_size=[64, 64], num_detection_tokens=2),
        r"3 do not depend on the image \(number 0, 17, 18\) and are not in front of the patches",
    ),
    "images that see each other": (
        AllTogether,
        "nothing keeps images from attending to each other",
    ),
    "a row in no known order": (
        of_transformers("glm_ocr", "GlmOcrVisionModel", "GlmOcrVisionConfig", patch_size=16),
        "transformers names no image processor for GlmOcrVisionModel",
    ),
    "a class token behind the patches": (
        hf(
            "Llama4VisionModel",
            "Llama4VisionConfig",
            intermediate_size=128,
            vision_output_dim=32,
            projector_input_dim=32,
            projector_output_dim=32,
        ),
        r"Llama4VisionModel .*1 do not depend on the image \(number 16\) and are not in front of the patches",
    ),
    "video": (
        hf("VideoMAEModel", "VideoMAEConfig", num_frames=4),
        r"VideoMAEModel takes video, 5-dimensional input \(b, frames, 3, h, w\)",
    ),
    "video of any length": (Films, r"Films takes video, 5-dimensional input"),
    "a whole CLIP": (
        hf(
            "CLIPModel",
            "CLIPConfig",
            text_config={"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
            vision_config={"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
        ),
        r"CLIPModel could not run on images .*Give vitreg the vision encoder itself \(of a larger model, its"
        r" vision tower\)",
    ),
    "no model at all": (lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), "no stack of transformer"),
}
