"""Small composite models of transformers with random weights, and their processors.

COMPOSITES["llava-next"].save(folder)       # what a published checkpoint's folder holds
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers as hf
from torch import nn

SIDE = {"height": 64, "width": 64}
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 64, "patch_size": 16,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": 200,
}  # fmt: skip
LLAMA = TEXT | {"model_type": "llama"}
CLIP = VISION | {"model_type": "clip_vision_model"}
SIGLIP = VISION | {"model_type": "siglip_vision_model"}
IMAGE_TOKEN = 199


@dataclass(frozen=True)
class Composite:
    """`size`: of the tower, (height, width) in pixels. `view`: which one of a photo it gets, where its
    processor does not give one picture of that size."""

    model: Callable[[], nn.Module]
    processor: Callable[[], Any]
    size: tuple[int, int] = (64, 64)
    view: str = ""

    def save(self, folder: Path) -> None:
        self.model().save_pretrained(folder)  # type: ignore[operator]
        self.processor().save_pretrained(folder)


def llava() -> nn.Module:
    config = hf.LlavaConfig(vision_config=CLIP, text_config=LLAMA, image_token_index=IMAGE_TOKEN)
    return hf.LlavaForConditionalGeneration(config)


def llava_next() -> nn.Module:
    config = hf.LlavaNextConfig(
        vision_config=CLIP,
        text_config=LLAMA,
        image_token_index=IMAGE_TOKEN,
        image_grid_pinpoints=[[64, 128]],
    )
    return hf.LlavaNextForConditionalGeneration(config)


def llava_onevision() -> nn.Module:
    config = hf.LlavaOnevisionConfig(
        vision_config=SIGLIP,
        text_config=TEXT | {"model_type": "qwen2"},
        image_token_index=IMAGE_TOKEN,
        video_token_index=198,
        image_grid_pinpoints=[[64, 128]],
    )
    return hf.LlavaOnevisionForConditionalGeneration(config)


def idefics3() -> nn.Module:
    config = hf.Idefics3Config(vision_config=VISION, text_config=LLAMA, image_token_id=IMAGE_TOKEN)
    return hf.Idefics3ForConditionalGeneration(config)


def smolvlm() -> nn.Module:
    config = hf.SmolVLMConfig(vision_config=VISION, text_config=LLAMA, image_token_id=IMAGE_TOKEN)
    return hf.SmolVLMForConditionalGeneration(config)


def internvl() -> nn.Module:
    config = hf.InternVLConfig(
        vision_config=VISION | {"image_size": [64, 64], "patch_size": [16, 16]},
        text_config=TEXT | {"model_type": "qwen2"},
        image_token_id=IMAGE_TOKEN,
    )
    return hf.InternVLForConditionalGeneration(config)


def captioner() -> nn.Module:
    text = hf.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=200)
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(hf.ViTConfig(**VISION), text)
    return hf.VisionEncoderDecoderModel(config)


def dinov2() -> Any:
    return hf.Dinov2Config(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, image_size=70, patch_size=14, mlp_ratio=2,
        out_features=["stage1", "stage2", "stage3", "stage4"], apply_layernorm=True,
        reshape_hidden_states=False,
    )  # fmt: skip


def depth_anything() -> nn.Module:
    config = hf.DepthAnythingConfig(
        backbone_config=dinov2(), reassemble_hidden_size=32, patch_size=14, neck_hidden_sizes=[16] * 4,
        fusion_hidden_size=16, head_in_channels=16, head_hidden_size=16, reassemble_factors=[4, 2, 1, 0.5],
    )  # fmt: skip
    return hf.DepthAnythingForDepthEstimation(config)


def dpt() -> nn.Module:
    """Its own image_size, 384 by default, says nothing of its backbone."""
    config = hf.DPTConfig(
        backbone_config=dinov2(), neck_hidden_sizes=[16] * 4, fusion_hidden_size=16, is_hybrid=False
    )
    return hf.DPTForDepthEstimation(config)


def vitpose() -> nn.Module:
    backbone = hf.VitPoseBackboneConfig(
        image_size=[64, 48], patch_size=[16, 16], hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        mlp_ratio=2, out_features=["stage2"],
    )  # fmt: skip
    return hf.VitPoseForPoseEstimation(hf.VitPoseConfig(backbone_config=backbone, num_labels=17))


def clip_processor() -> Any:
    return hf.CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=SIDE)


def depth_processor() -> Any:
    return hf.DPTImageProcessor(
        size={"height": 70, "width": 70}, keep_aspect_ratio=True, ensure_multiple_of=14
    )


WHOLE, CENTRE = "the whole photo, squeezed to", "the photo's centre, scaled to"

COMPOSITES = {
    "llava": Composite(llava, clip_processor),
    "llava-next": Composite(
        llava_next,
        lambda: hf.LlavaNextImageProcessor(
            size={"shortest_edge": 64}, crop_size=SIDE, image_grid_pinpoints=[[64, 128]]
        ),
        view=WHOLE,
    ),
    "llava-onevision": Composite(
        llava_onevision,
        lambda: hf.LlavaOnevisionImageProcessor(size=SIDE, image_grid_pinpoints=[[64, 128]]),
        view=WHOLE,
    ),
    "idefics3": Composite(
        idefics3,
        lambda: hf.Idefics3ImageProcessor(size={"longest_edge": 128}, max_image_size={"longest_edge": 64}),
        view=WHOLE,
    ),
    "smolvlm": Composite(
        smolvlm,
        lambda: hf.SmolVLMImageProcessor(size={"longest_edge": 128}, max_image_size={"longest_edge": 64}),
        view=WHOLE,
    ),
    "internvl": Composite(
        internvl, lambda: hf.GotOcr2ImageProcessor(size=SIDE, crop_to_patches=True), view=WHOLE
    ),
    "vit-gpt2": Composite(captioner, lambda: hf.ViTImageProcessor(size=SIDE)),
    "depth-anything": Composite(depth_anything, depth_processor, (70, 70), CENTRE),
    "dpt": Composite(dpt, depth_processor, (70, 70), CENTRE),
    "vitpose": Composite(
        vitpose, lambda: hf.VitPoseImageProcessor(size={"height": 64, "width": 48}), (64, 48), CENTRE
    ),
}
